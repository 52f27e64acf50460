"""Mutual information of expert and label: known values, its permutation null, and what the null must not be fooled by."""

from __future__ import annotations

import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reference.specialization import against_chance, deal, domain_expert_share, measure, mutual_information, position_bins


def column(*experts: int) -> np.ndarray:
    """expert_TK of tokens with one expert each."""
    return np.array(experts)[:, None]


def entropy(*shares: float) -> float:
    """Entropy in bits, written out."""
    return -sum(p * math.log2(p) for p in shares)


def test_known_value() -> None:
    # p(v, e): (0,0) 1/2, (0,1) 1/4, (1,1) 1/4; I = H(expert) + H(label) − H(both) = 1 + H(3/4, 1/4) − 3/2
    expert_TK, label_T = column(0, 0, 1, 1), np.array([0, 0, 0, 1])
    expected = 1 + entropy(3 / 4, 1 / 4) - 3 / 2
    assert mutual_information(expert_TK, label_T) == pytest.approx(expected, abs=1e-14)
    found = measure(expert_TK, label_T, np.random.default_rng(0))
    assert found.expert_entropy == pytest.approx(1, abs=1e-14)
    assert found.label_entropy == pytest.approx(entropy(3 / 4, 1 / 4), abs=1e-14)
    assert found.coefficient == pytest.approx(expected, abs=1e-14)
    assert (found.assignments, found.blocks, found.permutations) == (4, 4, 200)
    assert found.excess == found.information - found.null_mean


def test_every_slot_counts_and_a_dropped_one_does_not() -> None:
    # kept: (label 0: expert 0, expert 1), (label 1: expert 2); the expert tells the label, so I = H(label) = H(2/3, 1/3)
    expert_TK, label_T = np.array([[0, 1], [2, 0]]), np.array([0, 1])
    keep_TK = np.array([[True, True], [True, False]])
    assert mutual_information(expert_TK, label_T, keep_TK) == pytest.approx(entropy(2 / 3, 1 / 3), abs=1e-14)
    assert mutual_information(expert_TK, label_T) < entropy(2 / 3, 1 / 3) - 0.1
    found = measure(expert_TK, label_T, np.random.default_rng(0), keep_TK=keep_TK)
    assert found.coefficient == pytest.approx(entropy(2 / 3, 1 / 3) / math.log2(3), abs=1e-14)


def test_independent_is_zero_and_identical_is_the_entropy() -> None:
    every_pair = np.array([(v, e) for v in range(3) for e in range(5)])
    assert mutual_information(every_pair[:, 1:], every_pair[:, 0]) == pytest.approx(0, abs=1e-14)
    label_T = np.array([0, 0, 0, 0, 1, 1, 2, 7])
    assert mutual_information(label_T[:, None], label_T) == pytest.approx(entropy(1 / 2, 1 / 4, 1 / 8, 1 / 8), abs=1e-14)
    found = measure(np.repeat(label_T, 20)[:, None], np.repeat(label_T, 20), np.random.default_rng(0))
    assert found.coefficient == pytest.approx(1)
    assert found.p_value == 1 / 201
    assert found.null_high < 0.2 < found.excess


def test_one_expert_takes_all() -> None:
    found = measure(np.zeros((40, 1), int), np.arange(40) % 3, np.random.default_rng(0))
    assert (found.information, found.coefficient, found.expert_entropy, found.p_value) == (0, 0, 0, 1)


def test_null_is_the_mean_over_all_permutations() -> None:
    expert_TK, label_T = np.array([[0, 1], [0, 2], [1, 2], [0, 1], [2, 1]]), np.array([0, 0, 1, 1, 2])
    exact = [mutual_information(expert_TK, np.array(shuffled)) for shuffled in permutations(label_T)]
    found = measure(expert_TK, label_T, np.random.default_rng(0), permutations=4000)
    standard_error = np.std(exact) / math.sqrt(4000)
    assert abs(found.null_mean - np.mean(exact)) < 4 * standard_error
    exact_p = np.mean([value >= found.information - 1e-12 for value in exact])
    assert abs(found.p_value - exact_p) < 4 * math.sqrt(0.25 / 4000)


