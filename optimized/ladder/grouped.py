"""Rung 4: the E small products become one launch."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reference.autograd import Routing
from reference.autograd.experts import ACTIVATIONS
from reference.config import MoEConfig

from ..contracts import contract
from .pieces import Combine, Gather, GroupedProduct, schedule_of
from .plain import LIMITS, TERMS, check, stacks


@contract(**TERMS, backend="triton", limits=f"{LIMITS}; the kernels' limits")
def apply_experts(x_TD: Tensor, routing: Routing, params: Mapping[str, Tensor], config: MoEConfig) -> Tensor:
    """Sort, gather, grouped product, activation, grouped product, combine: x [T, D] → y [T, D].

    Gradient: x, gates and parameters, piece by piece. The number of launches no longer depends on E, and nobody waits.
    Source: MegaBlocks §5, whose block-sparse products these are, without a block's padding in memory.
    """
    check(config)
    up, down, up_bias, down_bias = stacks(params, config)
    schedule = schedule_of(routing.expert, routing.keep, up)
    rows_ND = Gather.apply(x_TD, schedule)
    hidden_NF = ACTIVATIONS[config.experts.activation](GroupedProduct.apply(rows_ND, up, up_bias, schedule))
    return Combine.apply(GroupedProduct.apply(hidden_NF, down, down_bias, schedule), routing.gate, schedule)
