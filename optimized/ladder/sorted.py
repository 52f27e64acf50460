"""Rung 3: a sort makes every expert's rows neighbours; nothing is padded."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reference.autograd import Routing
from reference.autograd.dispatch import combine_forward, dispatch_forward
from reference.autograd.experts import experts_forward
from reference.config import MoEConfig

from ..contracts import contract
from .plain import LIMITS, TERMS, check


@contract(**TERMS, backend="torch", limits=f"{LIMITS}; waits for the device twice")
def apply_experts(x_TD: Tensor, routing: Routing, params: Mapping[str, Tensor], config: MoEConfig) -> Tensor:
    """(dispatch), (experts), (combine): x [T, D] → y [T, D]. One gather, E small products, one scatter.

    Gradient: autograd's.
    """
    check(config)
    rows_ND, where = dispatch_forward(x_TD, routing.expert, routing.keep, config.experts.count)
    out_ND = experts_forward(rows_ND, where.bounds_P, params, config.experts)
    return combine_forward(out_ND, routing.gate, where).to(x_TD.dtype)
