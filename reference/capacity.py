"""expert_TK → keep_TK: how many tokens an expert accepts, and which of them are dropped."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np

from .config import CapacityConfig
from .tokens import TokenInfo


def no_limit(factor: float, top_k: int, tokens: int, experts: int) -> int:
    """Dropless (capacity-none): an expert can hold every token of the group."""
    return tokens


def per_assignment(factor: float, top_k: int, tokens: int, experts: int) -> int:
    """C = ⌈factor · K · S / E⌉ (capacity-per-assignment): factor 1 holds all assignments of an even load.

    Source: GShard, §2.2 (2S/E with K = 2); DeepSpeed, Megatron-LM, MegaBlocks, Tutel.
    """
    return math.ceil(_exact(factor) * top_k * tokens / experts)


def per_token(factor: float, top_k: int, tokens: int, experts: int) -> int:
    """C = ⌈factor · S / E⌉, whatever K is (capacity-per-token).

    Source: Switch Transformer, eq. 3 (there K = 1); mesh-tensorflow, flaxformer.
    Deviates: mesh-tensorflow rounds down and flaxformer to the nearest; the ceiling never drops from an even load at factor 1.
    """
    return math.ceil(_exact(factor) * tokens / experts)


def _exact(factor: float) -> Fraction:
    # The decimal that was written, not its binary neighbour: 0.1 · 30 must not round up to 4 slots.
    return Fraction(repr(float(factor)))


FORMULAS: dict[str, Callable[[float, int, int, int], int]] = {
    "none": no_limit,
    "per_assignment": per_assignment,
    "per_token": per_token,
}


def group_capacity(config: CapacityConfig, top_k: int, experts: int, tokens: TokenInfo, *, training: bool) -> np.ndarray:
    """Slots per expert in each group, [B] int64: the formula on the group's real tokens, at least the minimum.

    Deviates: GShard counts padding into the group's size S, since its shapes are static; here padding changes nothing.
    """
    factor = config.factor if training or config.eval_factor is None else config.eval_factor
    formula = FORMULAS[config.formula]
    return np.array([max(config.minimum, formula(factor, top_k, int(s), experts)) for s in tokens.real_per_group()], np.int64)


def choice_major(gate_TK: np.ndarray) -> np.ndarray:
    """All first choices in order of position, then all second ones, … (order-choice-major): assignment ids t·K + k, [T·K].

    Source: GShard, algorithm 1; mesh-tensorflow, flaxformer, Tutel.
    """
    tokens, slots = gate_TK.shape
    return np.arange(tokens * slots).reshape(tokens, slots).T.ravel()


def token_major(gate_TK: np.ndarray) -> np.ndarray:
    """Tokens in order of position, each with all its choices (order-token-major): [T·K]. Source: MegaBlocks."""
    return np.arange(gate_TK.size)


ORDERS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"choice_major": choice_major, "token_major": token_major}


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
    expert_TK: np.ndarray, gate_TK: np.ndarray, wanted_TK: np.ndarray, capacity: np.ndarray, order: str, tokens: TokenInfo
) -> np.ndarray:
    """The assignments that find a free slot (keep): wanted and position < C of the token's group.

    Shapes: expert, gate, wanted [T, K]; capacity [B] slots per expert and group → keep [T, K] bool.
    Gradient: none. A dropped assignment has weight 0; the token lives on in the residual stream.
    Source: GShard, algorithm 1; Switch Transformer, §2.2.
    """
    order_N = ORDERS[order](gate_TK)
    position_TK = position_in_expert(expert_TK, wanted_TK, tokens.group_T, order_N)
    limit = capacity[tokens.group_T][:, None] if len(capacity) else np.zeros((0, 1), np.int64)
    return wanted_TK & (position_TK < limit)
