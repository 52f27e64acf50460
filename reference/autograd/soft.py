"""Soft MoE in PyTorch; the equations and sources are those of `reference.soft`.

The slots are tokens of their own, each with one expert and a gate of 1: what computes experts for tokens computes them for slots too,
on any backend and any number of ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..soft import EPS
from .experts import Params
from .tokens import TokenInfo, at_least_fp32, without_autocast


class SoftMix(NamedTuple):
    """How tokens and slots mix: the fields of `reference.soft.SoftMix` as tensors. Both shares carry gradients."""

    dispatch: Tensor
    combine: Tensor
    group: Tensor
    groups: int


def unit_forward(tensor: Tensor) -> Tensor:
    """Vectors of length 1, along the last dimension (unit), in fp32 or better."""
    tensor = at_least_fp32(tensor)
    return tensor / torch.sqrt(tensor.square().sum(-1, keepdim=True) + EPS)


def slot_logits_forward(x_TD: Tensor, params: Params) -> Tensor:
    """How well a token suits a slot (soft-logits): x [T, D] → [T, E, C] in fp32 or better."""
    unit_ECD = unit_forward(params["router.weight"])
    return at_least_fp32(params["router.scale"]) * torch.einsum("td,ecd->tec", unit_forward(x_TD), unit_ECD)


def members(group_T: Tensor, groups: int) -> tuple[Tensor, ...]:
    """The tokens of each group, in their own order; waits for the device once, for the groups' sizes.

    No tokens are one empty group: then the parameters have gradients, of 0.
    """
    order_T = torch.argsort(group_T, stable=True)
    return order_T.split(torch.bincount(group_T, minlength=max(groups, 1)).tolist())


def soft_mix(logits_TEC: Tensor, tokens: TokenInfo) -> SoftMix:
    """Two softmaxes of the same logits (soft-dispatch, soft-combine): over the real tokens of the group, and over all slots."""
    padding_T1 = ~tokens.real_T[:, None]
    flat = logits_TEC.flatten(1)
    combine = torch.softmax(flat, 1).masked_fill(padding_T1, 0)
    of_real = flat.masked_fill(padding_T1, torch.finfo(flat.dtype).min)
    dispatch = torch.zeros_like(flat)
    for own in members(tokens.group_T, tokens.groups):
        dispatch = dispatch.index_copy(0, own, torch.softmax(of_real[own], 0))
    dispatch = dispatch.masked_fill(padding_T1, 0)
    return SoftMix(dispatch.view_as(logits_TEC), combine.view_as(logits_TEC), tokens.group_T, tokens.groups)


def mix_forward(x_TD: Tensor, mix: SoftMix, apply: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Tokens into slots, slots through their experts, slots into tokens (soft-moe): x [T, D] → y [T, D] in its dtype.

    apply: (rows [N, D], the expert of each [N]) → the experts' outputs [N, D]; N = B · E · C.
    """
    experts, slots = mix.dispatch.shape[1:]
    dispatch, combine, own = mix.dispatch.flatten(1), mix.combine.flatten(1), members(mix.group, mix.groups)
    x, y = x_TD.to(dispatch.dtype), torch.zeros_like(x_TD, dtype=combine.dtype)
    with without_autocast(x.device):
        rows_ND = torch.cat([dispatch[tokens].mT @ x[tokens] for tokens in own])
    total = mix.groups * experts * slots
    expert_N = torch.arange(experts, device=x.device).repeat_interleave(slots).repeat(mix.groups)
    out_ND = apply(rows_ND[:total].to(x_TD.dtype), expert_N).to(combine.dtype)
    out_ND = torch.cat([out_ND, torch.zeros_like(rows_ND[total:])])  # the empty group of no tokens has no slots
    with without_autocast(x.device):
        for tokens, out in zip(own, out_ND.split(experts * slots), strict=True):
            y = y.index_copy(0, tokens, combine[tokens] @ out)
    return y.to(x_TD.dtype)
