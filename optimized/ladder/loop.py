"""Rung 1: one expert after the other asks every token whether it is meant."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reference.autograd import Routing
from reference.autograd.experts import FFN, ffn_forward
from reference.config import MoEConfig

from ..contracts import contract
from .plain import LIMITS, TERMS, check, stacks


@contract(**TERMS, backend="torch", limits=f"{LIMITS}; waits for the device E times")
def apply_experts(x_TD: Tensor, routing: Routing, params: Mapping[str, Tensor], config: MoEConfig) -> Tensor:
    """y_t = Σ_k g_tk FFN_{e_tk}(x_t) (combine), as it is written: x [T, D] → y [T, D] in the dtype of x, summed in the gates'.

    Gradient: autograd's. E comparisons of all T·K choices, E gathers, E scatters.
    """
    check(config)
    up, down, *biases = (None if stack is None else stack.unbind() for stack in stacks(params, config))
    assert up is not None and down is not None
    up_bias, down_bias = ([None] * len(up) if bias is None else bias for bias in biases)
    y_TD = routing.gate.new_zeros(x_TD.shape)
    for e, tensors in enumerate(zip(up, down, up_bias, down_bias, strict=True)):
        token_N, slot_N = torch.where(routing.keep & (routing.expert == e))
        out_ND = ffn_forward(x_TD[token_N], FFN(*tensors), config.experts.activation)
        y_TD.index_add_(0, token_N, routing.gate[token_N, slot_N][:, None] * out_ND)
    return y_TD.to(x_TD.dtype)
