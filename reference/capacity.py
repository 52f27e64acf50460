"""expert_TK → keep_TK: how many tokens an expert accepts, and which of them are dropped."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

from .config import CapacityConfig, MoEConfig
from .tokens import Draws, TokenInfo


def no_limit(factor: float, top_k: int, tokens: int, experts: int | Fraction) -> int:
    """Dropless (capacity-none): an expert can hold every token of the group."""
    return tokens


def per_assignment(factor: float, top_k: int, tokens: int, experts: int | Fraction) -> int:
    """Slots in proportion to the assignments (capacity-per-assignment): C = ⌈factor · K · S / E⌉; factor 1 holds all of an even load.

    Source: GShard, §2.2 (2S/E with K = 2); DeepSpeed, Megatron-LM, MegaBlocks, Tutel.
    """
    return math.ceil(_exact(factor) * top_k * tokens / experts)


def per_token(factor: float, top_k: int, tokens: int, experts: int | Fraction) -> int:
    """Slots in proportion to the tokens (capacity-per-token): C = ⌈factor · S / E⌉, whatever K is.

    Source: Switch Transformer, eq. 3 (there K = 1); mesh-tensorflow, flaxformer.
    Deviates: mesh-tensorflow rounds down and flaxformer to the nearest; the ceiling never drops from an even load at factor 1.
    """
    return math.ceil(_exact(factor) * tokens / experts)


def _exact(factor: float) -> Fraction:
    # The decimal that was written, not its binary neighbour: 0.1 · 30 must not round up to 4 slots.
    return Fraction(repr(float(factor)))


FORMULAS: dict[str, Callable[[float, int, int, Any], int]] = {
    "none": no_limit,
    "per_assignment": per_assignment,
    "per_token": per_token,
}
"""What `CapacityConfig.formula` can name: (factor, K, tokens of the group, experts) → slots of an expert."""


def group_capacity(config: CapacityConfig, top_k: int, experts: int | Fraction, tokens: TokenInfo, *, training: bool) -> np.ndarray:
    """Slots per expert in each group, [B] int64: the formula on the group's real tokens, at least the minimum.

    Deviates: GShard counts padding into the group's size S, since its shapes are static; here padding changes nothing.
    """
    factor = config.factor if training or config.eval_factor is None else config.eval_factor
    formula = FORMULAS[config.formula]
    return np.array([max(config.minimum, formula(factor, top_k, int(s), experts)) for s in tokens.real_per_group()], np.int64)


def expert_capacity(config: MoEConfig, tokens: TokenInfo, *, training: bool) -> np.ndarray:
    """Slots of each group's experts: [B] where all have the same number, else [B, E] (capacity-heterogeneous).

    Where a network gets τ of what a zero-computation expert gets: its C is the formula's for (τN + Z)/τ experts, the others' for τN + Z.
    Source: Jin et al. 2024 (MoE++), eq. 8.
    Deviates: with that equation's T tokens there is no room for K = 2 choices of each; with the formula "per_assignment" T is K S.
    """
    experts, share = config.experts, _exact(config.experts.network_share)
    if share == 1:
        return group_capacity(config.capacity, config.gating.top_k, experts.count, tokens, training=training)
    parts = share * experts.networks + experts.count - experts.networks
    network_B, other_B = (
        group_capacity(config.capacity, config.gating.top_k, equal, tokens, training=training) for equal in (parts / share, parts)
    )
    return np.where(np.arange(experts.count) < experts.networks, network_B[:, None], other_B[:, None])


def choice_major(gate_TK: np.ndarray, draws: Draws) -> np.ndarray:
    """All first choices in order of position, then all second ones, … (order-choice-major): assignment ids t·K + k, [T·K].

    Source: GShard, algorithm 1; mesh-tensorflow, flaxformer, Tutel.
    """
    tokens, slots = gate_TK.shape
    return np.arange(tokens * slots).reshape(tokens, slots).T.ravel()


def token_major(gate_TK: np.ndarray, draws: Draws) -> np.ndarray:
    """Tokens in order of position, each with all its choices (order-token-major): [T·K]. Source: MegaBlocks."""
    return np.arange(gate_TK.size)


def by_probability(gate_TK: np.ndarray, draws: Draws) -> np.ndarray:
    """The highest gate first, whatever its slot or position (order-probability): [T·K]; ties by position.

    Not causal: whether a token is dropped depends on later ones.
    Source: Megatron-LM's drop policy `probs`; DeepSpeed's topkgating.
    """
    return np.argsort(-gate_TK.ravel(), kind="stable")


def batch_prioritized(gate_TK: np.ndarray, draws: Draws) -> np.ndarray:
    """All first choices, then all second ones, …, each round in order of the tokens' highest gate (order-batch-prioritized): [T·K].

    Not causal, like `by_probability`.
    Source: Riquelme et al. 2021 (V-MoE), batch prioritized routing.
    """
    slots = gate_TK.shape[1]
    best_first = np.argsort(-gate_TK.max(1, initial=-np.inf), kind="stable")
    return (best_first * slots + np.arange(slots)[:, None]).ravel()


def in_random_order(gate_TK: np.ndarray, draws: Draws) -> np.ndarray:
    """All first choices, then all second ones, …, the tokens of each round in one random order, in training (order-random): [T·K].

    Source: Kim et al. 2021 (multitask multilingual MoE, arXiv 2109.10465), random token selection; DeepSpeed, there for K = 1.
    Deviates: DeepSpeed draws in evaluation too, so that its output is not a function of its input.
    """
    slots = gate_TK.shape[1]
    shuffled = np.argsort(draws.uniform("order", (len(gate_TK),)), kind="stable")
    return (shuffled * slots + np.arange(slots)[:, None]).ravel()


class Order(NamedTuple):
    """queue: (gate [T, K], draws) → assignment ids, who comes first; in_evaluation: the order there, where nothing may be drawn."""

    queue: Callable[[np.ndarray, Draws], np.ndarray]
    in_evaluation: str | None = None


ORDERS: dict[str, Order] = {
    "choice_major": Order(choice_major),
    "token_major": Order(token_major),
    "probability": Order(by_probability),
    "batch_prioritized": Order(batch_prioritized),
    "random": Order(in_random_order, in_evaluation="choice_major"),
}
"""What `CapacityConfig.order` can name."""


def queue_order(gate_TK: np.ndarray, order: str, draws: Draws, *, training: bool) -> np.ndarray:
    """Assignment ids in the order in which they ask for a slot, [T·K]; gates are those before any drop."""
    row = ORDERS[order]
    return (row if training or row.in_evaluation is None else ORDERS[row.in_evaluation]).queue(gate_TK, draws)


def position_in_expert(expert_TK: np.ndarray, wanted_TK: np.ndarray, group_T: np.ndarray, order_N: np.ndarray) -> np.ndarray:
    """How many wanted assignments to the same expert of the same group come earlier in the order (position): [T, K] int64.

    Unwanted assignments (padding, rejected second choices) take no position; theirs is 0 and means nothing.
    """
    expert_N, wanted_N = expert_TK.ravel(), wanted_TK.ravel()
    group_N = np.repeat(group_T, expert_TK.shape[1])
    queue = order_N[wanted_N[order_N]]
    bucket = group_N[queue] * (1 + expert_N.max(initial=0)) + expert_N[queue]
    by_bucket = np.argsort(bucket, kind="stable")
    start = np.searchsorted(bucket[by_bucket], bucket)
    rank = np.empty_like(by_bucket)
    rank[by_bucket] = np.arange(len(by_bucket))
    position_N = np.zeros(expert_N.shape, np.int64)
    position_N[queue] = rank - start
    return position_N.reshape(expert_TK.shape)


def keep_within_capacity(
    expert_TK: np.ndarray, wanted_TK: np.ndarray, capacity: np.ndarray, order_N: np.ndarray, tokens: TokenInfo
) -> np.ndarray:
    """The assignments that find a free slot (keep): wanted and position < C of the token's group.

    Shapes: expert, wanted [T, K]; capacity [B] or [B, E], slots per expert; order [T·K] from `queue_order` → keep [T, K] bool.
    Gradient: none. A dropped assignment has weight 0; the token lives on in the residual stream.
    Source: GShard, algorithm 1; Switch Transformer, §2.2.
    """
    position_TK = position_in_expert(expert_TK, wanted_TK, tokens.group_T, order_N)
    if not len(capacity):
        return wanted_TK
    limit = capacity[tokens.group_T][:, None] if capacity.ndim == 1 else capacity[tokens.group_T[:, None], expert_TK]
    return wanted_TK & (position_TK < limit)


class Placed(NamedTuple):
    """expert_TK and keep_TK after dropped tokens were placed anew, or not."""

    expert_TK: np.ndarray
    keep_TK: np.ndarray


def drop_for_good(placed: Placed, wanted_TK: np.ndarray, capacity: np.ndarray, experts: int, tokens: TokenInfo, draws: Draws) -> Placed:
    """What found no slot stays dropped."""
    return placed


def recycle_at_random(placed: Placed, wanted_TK: np.ndarray, capacity: np.ndarray, experts: int, tokens: TokenInfo, draws: Draws) -> Placed:
    """Dropped tokens take free slots of other experts at random, in training (recycle): K = 1.

    In order of position, each takes slot ⌊r_t · n⌋ of the n that are still free in its group, listed by expert; r_t ~ U(0, 1).
    Shapes: expert, keep, wanted [T, 1] → the same; the gate is then the new expert's. Load and losses see the router's own choice.
    Source: Hunyuan-Large (Sun et al. 2024), recycle routing.
    Deviates: its released code hands out a shuffled list of the free slots, the same distribution, over the batch and in evaluation too.
    """
    expert_TK, keep_TK = placed.expert_TK.copy(), placed.keep_TK.copy()
    uniform_T = draws.uniform("recycle", (len(expert_TK),))
    for group, slots in enumerate(capacity):
        own = tokens.group_T == group
        room_E = slots - np.bincount(expert_TK[own & keep_TK[:, 0], 0], minlength=experts)
        free = np.repeat(np.arange(experts), np.maximum(room_E, 0)).tolist()
        for token in np.flatnonzero(own & wanted_TK[:, 0] & ~keep_TK[:, 0])[: len(free)]:
            expert_TK[token, 0] = free.pop(int(float(uniform_T[token]) * len(free)))
            keep_TK[token, 0] = True
    return Placed(expert_TK, keep_TK)


RECYCLES: dict[str, Callable[[Placed, np.ndarray, np.ndarray, int, TokenInfo, Draws], Placed]] = {
    "none": drop_for_good,
    "random": recycle_at_random,
}
"""What `CapacityConfig.recycle` can name: (placed, wanted [T, K], capacity, experts, tokens, draws) → placed."""
