"""Wrong answers to the notebooks' exercises, written as a learner would write them, each with words of the hint that it must get."""

from __future__ import annotations

import linecache
from collections.abc import Callable
from typing import Any

import numpy as np

from notebooks import build
from notebooks.exercises.grouped_product import launched
from reference.proof.equal import round_to
from reference.proof.museum_capacity import second_choices_from_zero
from reference.proof.museum_gates import unstable_top_k

SOURCES = {source.name[:2]: source for source in build.sources()}
EXERCISE_OF = {
    "01": ("keep", "keep"),
    "02": ("gates", "gates_of_v3"),
    "03": ("router_backward", "router_backward"),
    "04": ("balance", "balance"),
    "05": ("positions", "positions"),
    "06": ("bias_step", "bias_step"),
    "07": ("information", "information"),
    "08": ("sort_rows", "sort_rows"),
    "09": ("grouped_product", "grouped_kernel"),
}
"""Notebook → the exercise and the name of the learner's function."""


def of_source(number: str, tag: str, *replaced: tuple[str, str]) -> Callable:
    """The answer in a source's cell of this tag, defined as the notebook would define it; `replaced`: (old, new) pieces of its text."""
    cells = build.parse(SOURCES[number].read_text(encoding="utf-8"))
    imports = next(cell.text for cell in cells if cell.tag == "")
    names: dict[str, Any] = {}
    exec("\n".join(line for line in imports.splitlines() if line.startswith(("import ", "from "))), names)
    text = next(cell.text for cell in cells if cell.tag == tag) + "\n"
    for old, new in replaced:
        assert old in text, old
        text = text.replace(old, new)
    place = f"<{number} {tag} {hash(replaced)}>"
    linecache.cache[place] = (len(text), None, text.splitlines(keepends=True), place)  # Triton reads a kernel's source
    exec(compile(text, place, "exec"), names)
    answer = names[EXERCISE_OF[number][1]]
    return launched(answer) if number == "09" else answer


