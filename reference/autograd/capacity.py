"""expert_TK → keep_TK in PyTorch; the formulas are those of `reference.capacity` themselves, for they count on the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import capacity as numpy_capacity
from ..config import CapacityConfig, MoEConfig
from .tokens import Draws, HostDraws, TokenInfo, on_host


def group_capacity(config: CapacityConfig, top_k: int, experts: int, tokens: TokenInfo, *, training: bool) -> Tensor:
    """Slots per expert in each group, [B] int64; waits for the device only where group sizes depend on given ids or padding."""
    # The reference's function asks `tokens` for nothing but real_per_group(), which is a list of integers here too.
    slots_B = numpy_capacity.group_capacity(config, top_k, experts, cast(Any, tokens), training=training)
    return torch.from_numpy(slots_B).to(tokens.group_T.device)


def expert_capacity(config: MoEConfig, tokens: TokenInfo, *, training: bool) -> Tensor:
    """Slots of each group's experts, [B] or [B, E] int64; waits for the device as `group_capacity` does."""
    return torch.from_numpy(numpy_capacity.expert_capacity(config, cast(Any, tokens), training=training)).to(tokens.group_T.device)


def choice_major(gate_TK: Tensor, draws: Draws) -> Tensor:
    """All first choices in order of position, then all second ones, … (order-choice-major): assignment ids t·K + k, [T·K]."""
    return torch.arange(gate_TK.numel(), device=gate_TK.device).reshape(gate_TK.shape).T.flatten()


def token_major(gate_TK: Tensor, draws: Draws) -> Tensor:
    """Tokens in order of position, each with all its choices (order-token-major): [T·K]."""
    return torch.arange(gate_TK.numel(), device=gate_TK.device)


def by_probability(gate_TK: Tensor, draws: Draws) -> Tensor:
    """The highest gate first, whatever its slot or position (order-probability): [T·K]."""
    return torch.sort(gate_TK.flatten(), descending=True, stable=True).indices


def _rounds(token_N: Tensor, slots: int) -> Tensor:
    # Slot by slot, the tokens of each round in the given order.
    return (token_N * slots + torch.arange(slots, device=token_N.device)[:, None]).flatten()


def batch_prioritized(gate_TK: Tensor, draws: Draws) -> Tensor:
    """All first choices, then all second ones, …, each round in order of the tokens' highest gate (order-batch-prioritized): [T·K]."""
    return _rounds(torch.sort(gate_TK.amax(1), descending=True, stable=True).indices, gate_TK.shape[1])


def in_random_order(gate_TK: Tensor, draws: Draws) -> Tensor:
    """All first choices, then all second ones, …, the tokens of each round in one random order, in training (order-random): [T·K]."""
    return _rounds(torch.sort(draws.uniform("order", gate_TK.shape[:1], gate_TK), stable=True).indices, gate_TK.shape[1])


ORDERS: dict[str, Callable[[Tensor, Draws], Tensor]] = {
    "choice_major": choice_major,
    "token_major": token_major,
    "probability": by_probability,
    "batch_prioritized": batch_prioritized,
    "random": in_random_order,
}


def queue_order(gate_TK: Tensor, order: str, draws: Draws, *, training: bool) -> Tensor:
    """Assignment ids in the order in which they ask for a slot, [T·K]; gates are those before any drop."""
    in_evaluation = numpy_capacity.ORDERS[order].in_evaluation
    return ORDERS[order if training or in_evaluation is None else in_evaluation](gate_TK, draws)


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


def keep_within_capacity(expert_TK: Tensor, wanted_TK: Tensor, capacity: Tensor, order_N: Tensor, tokens: TokenInfo) -> Tensor:
    """The assignments that find a free slot (keep): expert, wanted [T, K], capacity [B] or [B, E], order [T·K] → [T, K] bool."""
    position_TK = position_in_expert(expert_TK, wanted_TK, tokens.group_T, order_N)
    limit = capacity[tokens.group_T][:, None] if capacity.ndim == 1 else capacity[tokens.group_T[:, None], expert_TK]
    return wanted_TK & (position_TK < limit)


class Placed(NamedTuple):
    """expert_TK and keep_TK after dropped tokens were placed anew, or not."""

    expert_TK: Tensor
    keep_TK: Tensor


def recycle(placed: Placed, wanted_TK: Tensor, capacity: Tensor, config: MoEConfig, tokens: TokenInfo, draws: Draws) -> Placed:
    """The rule config.capacity.recycle on dropped tokens, in training: the reference's own function, on the host."""
    rule = config.capacity.recycle
    if rule == "none":
        return placed
    host = numpy_capacity.Placed(placed.expert_TK.cpu().numpy(), placed.keep_TK.cpu().numpy())
    numbers = HostDraws(draws, tokens.real_T)
    moved = numpy_capacity.RECYCLES[rule](
        host, wanted_TK.cpu().numpy(), capacity.cpu().numpy(), config.experts.count, on_host(tokens), cast(Any, numbers)
    )
    return Placed(*(torch.from_numpy(array).to(wanted_TK.device) for array in moved))
