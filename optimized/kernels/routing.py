"""The router in one kernel: logits → scores → choice → gates, with the load of each block of tokens; and its backward.

Everything is fp32. Score functions, group scores and normalizers are device functions in tables, handed to the kernel at compile time.
"""

# pyright: reportGeneralTypeIssues=false
# To a type checker a device function never returns.

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .activations import sigmoid

NEVER = tl.constexpr(float("-inf"))


@triton.jit
def softmax_scores(logits, inside):
    """(softmax) over the lanes that are inside; 0 elsewhere."""
    peak = tl.max(tl.where(inside, logits, NEVER), 1)
    exp = tl.where(inside, tl.exp(logits - peak[:, None]), 0.0)
    return exp / tl.sum(exp, 1)[:, None]


@triton.jit
def softmax_scores_backward(dscores, scores):
    """dz = s ⊙ (ds − Σ_j ds_j s_j)."""
    return scores * (dscores - tl.sum(dscores * scores, 1)[:, None])


@triton.jit
def sigmoid_scores(logits, inside):
    """(score-sigmoid)."""
    return tl.where(inside, sigmoid(logits), 0.0)


@triton.jit
def sigmoid_scores_backward(dscores, scores):
    """dz = ds ⊙ s ⊙ (1 − s)."""
    return dscores * scores * (1.0 - scores)


