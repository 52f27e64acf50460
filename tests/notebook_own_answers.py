"""Wrong answers of learners that are no usual mistake: what the checker must say about how they differ, derived from the numbers."""

from __future__ import annotations

import numpy as np
from notebook_answers import bits_of, joint_of, of_source, rows_of

Arrays = tuple[np.ndarray, ...]


def keeps_by_column(expert_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    return of_source("01", "SOLUTION")(expert_TK, experts, capacity).T


def serves_the_last_token_first(expert_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    return of_source("01", "SOLUTION")(expert_TK[::-1], experts, capacity)[::-1]


def drops_all_of_a_full_expert(expert_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    return np.bincount(expert_TK.ravel(), minlength=experts)[expert_TK] <= capacity


def lists_experts_by_number(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> Arrays:
    expert_TK = np.sort(np.argsort(-(scores_TE + bias_E), axis=1, kind="stable")[:, :count], axis=1)
    chosen_TK = np.take_along_axis(scores_TE, expert_TK, axis=1)
    return expert_TK, scale * chosen_TK / chosen_TK.sum(1, keepdims=True)


def takes_the_worst(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> Arrays:
    expert_TK = np.argsort(scores_TE + bias_E, axis=1, kind="stable")[:, :count]
    chosen_TK = np.take_along_axis(scores_TE, expert_TK, axis=1)
    return expert_TK, scale * chosen_TK / chosen_TK.sum(1, keepdims=True)


def turns_the_sign(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    return -of_source("03", "SOLUTION")(dgate_TK, logits_TE, expert_TK)


def multiplies_by_the_total(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    return of_source("03", "SOLUTION", ("keepdims=True)) / total", "keepdims=True)) * total"))(dgate_TK, logits_TE, expert_TK)


def divides_the_loss_by_tokens_twice(scores_TE: np.ndarray, expert_TK: np.ndarray) -> Arrays:
    loss, gradient_TE = of_source("04", "SOLUTION")(scores_TE, expert_TK)
    return loss / len(scores_TE), gradient_TE


def gradient_of_the_load(scores_TE: np.ndarray, expert_TK: np.ndarray) -> Arrays:
    loss, gradient_TE = of_source("04", "SOLUTION")(scores_TE, expert_TK)
    return loss, -gradient_TE


def reshapes_without_turning_back(expert_TK: np.ndarray, real_T: np.ndarray) -> np.ndarray:
    queue_N, real_N = expert_TK.T.ravel(), np.tile(real_T, expert_TK.shape[1])
    own_NE = np.eye(expert_TK.max() + 1, dtype=int)[queue_N] * real_N[:, None]
    return ((np.cumsum(own_NE, axis=0) - own_NE) * own_NE).sum(1).reshape(expert_TK.shape)


def counts_from_the_end(expert_TK: np.ndarray, real_T: np.ndarray) -> np.ndarray:
    return of_source("05", "SOLUTION")(expert_TK[::-1], real_T[::-1])[::-1]


def puts_padding_at_minus_one(expert_TK: np.ndarray, real_T: np.ndarray) -> np.ndarray:
    return np.where(real_T[:, None], of_source("05", "SOLUTION")(expert_TK, real_T), -1)


def forgets_the_old_bias(bias_E: np.ndarray, load_RE: np.ndarray, rate: float) -> np.ndarray:
    return of_source("06", "SOLUTION")(np.zeros_like(bias_E), load_RE, rate)


def steps_twice_as_far(bias_E: np.ndarray, load_RE: np.ndarray, rate: float) -> np.ndarray:
    return of_source("06", "SOLUTION")(bias_E, load_RE, 2 * rate)


def steps_past_the_mean(bias_E: np.ndarray, load_RE: np.ndarray, rate: float) -> np.ndarray:
    load_E = load_RE.sum(0)
    return bias_E + rate * np.sign(np.median(load_E) - load_E)


def logarithm_to_ten(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    return bits_of(joint_of(expert_TK, label_T), np.log10)


def counted_for_each_token(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    return bits_of(joint_of(expert_TK, label_T)) * expert_TK.shape[1]


def entropy_of_the_expert(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    share_E = joint_of(expert_TK, label_T).sum(0)
    return float(-(share_E[share_E > 0] * np.log2(share_E[share_E > 0])).sum())


def sorts_by_token(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> Arrays:
    token_N, slot_N = np.nonzero(keep_TK)
    return token_N, slot_N, rows_of(token_N, slot_N, expert_TK, experts)[2]


def bounds_begin_late(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> Arrays:
    token_N, slot_N, bounds_P = rows_of(*np.nonzero(keep_TK), expert_TK, experts)
    return token_N, slot_N, np.concatenate([[0], bounds_P[:-1]])


def reads_the_matrix_across(*given: np.ndarray) -> np.ndarray:
    rows_ND, weight_EDF, bounds_P = given
    return of_source("09", "SOLUTION")(rows_ND, np.ascontiguousarray(np.flip(weight_EDF, 2)), bounds_P)


def stores_half(*given: np.ndarray) -> np.ndarray:
    return of_source("09", "SOLUTION", ("out_at, total,", "out_at, total * 0.5,"))(*given)


OWN = [
    ("keep", keeps_by_column, "on all inputs where keep differs: it is the reference's, transposed"),
    ("keep", serves_the_last_token_first, "keep: 2 of 8 differ (tokens 0, 3; choice 1)"),
    ("keep", drops_all_of_a_full_expert, "at the wrong places, yours is always False"),
    ("gates", lists_experts_by_number, "each row has the right numbers, in another order"),
    ("gates", takes_the_worst, "expert: 14 of 14 differ (every token; every choice)"),
    ("router_backward", turns_the_sign, "the sign is turned"),
    ("router_backward", multiplies_by_the_total, "each row is the reference's times a constant of its own: 0.7709, 0.9119"),
    ("balance", divides_the_loss_by_tokens_twice, "loss differs: yours is the reference's divided by T (12, 9, 9, …"),
    ("balance", gradient_of_the_load, "dscores differs: the sign is turned"),
    ("positions", reshapes_without_turning_back, "the numbers are right, in other places"),
    ("positions", counts_from_the_end, "position: 16 of 20 differ (9 of 10 tokens: 0, 1, 2, …; every choice)"),
    ("positions", puts_padding_at_minus_one, "at the wrong places, yours minus the reference's is always -1"),
    ("bias_step", forgets_the_old_bias, "what yours has too little is exactly bias_E"),
    ("bias_step", steps_twice_as_far, "bias: 2 of 3 differ (experts 0, 2)"),
    ("bias_step", steps_past_the_mean, "  expert 2: yours 0.0   reference 0.5"),
    ("information", logarithm_to_ten, "yours is always 0.301 times the reference's"),
    ("information", counted_for_each_token, "yours is always 2 times the reference's"),
    ("information", entropy_of_the_expert, "bits: differs\n  yours 2.2207   reference 0.1626"),
    ("sort_rows", sorts_by_token, "token differs: the numbers are right, in another order"),
    ("sort_rows", bounds_begin_late, "bounds differs: it is the reference's, moved down by one place"),
    ("grouped_product", reads_the_matrix_across, "it is the reference's, every row from right to left"),
    ("grouped_product", stores_half, "yours is always 0.5 times the reference's"),
]
"""(exercise, answer, words of what is said about it)."""