def test_null_mean_is_the_known_bias() -> None:
    """Miller's (E − 1)(V − 1) / (2 N ln 2): the null explains what the plug-in estimate adds, and raw bits are not evidence."""
    rng = np.random.default_rng(3)
    expert_TK, label_T = rng.integers(0, 8, (20_000, 1)), rng.integers(0, 64, 20_000)
    found = measure(expert_TK, label_T, rng)
    assert found.null_mean == pytest.approx(7 * 63 / (2 * 20_000 * math.log(2)), rel=0.03)
    assert found.information > 0.015
    assert abs(found.excess) < 0.1 * found.information


def test_null_interval_covers_random_routing() -> None:
    rng = np.random.default_rng(5)
    covered = 0
    for _ in range(100):
        expert_TK = rng.integers(0, 4, (300, 2))
        found = measure(expert_TK, rng.integers(0, 3, 300), rng, keep_TK=rng.random((300, 2)) < 0.8)
        covered += found.null_low <= found.information <= found.null_high
    assert covered >= 90


def sequences(rng: np.random.Generator, effect: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """24 sequences of 50 tokens: each prefers an expert of its own; with probability `effect` the one of its label."""
    label_B = rng.permutation(np.arange(24) % 3)
    favourite_B = np.where(rng.random(24) < effect, label_B, rng.integers(0, 4, 24))
    group_T = np.repeat(np.arange(24), 50)
    expert_T = np.where(rng.random(1200) < 0.5, favourite_B[group_T], rng.integers(0, 4, 1200))
    return expert_T[:, None], label_B[group_T], group_T


def test_blocks_protect_against_likeness_within_a_sequence() -> None:
    rng = np.random.default_rng(7)
    fooled = rejected = detected = 0
    for _ in range(40):
        expert_TK, label_T, group_T = sequences(rng, effect=0.0)
        fooled += measure(expert_TK, label_T, rng, permutations=100).p_value < 0.05
        rejected += measure(expert_TK, label_T, rng, group_ids=group_T, permutations=100).p_value < 0.05
        expert_TK, label_T, group_T = sequences(rng, effect=0.9)
        detected += measure(expert_TK, label_T, rng, group_ids=group_T, permutations=100).p_value < 0.05
    assert fooled >= 36
    assert rejected <= 6
    assert detected == 40


def test_tokens_without_a_kept_assignment_take_no_part() -> None:
    rng = np.random.default_rng(0)
    expert_TK, label_T = rng.integers(0, 4, (200, 2)), rng.integers(0, 3, 200)
    padded_TK, padded_T = np.concatenate([expert_TK, np.zeros((500, 2), int)]), np.concatenate([label_T, np.full(500, 9)])
    keep_TK = np.repeat(np.arange(700) < 200, 2).reshape(700, 2)
    for group in (None, np.arange(700)):
        with_padding = measure(padded_TK, padded_T, np.random.default_rng(1), keep_TK=keep_TK, group_ids=group)
        assert with_padding == measure(expert_TK, label_T, np.random.default_rng(1))


def test_group_of_each_token_is_the_token_null_and_the_seed_decides() -> None:
    rng = np.random.default_rng(0)
    expert_TK, label_T = rng.integers(0, 4, (90, 2)), rng.integers(0, 3, 90)
    plain = measure(expert_TK, label_T, np.random.default_rng(1))
    assert plain == measure(expert_TK, label_T, np.random.default_rng(1), group_ids=np.arange(90) + 7)
    assert plain != measure(expert_TK, label_T, np.random.default_rng(2))
    assert plain.information == mutual_information(expert_TK, label_T)


@st.composite
def routings(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(expert_TK, label_T, keep_TK) with at least one kept assignment."""
    tokens, slots = draw(st.integers(1, 12)), draw(st.integers(1, 3))
    expert_TK = draw(arrays(np.int64, (tokens, slots), elements=st.integers(0, 4)))
    label_T = draw(arrays(np.int64, tokens, elements=st.integers(-2, 3)))
    keep_TK = draw(arrays(bool, (tokens, slots)))
    keep_TK[draw(st.integers(0, tokens - 1)), 0] = True
    return expert_TK, label_T, keep_TK


@settings(deadline=None)
@given(routings(), st.randoms(use_true_random=False))
def test_properties(routing: tuple[np.ndarray, np.ndarray, np.ndarray], random) -> None:
    expert_TK, label_T, keep_TK = routing
    information = mutual_information(expert_TK, label_T, keep_TK)

    pairs = [(int(label_T[t]), int(expert_TK[t, k])) for t, k in np.argwhere(keep_TK)]
    both, label, expert = Counter(pairs), Counter(v for v, _ in pairs), Counter(e for _, e in pairs)
    written_out = sum(n / len(pairs) * math.log2(n * len(pairs) / (label[v] * expert[e])) for (v, e), n in both.items())
    assert information == pytest.approx(written_out, abs=1e-12)

    found = measure(expert_TK, label_T, np.random.default_rng(0), keep_TK=keep_TK, permutations=5)
    assert 0 <= information <= min(found.expert_entropy, found.label_entropy) + 1e-12
    assert 0 <= found.coefficient <= 1
    assert 0 < found.p_value <= 1
    assert found.null_low <= found.null_high

    names = np.array(random.sample(range(100), 6))  # labels −2 and −1 take the last two
    assert mutual_information(names[expert_TK], label_T, keep_TK) == pytest.approx(information, abs=1e-12)
    assert mutual_information(expert_TK, names[label_T], keep_TK) == pytest.approx(information, abs=1e-12)
    order = np.array(random.sample(range(len(label_T)), len(label_T)))
    assert mutual_information(expert_TK[order], label_T[order], keep_TK[order]) == pytest.approx(information, abs=1e-12)


def test_domain_expert_share() -> None:
    expert_TK, label_T = np.array([[0, 1], [0, 3], [1, 2], [1, 0]]), np.array([0, 0, 1, 1])
    keep_TK = np.array([[1, 1], [1, 1], [1, 1], [0, 0]], bool)
    share_VE = domain_expert_share(expert_TK, label_T, 5, keep_TK=keep_TK)
    np.testing.assert_array_equal(share_VE, [[1 / 2, 1 / 4, 0, 1 / 4, 0], [0, 1 / 2, 1 / 2, 0, 0]])
    np.testing.assert_allclose(share_VE.sum(1), 1, rtol=0, atol=1e-15)


def test_within_leaves_only_what_its_strata_do_not_explain() -> None:
    """Bytes go where their domain goes: the expert tells the byte, but nothing about it that the domain does not tell."""
    rng = np.random.default_rng(2)
    domain_T = rng.integers(0, 2, 3000)
    byte_T = 8 * domain_T + rng.integers(0, 8, 3000)
    by_domain = np.where(rng.random(3000) < 0.7, domain_T, rng.integers(0, 4, 3000))[:, None]
    by_byte = np.where(rng.random(3000) < 0.7, byte_T % 4, rng.integers(0, 4, 3000))[:, None]
    assert measure(by_domain, byte_T, rng).p_value < 0.01
    assert measure(by_domain, byte_T, rng, within=domain_T).p_value > 0.05
    assert measure(by_byte, byte_T, rng, within=domain_T).p_value < 0.01


def test_position_within_sequences() -> None:
    rng = np.random.default_rng(4)
    group_T = np.repeat(np.arange(30), 16)
    place_T = position_bins(group_T, 4)
    favourite_T = rng.integers(0, 4, 30)[group_T]
    follows_sequence = np.where(rng.random(480) < 0.8, favourite_T, rng.integers(0, 4, 480))[:, None]
    follows_place = np.where(rng.random(480) < 0.5, place_T, favourite_T)[:, None]
    assert measure(follows_sequence, place_T, rng, within=group_T).p_value > 0.05
    assert measure(follows_place, place_T, rng, within=group_T).p_value < 0.01


def test_position_bins() -> None:
    assert position_bins([5, 5, 5, 5], 2).tolist() == [0, 0, 1, 1]
    assert position_bins([1, 0, 1, 0, 1, 0, 1, 7], 4).tolist() == [0, 0, 1, 1, 2, 2, 3, 0]
    assert position_bins([3, 3, 3], 6).tolist() == [0, 2, 4]
    assert position_bins(np.zeros(0, int), 3).tolist() == []


def test_deal_keeps_strata_and_shuffles_inside_them() -> None:
    stratum = np.array([1, 0, 1, 2, 0, 1, 0])
    seen = set()
    for seed in range(200):
        order = deal(np.random.default_rng(seed), stratum, 7)
        assert sorted(order) == list(range(7)) and (stratum[order] == stratum).all()
        seen.add(tuple(order))
    assert len(seen) == math.factorial(3) * math.factorial(3)


def test_against_chance() -> None:
    found = against_chance(3.0, [0.0, 1.0, 2.0, 3.0, 4.0])
    assert (found.value, found.null_mean, found.excess, found.p_value, found.draws) == (3, 2, 1, 3 / 6, 5)
    assert found.null_low == pytest.approx(0.1) and found.null_high == pytest.approx(3.9)
    with pytest.raises(ValueError, match="at least 1 draw"):
        against_chance(1.0, [])


GOOD = {"expert_TK": np.zeros((4, 2), int), "label_T": np.arange(4), "rng": np.random.default_rng(0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"expert_TK": np.zeros(4, int)}, r"\(4,\).*\[T, K\]"),
        ({"expert_TK": np.zeros((4, 2))}, "float64"),
        ({"expert_TK": np.full((4, 2), -1)}, "-1.*at least 0"),
        ({"label_T": np.arange(5)}, r"\(5,\).*\(4, 2\)"),
        ({"label_T": np.full(4, np.nan)}, "float64"),
        ({"keep_TK": np.ones((4, 1), bool)}, r"\(4, 1\)"),
        ({"keep_TK": np.ones((4, 2))}, "float64.*boolean"),
        ({"keep_TK": np.zeros((4, 2), bool)}, "no assignment is kept among the 8"),
        ({"expert_TK": np.zeros((0, 2), int), "label_T": np.zeros(0, int)}, "among the 0"),
        ({"group_ids": np.array([5, 6, 6, 7])}, "group 6 has the labels 1 and 2"),
        ({"group_ids": np.arange(3)}, r"\(3,\)"),
        ({"group_ids": np.zeros(4)}, "group_ids has dtype float64"),
        ({"group_ids": np.array([0, 0, 1, 2]), "label_T": np.zeros(4, int), "within": np.arange(4)}, "values of within 0 and 1"),
        ({"within": np.zeros(3, int)}, r"within has shape \(3,\), but there are 4"),
        ({"within": np.zeros(4)}, "within has dtype float64"),
        ({"permutations": 0}, "permutations is 0"),
        ({"rng": 0}, "rng is 0"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure(**GOOD | change)


@pytest.mark.parametrize(
    ("label_T", "options", "message"),
    [
        ([0, 1], {"experts": 2}, "holds 2, but there are 2 experts"),
        ([0, -1], {"experts": 3}, "-1 to 0, but V is 1"),
        ([0, 3], {"experts": 3, "labels": 3}, "0 to 3, but V is 3"),
        ([0, 2], {"experts": 3}, "label 1 has no kept assignment"),
    ],
)
def test_bad_share(label_T: list[int], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        domain_expert_share(column(0, 2), np.array(label_T), **options)


@pytest.mark.parametrize(
    ("group_ids", "bins", "message"),
    [([0, 0], 0, "bins is 0"), ([[0, 0]], 1, r"shape \(1, 2\)"), ([0.0, 1.0], 1, "float64")],
)
def test_bad_position_bins(group_ids: list, bins: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        position_bins(np.array(group_ids), bins)