@triton.jit
def log1p(z):
    """log(1 + z) for z ≥ 0 without the rounding of 1 + z: log(u) z / (u − 1) with u = 1 + z as it was rounded."""
    u = 1.0 + z
    return tl.where(u == 1.0, z, tl.log(u) * (z / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def sqrt_softplus_scores(logits, inside):
    """(score-sqrt-softplus): s = √log(1 + exp z)."""
    return tl.where(inside, tl.sqrt(tl.maximum(logits, 0.0) + log1p(tl.exp(-tl.abs(logits)))), 0.0)


@triton.jit
def sqrt_softplus_scores_backward(dscores, scores):
    """dz = ds σ(z) / (2 s) with σ(z) = 1 − exp(−s²), by its series where s is small; 0 where s is 0."""
    square = scores * scores
    series = 1.0 - square / 3.0 * (1.0 - square / 4.0 * (1.0 - square / 5.0 * (1.0 - square / 6.0)))
    slope = tl.where(square < 0.25, square * (1.0 - square / 2.0 * series), 1.0 - tl.exp(-square))
    return tl.where(scores > 0, dscores * slope / tl.where(scores > 0, 2.0 * scores, 1.0), 0.0)


@triton.jit
def relu_scores(logits, inside):
    """(score-relu): s = max(z, 0). A NaN stays a NaN."""
    return tl.where(inside, tl.where(logits < 0, 0.0, logits), 0.0)


@triton.jit
def relu_scores_backward(dscores, scores):
    """dz = ds where s > 0."""
    return tl.where(scores > 0, dscores, 0.0)


@triton.jit
def identity_scores(logits, inside):
    """(score-identity)."""
    return tl.where(inside, logits, 0.0)


@triton.jit
def identity_scores_backward(dscores, scores):
    """dz = ds."""
    return dscores


@triton.jit
def plain_gates(chosen, inside, eps):
    """(gate-plain)."""
    return chosen


@triton.jit
def plain_gates_backward(dgate, chosen, inside, eps):
    """ds = dg."""
    return dgate


@triton.jit
def sum_gates(chosen, inside, eps):
    """(gate-sum): g_k = s_k / (Σ_j s_j + eps)."""
    return chosen / (tl.sum(chosen, 1) + eps)[:, None]


@triton.jit
def sum_gates_backward(dgate, chosen, inside, eps):
    """ds = (dg − Σ_j dg_j g_j) / (Σ_j s_j + eps)."""
    total = (tl.sum(chosen, 1) + eps)[:, None]
    return (dgate - tl.sum(dgate * (chosen / total), 1)[:, None]) / total


@triton.jit
def softmax_gates(chosen, inside, eps):
    """(gate-softmax)."""
    return softmax_scores(chosen, inside)


@triton.jit
def softmax_gates_backward(dgate, chosen, inside, eps):
    """ds = g ⊙ (dg − Σ_j dg_j g_j)."""
    return softmax_scores_backward(dgate, softmax_scores(chosen, inside))


@triton.jit
def best_lane(value, open_, lane, LANES: tl.constexpr):
    """(highest value, its lane) of each row among the open lanes, ties to the lowest lane; NaN counts as −∞, no open lane gives LANES."""
    ranked = tl.where(open_ & (value == value), value, NEVER)
    best = tl.max(ranked, 1)
    return best, tl.min(tl.where(open_ & (ranked == best[:, None]), lane[None, :], LANES), 1)


@triton.jit
def group_max(choice, own, lane, LANES: tl.constexpr):
    """(group-max): the best of a group's lanes."""
    best, _ = best_lane(choice, own, lane, LANES)
    return best


@triton.jit
def group_top2_sum(choice, own, lane, LANES: tl.constexpr):
    """(group-top2-sum): the two best of a group's lanes together; a group of one counts its only one."""
    best, at = best_lane(choice, own, lane, LANES)
    others = own & (lane[None, :] != at[:, None])
    second, other = best_lane(choice, others, lane, LANES)
    return tl.where(other < LANES, best + second, best)


@triton.jit
def limit_to_groups(
    choice, open_, lane, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, SIZE: tl.constexpr, GROUP_SCORE: tl.constexpr,
    LANES: tl.constexpr, GROUP_LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """(group-limit): the lanes that stay open, those of each token's TOP_GROUPS best groups of SIZE lanes."""
    group = tl.arange(0, GROUP_LANES)
    score = tl.full((BLOCK, GROUP_LANES), NEVER, tl.float32)
    for g in range(0, GROUPS):
        own = open_ & (lane // SIZE == g)[None, :]
        score = tl.where((group == g)[None, :], GROUP_SCORE(choice, own, lane, LANES)[:, None], score)
    free = tl.zeros((BLOCK, GROUP_LANES), tl.int1) | (group < GROUPS)[None, :]
    chosen = tl.zeros((BLOCK, LANES), tl.int1)
    for _ in range(0, TOP_GROUPS):
        _, best = best_lane(score, free, group, GROUP_LANES)
        chosen = chosen | (lane[None, :] // SIZE == best[:, None])
        free = free & (group[None, :] != best[:, None])
    return open_ & chosen


@triton.jit
def route_kernel(
    LOGITS, CORRECTION_BIAS, REAL, SCORES, EXPERT, GATE, HISTOGRAM, T, E, eps, scale,
    SCORE: tl.constexpr, NORMALIZE: tl.constexpr, GROUP_SCORE: tl.constexpr,
    K: tl.constexpr, GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, GROUP_SIZE: tl.constexpr,
    LANES: tl.constexpr, SLOTS: tl.constexpr, GROUP_LANES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Scores, the K best of scores + correction bias inside the best groups (ties to the lowest id), gates, and each block's load.

    Grid: (⌈T / BLOCK⌉). A program owns BLOCK tokens.
    LOGITS [T, E] fp32, CORRECTION_BIAS [E] fp32 or None, REAL [T] uint8 (0: padding, not counted) → SCORES [T, E] and GATE [T, K] fp32,
    EXPERT [T, K] int64, HISTOGRAM [blocks, LANES] uint8.
    A NaN is never better than a number; K different experts are chosen even where all scores are NaN or −∞.
    Equals: `SCORE_FUNCTIONS[…].forward`, `choose` and `gates_forward` of the reference; `count_load` summed over the blocks.
    Rounds at: every operation in fp32. Limits: K ≤ 16, E ≤ LANES, a power of two; BLOCK < 256.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, LANES)
    slot = tl.arange(0, SLOTS)
    token_inside = token < T
    lane_inside = (lane < E)[None, :]
    in_row = token.to(tl.int64)[:, None] * E + lane[None, :]
    logits = tl.load(LOGITS + in_row, mask=token_inside[:, None] & lane_inside, other=0.0)
    scores = SCORE(logits, lane_inside)
    tl.store(SCORES + in_row, scores, mask=token_inside[:, None] & lane_inside)
    choice = scores
    open_ = tl.zeros((BLOCK, LANES), tl.int1) | lane_inside
    if CORRECTION_BIAS is not None:
        choice += tl.load(CORRECTION_BIAS + lane, mask=lane < E, other=0.0)[None, :]
    if TOP_GROUPS < GROUPS:
        open_ = limit_to_groups(choice, open_, lane, GROUPS, TOP_GROUPS, GROUP_SIZE, GROUP_SCORE, LANES, GROUP_LANES, BLOCK)
    real = tl.load(REAL + token, mask=token_inside, other=0) != 0
    chosen = tl.zeros((BLOCK, SLOTS), tl.float32)
    load = tl.zeros((LANES,), tl.int32)
    for k in tl.static_range(K):
        expert_at = EXPERT + token.to(tl.int64) * K + k
        _, expert = best_lane(choice, open_, lane, LANES)
        tl.store(expert_at, expert.to(tl.int64), mask=token_inside)
        own = lane[None, :] == expert[:, None]
        open_ = open_ & (lane[None, :] != expert[:, None])
        score = tl.sum(tl.where(own, scores, 0.0), 1)
        chosen = tl.where((slot == k)[None, :], score[:, None], chosen)
        load += tl.sum((own & real[:, None]).to(tl.int32), 0)
    slot_inside = (slot < K)[None, :]
    gate = NORMALIZE(chosen, slot_inside, eps) * scale
    tl.store(GATE + token.to(tl.int64)[:, None] * K + slot[None, :], gate, mask=token_inside[:, None] & slot_inside)
    tl.store(HISTOGRAM + tl.program_id(0).to(tl.int64) * LANES + lane, load)


@triton.jit
def route_backward_kernel(
    DSCORES, DGATE, SCORES, EXPERT, DLOGITS, T, E, eps, scale,
    SCORE_BACKWARD: tl.constexpr, NORMALIZE_BACKWARD: tl.constexpr,
    K: tl.constexpr, LANES: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dlogits from the cotangents of scores and gates; choices have no gradient.

    Grid: (⌈T / BLOCK⌉). A program owns BLOCK tokens.
    DSCORES [T, E] fp32 or None, DGATE [T, K] fp32 or None, SCORES [T, E] fp32, EXPERT [T, K] int64 → DLOGITS [T, E] fp32.
    Equals: `gates_backward`, then `SCORE_FUNCTIONS[…].backward` of the reference.
    Rounds at: every operation in fp32. Limits: those of `route_kernel`; a token's experts differ from each other.
    """
    token = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    lane = tl.arange(0, LANES)
    slot = tl.arange(0, SLOTS)
    token_inside = token < T
    inside = token_inside[:, None] & (lane < E)[None, :]
    in_row = token.to(tl.int64)[:, None] * E + lane[None, :]
    scores = tl.load(SCORES + in_row, mask=inside, other=0.0)
    dscores = tl.zeros((BLOCK, LANES), tl.float32)
    if DSCORES is not None:
        dscores += tl.load(DSCORES + in_row, mask=inside, other=0.0)
    if DGATE is not None:
        slot_inside = token_inside[:, None] & (slot < K)[None, :]
        at = token.to(tl.int64)[:, None] * K + slot[None, :]
        dgate = tl.load(DGATE + at, mask=slot_inside, other=0.0) * scale
        expert = tl.load(EXPERT + at, mask=slot_inside, other=0)
        chosen_at = SCORES + token.to(tl.int64)[:, None] * E + expert
        chosen = tl.load(chosen_at, mask=slot_inside & (expert >= 0) & (expert < E), other=0.0)
        chosen = tl.where(token_inside[:, None], chosen, 1.0)  # or what no token owns would be divided by 0
        dchosen = NORMALIZE_BACKWARD(dgate, chosen, (slot < K)[None, :], eps)
        for k in tl.static_range(K):
            own = (slot == k)[None, :]
            number = tl.sum(tl.where(own, expert, 0), 1).to(tl.int32)
            dscores += tl.where(lane[None, :] == number[:, None], tl.sum(tl.where(own, dchosen, 0.0), 1)[:, None], 0.0)
    tl.store(DLOGITS + in_row, SCORE_BACKWARD(dscores, scores), mask=inside)


class Pair(NamedTuple):
    """A device function and its backward."""

    forward: Any
    backward: Any


SCORES: dict[str, Pair] = {
    "softmax": Pair(softmax_scores, softmax_scores_backward),
    "sigmoid": Pair(sigmoid_scores, sigmoid_scores_backward),
    "sqrt_softplus": Pair(sqrt_softplus_scores, sqrt_softplus_scores_backward),
    "relu": Pair(relu_scores, relu_scores_backward),
    "identity": Pair(identity_scores, identity_scores_backward),
}
NORMALIZERS: dict[str, Pair] = {
    "none": Pair(plain_gates, plain_gates_backward),
    "sum": Pair(sum_gates, sum_gates_backward),
    "softmax": Pair(softmax_gates, softmax_gates_backward),
}
GROUP_SCORES: dict[str, Any] = {"max": group_max, "top2_sum": group_top2_sum}
