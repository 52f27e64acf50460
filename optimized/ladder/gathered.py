"""Rung 5: the rows are gathered while they are multiplied, and never written."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reference.autograd import Routing
from reference.autograd.experts import ACTIVATIONS
from reference.config import MoEConfig

from ..contracts import contract
from .pieces import Combine, GatheredProduct, GroupedProduct, schedule_of
from .plain import LIMITS, TERMS, check, stacks


@contract(**TERMS, backend="triton", limits=f"{LIMITS}; the kernels' limits")
def apply_experts(x_TD: Tensor, routing: Routing, params: Mapping[str, Tensor], config: MoEConfig) -> Tensor:
    """Sort, product that gathers, activation, grouped product, combine: x [T, D] → y [T, D].

    Gradient: x, gates and parameters, piece by piece. K copies of the input are neither written, nor read again, nor saved.
    Source: ScatterMoE §3.
    """
    check(config)
    up, down, up_bias, down_bias = stacks(params, config)
    schedule = schedule_of(routing.expert, routing.keep, up)
    hidden_NF = ACTIVATIONS[config.experts.activation](GatheredProduct.apply(x_TD, up, up_bias, schedule))
    return Combine.apply(GroupedProduct.apply(hidden_NF, down, down_bias, schedule), routing.gate, schedule)
