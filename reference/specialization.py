"""What experts learn, measured: how much an expert tells about a token's label, beside what chance alone would tell.

A label is any integer of a token: its domain, its id, its position. Every estimate of mutual information from finitely many tokens is
above zero, and the more so the more experts and labels there are. So a number is reported beside its permutation null: the same
estimate after the labels were dealt out anew. `overlap`, `redundancy` and `churn` measure what no label shows.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from .config import require


class Chance(NamedTuple):
    """A number beside what it would be without the effect that it is to show. Plain Python numbers, ready for JSON.

    value                 as measured
    null_mean             its mean over the draws of the null model
    null_low, null_high   their 2.5th and 97.5th percentile
    excess                value − null_mean
    p_value               chance of so large a value under the null model, in (0, 1]
    draws                 how many
    """

    value: float
    null_mean: float
    null_low: float
    null_high: float
    excess: float
    p_value: float
    draws: int


def against_chance(value: float, null: ArrayLike) -> Chance:
    """A value beside the draws of its null model, by the p-value of `measure`. Raises ValueError without a draw."""
    null = np.asarray(null, dtype=np.float64)
    require(null.ndim == 1 and null.size > 0, f"null has shape {null.shape}; it must hold at least 1 draw")
    # Two draws with the same counts may differ by a rounding, and must count as equal.
    reached = int(np.count_nonzero(null >= value - 1e-12))
    low, high = np.quantile(null, [0.025, 0.975]).tolist()
    mean = float(null.mean())
    return Chance(float(value), mean, low, high, float(value) - mean, (1 + reached) / (1 + null.size), null.size)


class Specialization(NamedTuple):
    """Mutual information of expert and label, in bits, and its permutation null. Plain Python numbers, ready for JSON.

    information           the plug-in estimate, ≥ 0 and at most either entropy
    null_mean             its mean over the permutations: the part that chance explains
    null_low, null_high   2.5th and 97.5th percentile of the permutations
    excess                information − null_mean; about 0 where there is no specialization, and slightly negative half of the time
    p_value               chance of so large a value without specialization, in (0, 1]
    coefficient           information / expert_entropy in [0, 1]; 0 where one expert takes all. Not corrected for chance
    expert_entropy        entropy of the expert over the assignments, in bits
    label_entropy         entropy of the label over the assignments, in bits
    assignments           how many (token, slot, expert) were counted
    blocks                how many labels were dealt out: tokens, or groups where `group_ids` was given
    permutations          how many times
    """

    information: float
    null_mean: float
    null_low: float
    null_high: float
    excess: float
    p_value: float
    coefficient: float
    expert_entropy: float
    label_entropy: float
    assignments: int
    blocks: int
    permutations: int


def mutual_information(expert_TK: ArrayLike, label_T: ArrayLike, keep_TK: ArrayLike | None = None) -> float:
    """How many bits the expert of an assignment tells about the label of its token, by the plug-in estimate.

    Equation (mutual-information): I = Σ_v Σ_e p(v, e) · log₂( p(v, e) / (p(v) · p(e)) ), where p is the share of kept assignments with
    label v and expert e; each slot of a token counts once.

    expert_TK is an integer array ≥ 0, label_T any integer array, keep_TK boolean (None: all kept). Returns 0 ≤ I ≤ min of both entropies.
    Without any dependence its expectation is about (E − 1)(V − 1) / (2 N ln 2) bits, for V labels and N assignments: see `measure`.
    No gradient. Raises ValueError for wrong shapes or dtypes, a negative expert, and no kept assignment.
    Source: Shannon, "A Mathematical Theory of Communication" (1948), part I, section 6 (entropy); for the expectation, Miller's "Note on
    the Bias of Information Estimates" (1955).
    """
    token_N, expert_N, label_T = _assignments(expert_TK, label_T, keep_TK)
    return _information(_table(_from_zero(label_T[token_N]), _from_zero(expert_N)))


def measure(
    expert_TK: ArrayLike,
    label_T: ArrayLike,
    rng: np.random.Generator,
    *,
    keep_TK: ArrayLike | None = None,
    group_ids: ArrayLike | None = None,
    within: ArrayLike | None = None,
    permutations: int = 200,
) -> Specialization:
    """Mutual information of expert and label beside its permutation null.

    Equation (permutation-p-value): p = (1 + #{ i : I_i ≥ I }) / (1 + n), with I_i the mutual information after permutation i of n.
    Equation (uncertainty-coefficient): U = I / H(expert), H = −Σ_e p(e) · log₂ p(e).

    A permutation deals the labels out anew, whole tokens at a time: a token's assignments stay together, and tokens without a kept
    assignment (padding, dropped) take no part. Where a label is shared by a whole sequence, as a domain is, tokens of one sequence are
    alike for reasons other than the label, and shuffling tokens would call that specialization. Give `group_ids` [T] (which sequence a
    token belongs to, integers) there: labels are then dealt out to whole groups.

    The other way round, a label that varies inside a sequence may owe its information to a third thing: a byte to the domain that it is
    frequent in. Give `within` [T] (integers, constant on a group): labels are then dealt out among tokens of equal `within` only, so that
    the null holds what `within` explains. For positions, `position_bins` is the label and the sequence is `within`.

    Other arguments as for `mutual_information`. `rng` draws the permutations; the result depends on nothing else. No gradient.
    Raises ValueError as `mutual_information` does, and for permutations < 1, an `rng` that is no Generator, and a group with two labels or
    two values of `within`.
    Source: Phipson and Smyth, "Permutation P-values Should Never Be Zero" (2010), for p; Theil's uncertainty coefficient, for U.
    """
    check_draws(rng, permutations, "permutations")
    token_N, expert_N, label_T = _assignments(expert_TK, label_T, keep_TK)
    block_N, block_label = _blocks(token_N, label_T, group_ids, "labels")
    stratum = None if within is None else _blocks(token_N, token_labels(within, label_T.size, "within"), group_ids, "values of within")[1]
    expert_N = _from_zero(expert_N)
    # One entry for each (block, expert) that occurs: a permutation then costs as much as there are entries, not assignments.
    experts = int(expert_N.max()) + 1
    entry, count = np.unique(block_N * experts + expert_N, return_counts=True)
    block, expert = np.divmod(entry, experts)
    table = _table(block_label[block], expert, count)
    information = _information(table)
    null = np.array(
        [_information(_table(block_label[deal(rng, stratum, block_label.size)][block], expert, count)) for _ in range(permutations)]
    )
    chance = against_chance(information, null)
    expert_entropy = _entropy(table.sum(0))
    return Specialization(
        information=information,
        null_mean=chance.null_mean, null_low=chance.null_low, null_high=chance.null_high,
        excess=chance.excess, p_value=chance.p_value,
        coefficient=min(1.0, information / expert_entropy) if expert_entropy > 0 else 0.0,
        expert_entropy=expert_entropy,
        label_entropy=_entropy(table.sum(1)),
        assignments=expert_N.size,
        blocks=block_label.size,
        permutations=permutations,
    )  # fmt: skip


def deal(rng: np.random.Generator, stratum: np.ndarray | None, count: int) -> np.ndarray:
    """A random order of 0 … count − 1 in which each place keeps its stratum (None: any order)."""
    if stratum is None:
        return rng.permutation(count)
    order = np.empty(count, np.int64)
    order[np.argsort(stratum, kind="stable")] = np.lexsort((rng.random(count), stratum))
    return order


def position_bins(group_ids: ArrayLike, bins: int) -> np.ndarray:
    """The label of a token's place in its sequence (position-bin): [T] int64 in 0 … bins − 1, for groups of any lengths.

    group_ids [T] integers, tokens of a group in their order. No gradient. Raises ValueError for another shape or dtype, and bins < 1.
    """
    group_T = np.asarray(group_ids)
    group_T = token_labels(group_T, group_T.size, "group_ids")
    require(bins >= 1, f"bins is {bins}; it must be at least 1")
    _, group_T, size = np.unique(group_T, return_inverse=True, return_counts=True)
    order = np.argsort(group_T, kind="stable")
    place_T = np.empty_like(group_T)
    place_T[order] = np.arange(group_T.size) - np.repeat(np.cumsum(size) - size, size)
    return place_T * bins // size[group_T]


def domain_expert_share(
    expert_TK: ArrayLike, label_T: ArrayLike, experts: int, *, labels: int | None = None, keep_TK: ArrayLike | None = None
) -> np.ndarray:
    """Who routes where: share_VE, the share of each expert in the kept assignments of each label.

    Equation (expert-share): share[v, e] = #{kept assignments with label v and expert e} / #{kept assignments with label v}.

    Labels are 0 … V − 1 with V = `labels` (None: the largest one plus 1). Returns float64; every row sums to 1. No gradient.
    Raises ValueError as `mutual_information` does, and for an expert or label out of range and a label without a kept assignment.
    """
    token_N, expert_N, label_T = _assignments(expert_TK, label_T, keep_TK)
    label_N = label_T[token_N]
    labels = int(label_T.max()) + 1 if labels is None else labels
    require(expert_N.max() < experts, f"expert_TK holds {expert_N.max()}, but there are {experts} experts")
    require(label_T.min() >= 0 and label_T.max() < labels, f"label_T holds {label_T.min()} to {label_T.max()}, but V is {labels}")
    table_VE = np.bincount(label_N * experts + expert_N, minlength=labels * experts).reshape(labels, experts)
    total_V = table_VE.sum(1)
    require(bool(total_V.all()), f"label {total_V.argmin()} has no kept assignment, so it has no share")
    return table_VE / total_V[:, None]


def _assignments(expert_TK: ArrayLike, label_T: ArrayLike, keep_TK: ArrayLike | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Checked input as (token_N, expert_N, label_T), N the kept assignments."""
    expert_TK, label_T = np.asarray(expert_TK), np.asarray(label_T)
    keep_TK = np.ones(expert_TK.shape, dtype=bool) if keep_TK is None else np.asarray(keep_TK)
    require(expert_TK.ndim == 2, f"expert_TK has shape {expert_TK.shape}; it must be [T, K]")
    require(expert_TK.dtype.kind in "iu", f"expert_TK has dtype {expert_TK.dtype}; it must hold integers")
    require(label_T.shape == expert_TK.shape[:1], f"label_T has shape {label_T.shape}, but expert_TK {expert_TK.shape}")
    require(label_T.dtype.kind in "iu", f"label_T has dtype {label_T.dtype}; it must hold integers")
    require(keep_TK.shape == expert_TK.shape, f"keep_TK has shape {keep_TK.shape}, but expert_TK {expert_TK.shape}")
    require(keep_TK.dtype == bool, f"keep_TK has dtype {keep_TK.dtype}; it must be boolean")
    token_N, slot_N = np.nonzero(keep_TK)
    require(token_N.size > 0, f"no assignment is kept among the {expert_TK.size} given, so there is nothing to measure")
    expert_N = expert_TK[token_N, slot_N].astype(np.int64)
    require(expert_N.min() >= 0, f"expert_TK holds {expert_N.min()}; an expert id is at least 0")
    return token_N, expert_N, label_T.astype(np.int64)


def check_draws(rng: np.random.Generator, draws: int, name: str) -> None:
    """ValueError unless rng is a Generator and there is at least one draw."""
    require(isinstance(rng, np.random.Generator), f"rng is {rng!r}; it must be a numpy.random.Generator")
    require(draws >= 1, f"{name} is {draws}; it must be at least 1")


def token_labels(values: ArrayLike, tokens: int, name: str) -> np.ndarray:
    """Integers [T] of this name, checked."""
    values = np.asarray(values)
    require(values.shape == (tokens,), f"{name} has shape {values.shape}, but there are {tokens} tokens")
    require(values.dtype.kind in "iu", f"{name} has dtype {values.dtype}; it must hold integers")
    return values.astype(np.int64)


def _blocks(token_N: np.ndarray, label_T: np.ndarray, group_ids: ArrayLike | None, what: str) -> tuple[np.ndarray, np.ndarray]:
    """(block_N, block_label): the block of each assignment, and the label of each block that occurs, both counted from 0."""
    group_T = np.arange(label_T.size) if group_ids is None else token_labels(group_ids, label_T.size, "group_ids")
    label_N = label_T[token_N]
    group, first, block_N = np.unique(group_T[token_N], return_index=True, return_inverse=True)
    block_label = label_N[first]
    stray = np.flatnonzero(label_N != block_label[block_N])
    if stray.size:
        block = block_N[stray[0]]
        raise ValueError(f"group {group[block]} has the {what} {block_label[block]} and {label_N[stray[0]]}; a group must share one")
    return block_N, _from_zero(block_label)


def _from_zero(values: np.ndarray) -> np.ndarray:
    """The same values numbered 0, 1, … without gaps, in their order."""
    return np.unique(values, return_inverse=True)[1]


def _table(label_N: np.ndarray, expert_N: np.ndarray, weight_N: np.ndarray | None = None) -> np.ndarray:
    """Contingency table [labels, experts] of ids counted from 0."""
    labels, experts = int(label_N.max()) + 1, int(expert_N.max()) + 1
    return np.bincount(label_N * experts + expert_N, weight_N, labels * experts).reshape(labels, experts)


def _information(table: np.ndarray) -> float:
    joint = table / table.sum()
    independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
    seen = joint > 0
    # The sum over a table of independent counts may round to a little less than its true 0.
    return max(0.0, float(np.sum(joint[seen] * np.log2(joint[seen] / independent[seen]))))


def _entropy(count: np.ndarray) -> float:
    share = count[count > 0] / count.sum()
    return max(0.0, -float(np.sum(share * np.log2(share))))
