"""Rung 2: every expert gets as many slots as the busiest one needs, and one batched product serves them all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reference.autograd import Routing
from reference.autograd.experts import ACTIVATIONS
from reference.config import MoEConfig

from ..contracts import contract
from .plain import LIMITS, TERMS, check, stacks


@contract(**TERMS, backend="torch", limits=f"{LIMITS}; E times the busiest expert's rows in memory; waits for the device twice")
def apply_experts(x_TD: Tensor, routing: Routing, params: Mapping[str, Tensor], config: MoEConfig) -> Tensor:
    """The experts as a batch of matrices [E, C, D], C the largest load: x [T, D] → y [T, D].

    Gradient: autograd's; an empty slot's is 0. Rows are multiplied that nobody asked for.
    Source: GShard §3.2, whose capacity C drops what it has no slot for; here it is as large as it must be.
    """
    check(config)
    up, down, up_bias, down_bias = stacks(params, config)
    token_N, slot_N = torch.where(routing.keep)
    expert_N, gate_N = routing.expert[token_N, slot_N], routing.gate[token_N, slot_N]
    taken_NE = torch.nn.functional.one_hot(expert_N, len(up))
    row_N = (taken_NE.cumsum(0) - taken_NE).gather(1, expert_N[:, None])[:, 0]
    rows_ECD = x_TD.new_zeros(len(up), int(taken_NE.sum(0).max()), x_TD.shape[1]).index_put((expert_N, row_N), x_TD[token_N])
    pre_ECM = torch.bmm(rows_ECD, up.mT)
    if up_bias is not None:
        pre_ECM = pre_ECM + up_bias[:, None]
    hidden_ECF = ACTIVATIONS[config.experts.activation](pre_ECM.flatten(0, 1)).view(*rows_ECD.shape[:2], down.shape[2])
    out_ECD = torch.bmm(hidden_ECF, down.mT)
    if down_bias is not None:
        out_ECD = out_ECD + down_bias[:, None]
    y_TD = gate_N.new_zeros(x_TD.shape).index_add(0, token_N, gate_N[:, None] * out_ECD[expert_N, row_N])
    return y_TD.to(x_TD.dtype)