def token_after_token(expert_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    keep_TK, accepted = np.zeros(expert_TK.shape, bool), [0] * experts
    for token, slot in np.ndindex(expert_TK.shape):
        keep_TK[token, slot] = accepted[expert_TK[token, slot]] < capacity
        accepted[expert_TK[token, slot]] += 1
    return keep_TK


def one_too_many(expert_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    keep_TK, accepted = np.zeros(expert_TK.shape, bool), [0] * experts
    for slot, token in np.ndindex(expert_TK.T.shape):
        keep_TK[token, slot] = accepted[expert_TK[token, slot]] <= capacity
        accepted[expert_TK[token, slot]] += 1
    return keep_TK


def each_choice_by_itself(expert_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    return second_choices_from_zero(expert_TK, capacity)


def drops_the_whole_token(expert_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    keep_TK, accepted = np.ones(expert_TK.shape, bool), [0] * experts
    for slot, token in np.ndindex(expert_TK.T.shape):
        if accepted[expert_TK[token, slot]] == capacity:
            keep_TK[token] = False
        else:
            accepted[expert_TK[token, slot]] += 1
    return keep_TK


def weighed_by_biased_scores(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    biased_TE = scores_TE + bias_E
    expert_TK = np.argsort(-biased_TE, axis=1, kind="stable")[:, :count]
    chosen_TK = np.take_along_axis(biased_TE, expert_TK, axis=1)
    return expert_TK, scale * chosen_TK / chosen_TK.sum(1, keepdims=True)


def scaled_before_the_sum(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    expert_TK = np.argsort(-(scores_TE + bias_E), axis=1, kind="stable")[:, :count]
    chosen_TK = scale * np.take_along_axis(scores_TE, expert_TK, axis=1)
    return expert_TK, chosen_TK / chosen_TK.sum(1, keepdims=True)


def reversed_sort(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    expert_TK = unstable_top_k(scores_TE + bias_E, count)
    chosen_TK = np.take_along_axis(scores_TE, expert_TK, axis=1)
    return expert_TK, scale * chosen_TK / chosen_TK.sum(1, keepdims=True)


def divides_by_the_sum_of_all(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    expert_TK, _ = of_source("02", "SOLUTION")(scores_TE, bias_E, count, scale)
    chosen_TK = np.take_along_axis(scores_TE, expert_TK, axis=1)
    return expert_TK, scale * chosen_TK / scores_TE.sum(1, keepdims=True)


def softmax_of_the_chosen(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    expert_TK = np.argsort(-(scores_TE + bias_E), axis=1, kind="stable")[:, :count]
    return expert_TK, scale * softmax_of(np.take_along_axis(scores_TE, expert_TK, axis=1))


def softmax_of(logits_TE: np.ndarray) -> np.ndarray:
    exp_TE = np.exp(logits_TE)
    return exp_TE / exp_TE.sum(1, keepdims=True)


def dscores_of(dgate_TK: np.ndarray, scores_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    chosen_TK = np.take_along_axis(scores_TE, expert_TK, axis=1)
    total = chosen_TK.sum(1, keepdims=True)
    dscores_TE = np.zeros_like(scores_TE)
    np.put_along_axis(dscores_TE, expert_TK, (dgate_TK - (dgate_TK * chosen_TK / total).sum(1, keepdims=True)) / total, axis=1)
    return dscores_TE


def sum_is_a_constant(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    scores_TE = softmax_of(logits_TE)
    total = np.take_along_axis(scores_TE, expert_TK, axis=1).sum(1, keepdims=True)
    dscores_TE = np.zeros_like(scores_TE)
    np.put_along_axis(dscores_TE, expert_TK, dgate_TK / total, axis=1)
    return scores_TE * (dscores_TE - (dscores_TE * scores_TE).sum(1, keepdims=True))


def forgets_to_divide(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    scores_TE = softmax_of(logits_TE)
    dscores_TE = np.zeros_like(scores_TE)
    np.put_along_axis(dscores_TE, expert_TK, dgate_TK, axis=1)
    return scores_TE * (dscores_TE - (dscores_TE * scores_TE).sum(1, keepdims=True))


def forgets_to_divide_by_the_total(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    return of_source("03", "SOLUTION", (".sum(1, keepdims=True)) / total", ".sum(1, keepdims=True))"))(dgate_TK, logits_TE, expert_TK)


def stops_at_the_scores(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    return dscores_of(dgate_TK, softmax_of(logits_TE), expert_TK)


def diagonal_only(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    scores_TE = softmax_of(logits_TE)
    return dscores_of(dgate_TK, scores_TE, expert_TK) * scores_TE * (1 - scores_TE)


def balance_of(share_E: np.ndarray, scores_TE: np.ndarray) -> tuple[float, np.ndarray]:
    experts = scores_TE.shape[1]
    return experts * (share_E * scores_TE.mean(0)).sum(), np.broadcast_to(experts * share_E / len(scores_TE), scores_TE.shape)


def counted_per_token(scores_TE: np.ndarray, expert_TK: np.ndarray) -> tuple[float, np.ndarray]:
    return balance_of(np.bincount(expert_TK.ravel(), minlength=scores_TE.shape[1]) / len(expert_TK), scores_TE)


def mean_of_the_chosen(scores_TE: np.ndarray, expert_TK: np.ndarray) -> tuple[float, np.ndarray]:
    chosen_TE = np.zeros_like(scores_TE)
    np.put_along_axis(chosen_TE, expert_TK, 1, axis=1)
    loss, gradient = balance_of(np.bincount(expert_TK.ravel(), minlength=scores_TE.shape[1]) / expert_TK.size, scores_TE * chosen_TE)
    return loss, gradient * chosen_TE


def softmax_once_more(scores_TE: np.ndarray, expert_TK: np.ndarray) -> tuple[float, np.ndarray]:
    return balance_of(np.bincount(expert_TK.ravel(), minlength=scores_TE.shape[1]) / expert_TK.size, softmax_of(scores_TE))


def means_for_counts(scores_TE: np.ndarray, expert_TK: np.ndarray) -> tuple[float, np.ndarray]:
    mean_E = scores_TE.mean(0)
    return len(mean_E) * (mean_E @ mean_E), np.tile(2 * len(mean_E) * mean_E / len(scores_TE), (len(scores_TE), 1))


def only_the_first_choice(scores_TE: np.ndarray, expert_TK: np.ndarray) -> tuple[float, np.ndarray]:
    return balance_of(np.bincount(expert_TK[:, 0], minlength=scores_TE.shape[1]) / len(expert_TK), scores_TE)


def padding_is_masked_afterwards(expert_TK: np.ndarray, real_T: np.ndarray) -> np.ndarray:
    queue_N = expert_TK.T.ravel()
    own_NE = np.eye(expert_TK.max() + 1, dtype=int)[queue_N]
    position_TK = ((np.cumsum(own_NE, axis=0) - own_NE) * own_NE).sum(1).reshape(expert_TK.shape[::-1]).T
    return np.where(real_T[:, None], position_TK, 0)


def queue_of(expert_N: np.ndarray, real_N: np.ndarray, axis: int = 0) -> np.ndarray:
    own_NE = np.eye(expert_N.max() + 1, dtype=int)[expert_N] * real_N[:, None]
    return (np.cumsum(own_NE, axis=axis) * own_NE).sum(1)


def each_slot_by_itself(expert_TK: np.ndarray, real_T: np.ndarray) -> np.ndarray:
    return np.stack([queue_of(column, real_T) - real_T for column in expert_TK.T], axis=1)


def sums_along_the_experts(expert_TK: np.ndarray, real_T: np.ndarray) -> np.ndarray:
    real_N = np.tile(real_T, expert_TK.shape[1])
    return (queue_of(expert_TK.T.ravel(), real_N, axis=1) - real_N).reshape(expert_TK.shape[::-1]).T


def counts_itself(expert_TK: np.ndarray, real_T: np.ndarray) -> np.ndarray:
    return queue_of(expert_TK.T.ravel(), np.tile(real_T, expert_TK.shape[1])).reshape(expert_TK.shape[::-1]).T


def flattens_by_token(expert_TK: np.ndarray, real_T: np.ndarray) -> np.ndarray:
    real_N = np.repeat(real_T, expert_TK.shape[1])
    return (queue_of(expert_TK.ravel(), real_N) - real_N).reshape(expert_TK.shape)


def sign_of_each_rank(bias_E: np.ndarray, load_RE: np.ndarray, rate: float) -> np.ndarray:
    return bias_E + rate * np.sign(load_RE.mean(1, keepdims=True) - load_RE).sum(0)


def raises_the_busy(bias_E: np.ndarray, load_RE: np.ndarray, rate: float) -> np.ndarray:
    load_E = load_RE.sum(0)
    return bias_E + rate * np.sign(load_E - load_E.mean())


def in_bfloat16(bias_E: np.ndarray, load_RE: np.ndarray, rate: float) -> np.ndarray:
    load_E = load_RE.sum(0)
    return round_to(bias_E + rate * np.sign(load_E.mean() - load_E), "bfloat16")


def mean_of_one_rank(bias_E: np.ndarray, load_RE: np.ndarray, rate: float) -> np.ndarray:
    return bias_E + rate * np.sign(load_RE.mean() - load_RE.sum(0))


def up_or_down(bias_E: np.ndarray, load_RE: np.ndarray, rate: float) -> np.ndarray:
    load_E = load_RE.sum(0)
    return np.where(load_E < load_E.mean(), bias_E + rate, bias_E - rate)


def joint_of(expert_TK: np.ndarray, label_T: np.ndarray) -> np.ndarray:
    joint_VE = np.zeros((label_T.max() + 1, expert_TK.max() + 1))
    np.add.at(joint_VE, (label_T[:, None], expert_TK), 1)
    return joint_VE / joint_VE.sum()


def bits_of(joint_VE: np.ndarray, log: Callable = np.log2) -> float:
    independent_VE = joint_VE.sum(1, keepdims=True) * joint_VE.sum(0)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nansum(joint_VE * log(joint_VE / independent_VE))


def natural_logarithm(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    return bits_of(joint_of(expert_TK, label_T), np.log)


def first_expert_only(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    return bits_of(joint_of(expert_TK[:, :1], label_T))


def zero_times_log_zero(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    joint_VE = joint_of(expert_TK, label_T)
    with np.errstate(divide="ignore", invalid="ignore"):
        return (joint_VE * np.log2(joint_VE / joint_VE.sum(1, keepdims=True) / joint_VE.sum(0))).sum()


def rows_made_even(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    joint_VE = joint_of(expert_TK, label_T)
    return bits_of(joint_VE / joint_VE.sum(1, keepdims=True) / len(joint_VE))


def each_label_with_weight_one(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    joint_VE = joint_of(expert_TK, label_T)
    by_label_VE = joint_VE / joint_VE.sum(1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.nansum(by_label_VE * np.log2(by_label_VE / joint_VE.sum(0)))


def sorts_everything(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> tuple[np.ndarray, ...]:
    order_N = np.argsort(expert_TK.ravel(), kind="stable")
    count_E = np.bincount(expert_TK.ravel(), minlength=experts)
    return order_N // expert_TK.shape[1], order_N % expert_TK.shape[1], np.concatenate([[0], np.cumsum(count_E)])


def rows_of(token_N: np.ndarray, slot_N: np.ndarray, expert_TK: np.ndarray, experts: int) -> tuple[np.ndarray, ...]:
    order_N = np.argsort(expert_TK[token_N, slot_N], kind="stable")
    count_E = np.bincount(expert_TK[token_N, slot_N], minlength=experts)
    return token_N[order_N], slot_N[order_N], np.concatenate([[0], np.cumsum(count_E)])


def slots_first(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> tuple[np.ndarray, ...]:
    slot_N, token_N = np.nonzero(keep_TK.T)
    return rows_of(token_N, slot_N, expert_TK, experts)


def without_the_zero(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> tuple[np.ndarray, ...]:
    token_N, slot_N, bounds_P = rows_of(*np.nonzero(keep_TK), expert_TK, experts)
    return token_N, slot_N, bounds_P[1:]


def forgets_idle_experts(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> tuple[np.ndarray, ...]:
    token_N, slot_N, _ = rows_of(*np.nonzero(keep_TK), expert_TK, experts)
    _, counts = np.unique(expert_TK[keep_TK], return_counts=True)
    return token_N, slot_N, np.concatenate([[0], np.cumsum(counts)])


def unstable_rows(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> tuple[np.ndarray, ...]:
    token_N, slot_N = (index_N[::-1] for index_N in np.nonzero(keep_TK))
    return rows_of(token_N, slot_N, expert_TK, experts)


def no_row_mask(*given: np.ndarray) -> np.ndarray:
    return of_source("09", "SOLUTION", ("row_inside[:, None] & ", ""))(*given)


def no_row_mask_in_the_store(*given: np.ndarray) -> np.ndarray:
    return of_source("09", "SOLUTION", ("mask=row_inside[:, None] & column_inside", "mask=column_inside"))(*given)


def forgets_the_total(*given: np.ndarray) -> np.ndarray:
    return of_source("09", "SOLUTION", ("tl.dot(rows, weight, total,", "tl.dot(rows, weight,"))(*given)


def always_the_first_expert(*given: np.ndarray) -> np.ndarray:
    return of_source("09", "SOLUTION", ("(expert * D + depth[:, None])", "depth[:, None]"))(*given)


def no_column_mask_in_the_store(*given: np.ndarray) -> np.ndarray:
    return of_source("09", "SOLUTION", ("mask=row_inside[:, None] & column_inside[None, :])", "mask=row_inside[:, None])"))(*given)


def no_depth_mask(*given: np.ndarray) -> np.ndarray:
    masks = (" & (depth < D)[None, :]", ""), ("(depth < D)[:, None] & ", "")
    return of_source("09", "SOLUTION", *masks)(*given)


WRONG = [
    ("keep", token_after_token, "first choices come first"),
    ("keep", one_too_many, "one assignment too many"),
    ("keep", each_choice_by_itself, "starts again at 0"),
    ("keep", drops_the_whole_token, "refused once loses its other choices"),
    ("gates", weighed_by_biased_scores, "made of the biased scores"),
    ("gates", scaled_before_the_sum, "scale has no effect"),
    ("gates", reversed_sort, "Ties go to the highest id"),
    ("gates", divides_by_the_sum_of_all, "The sum runs over all experts"),
    ("gates", softmax_of_the_chosen, "takes the place of the division"),
    ("router_backward", forgets_to_divide, "Step 1 is missing"),
    ("router_backward", forgets_to_divide_by_the_total, "divided by S"),
    ("router_backward", sum_is_a_constant, "taken for a constant"),
    ("router_backward", stops_at_the_scores, "back through the softmax"),
    ("router_backward", diagonal_only, "only the diagonal"),
    ("balance", counted_per_token, "not by the assignments"),
    ("balance", mean_of_the_chosen, "only the chosen scores"),
    ("balance", softmax_once_more, "second softmax"),
    ("balance", means_for_counts, "P takes the place of f"),
    ("balance", only_the_first_choice, "Only the first choices"),
    ("positions", padding_is_masked_afterwards, "masked afterwards"),
    ("positions", each_slot_by_itself, "numbered from 0 again"),
    ("positions", sums_along_the_experts, "along the experts"),
    ("positions", counts_itself, "one too large"),
    ("positions", flattens_by_token, "token after token"),
    ("bias_step", sign_of_each_rank, "a small rank outvotes"),
    ("bias_step", raises_the_busy, "turned round"),
    ("bias_step", in_bfloat16, "kept in bfloat16"),
    ("bias_step", mean_of_one_rank, "with the mean of a single rank"),
    ("bias_step", up_or_down, "exactly at the mean"),
    ("information", natural_logarithm, "These are nats"),
    ("information", first_expert_only, "Only the first choice"),
    ("information", zero_times_log_zero, "0 · log 0"),
    ("information", each_label_with_weight_one, "with weight 1 each"),
    ("information", rows_made_even, "equally frequent"),
    ("sort_rows", sorts_everything, "Only what is kept"),
    ("sort_rows", slots_first, "first choices come before second ones"),
    ("sort_rows", without_the_zero, "the first one is 0"),
    ("sort_rows", forgets_idle_experts, "nobody chose has bounds, too"),
    ("sort_rows", unstable_rows, "in reverse"),
    ("grouped_product", no_row_mask, "past the end of its expert"),
    ("grouped_product", no_row_mask_in_the_store, "past the end of its expert"),
    ("grouped_product", no_column_mask_in_the_store, "past the last column"),
    ("grouped_product", forgets_the_total, "Only the last step"),
    ("grouped_product", always_the_first_expert, "matrix of expert 0"),
    ("grouped_product", no_depth_mask, "past the end of the rows"),
]
"""(exercise, answer, words of its hint)."""
