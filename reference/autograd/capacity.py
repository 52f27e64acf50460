"""expert_TK → keep_TK in PyTorch; the formulas are those of `reference.capacity` themselves, for they count on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from .. import capacity as numpy_capacity
from ..config import CapacityConfig
from .tokens import TokenInfo


def group_capacity(config: CapacityConfig, top_k: int, experts: int, tokens: TokenInfo, *, training: bool) -> Tensor:
    """Slots per expert in each group, [B] int64; waits for the device only where group sizes depend on given ids or padding."""
    # The reference's function asks `tokens` for nothing but real_per_group(), which is a list of integers here too.
    slots_B = numpy_capacity.group_capacity(config, top_k, experts, cast(Any, tokens), training=training)
    return torch.from_numpy(slots_B).to(tokens.group_T.device)


def choice_major(gate_TK: Tensor) -> Tensor:
    """All first choices in order of position, then all second ones, … (order-choice-major): assignment ids t·K + k, [T·K]."""
    return torch.arange(gate_TK.numel(), device=gate_TK.device).reshape(gate_TK.shape).T.flatten()


def token_major(gate_TK: Tensor) -> Tensor:
    """Tokens in order of position, each with all its choices (order-token-major): [T·K]."""
    return torch.arange(gate_TK.numel(), device=gate_TK.device)


ORDERS: dict[str, Callable[[Tensor], Tensor]] = {"choice_major": choice_major, "token_major": token_major}


def position_in_expert(expert_TK: Tensor, wanted_TK: Tensor, group_T: Tensor, order_N: Tensor) -> Tensor:
    """How many wanted assignments to the same expert of the same group come earlier in the order (position): [T, K] int64.

    Unwanted assignments share a bucket of their own, so that no shape depends on how many there are; their position is 0.
    """
    experts = 1 + expert_TK.amax() if expert_TK.numel() else 1
    bucket_TK = torch.where(wanted_TK, group_T[:, None] * experts + expert_TK, -1)
    bucket_N = bucket_TK.flatten()[order_N]
    sorted_N, by_bucket_N = torch.sort(bucket_N, stable=True)
    rank_N = torch.empty_like(by_bucket_N).scatter(0, by_bucket_N, torch.arange(len(by_bucket_N), device=by_bucket_N.device))
    in_queue_N = rank_N - torch.searchsorted(sorted_N, bucket_N)
    position_N = torch.empty_like(in_queue_N).scatter(0, order_N, in_queue_N)
    return torch.where(wanted_TK, position_N.reshape(expert_TK.shape), 0)


def keep_within_capacity(expert_TK: Tensor, gate_TK: Tensor, wanted_TK: Tensor, capacity: Tensor, order: str, tokens: TokenInfo) -> Tensor:
    """The assignments that find a free slot (keep): expert, gate, wanted [T, K], capacity [B] → [T, K] bool."""
    position_TK = position_in_expert(expert_TK, wanted_TK, tokens.group_T, ORDERS[order](gate_TK))
    return wanted_TK & (position_TK < capacity[tokens.group_T][:, None])
