"""Churn between routings: known values, names that mean nothing, and what chance agrees on."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from reference.churn import best_relabelling, routing_churn

RNG = np.random.default_rng


def routing(rng: np.random.Generator, tokens: int, experts: int, top_k: int) -> np.ndarray:
    return rng.random((tokens, experts)).argsort(1)[:, :top_k]


def test_golden_value() -> None:
    # in common: 2 of 2, 1 of 2, 0 of 2
    before_TK, after_TK = np.array([[0, 1], [0, 1], [0, 1]]), np.array([[1, 0], [1, 2], [2, 3]])
    found = routing_churn(before_TK, after_TK, 4, RNG(0))
    assert found.churn == pytest.approx(0.5) and found.agreement.value == pytest.approx(0.5)
    assert found.names == [0, 1, 2, 3]
    # every order of the after tokens agrees as much, so it is all chance
    assert found.agreement.null_low == found.agreement.null_high == pytest.approx(0.5) and found.corrected == 0


def test_equal_routings_and_renamed_ones() -> None:
    rng = RNG(1)
    before_TK = routing(rng, 200, 6, 2)
    same = routing_churn(before_TK, before_TK[:, ::-1], 6, rng)
    assert (same.churn, same.corrected, same.agreement.p_value) == (0, 1, 1 / 201)
    names_E = rng.permutation(6)
    while (names_E == np.arange(6)).any():
        names_E = rng.permutation(6)
    renamed_TK = np.argsort(names_E)[before_TK]  # the expert called e here is number f with names[f] = e
    assert routing_churn(before_TK, renamed_TK, 6, rng).churn > 0.4
    found = routing_churn(before_TK, renamed_TK, 6, rng, relabel=True)
    assert found.churn == pytest.approx(0) and found.corrected == pytest.approx(1) and found.names == names_E.tolist()


def test_unrelated_routings_agree_by_chance_and_names_find_more() -> None:
    rng = RNG(2)
    before_TK, after_TK = routing(rng, 300, 8, 2), routing(rng, 300, 8, 2)
    plain, matched = (routing_churn(before_TK, after_TK, 8, rng, relabel=relabel) for relabel in (False, True))
    assert plain.agreement.null_mean == pytest.approx(2 / 8, abs=0.01)
    assert matched.agreement.value > plain.agreement.value and matched.agreement.null_mean > plain.agreement.null_mean + 0.02
    for found in (plain, matched):
        assert abs(found.corrected) < 0.06


def test_within_takes_out_what_the_byte_explains() -> None:
    rng = RNG(3)
    byte_T = rng.integers(0, 5, 600)
    by_byte = byte_T[:, None] % 4
    found = routing_churn(by_byte, by_byte, 4, rng, within=byte_T)
    assert found.agreement.null_mean == 1 and found.corrected == 0 and found.agreement.p_value == 1
    assert routing_churn(by_byte, by_byte, 4, rng).corrected == 1


@given(arrays(np.int64, (4, 4), elements=st.integers(0, 50)))
def test_best_relabelling_is_the_best_of_all(common_EE: np.ndarray) -> None:
    found = best_relabelling(common_EE)
    assert sorted(found) == [0, 1, 2, 3]
    best = max(common_EE[list(order), range(4)].sum() for order in permutations(range(4)))
    assert common_EE[found, range(4)].sum() == best


def test_best_relabelling_equals_a_library() -> None:
    optimize = pytest.importorskip("scipy.optimize")
    rng = RNG(4)
    for size in (1, 7, 16):
        for _ in range(10):
            common_EE = rng.random((size, size))
            rows, columns = optimize.linear_sum_assignment(common_EE, maximize=True)
            found = best_relabelling(common_EE)
            assert common_EE[found, range(size)].sum() == pytest.approx(common_EE[rows, columns].sum(), abs=1e-12)


GOOD = {"before_TK": [[0, 1]], "after_TK": [[0, 2]], "experts": 3, "rng": RNG(0)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"after_TK": [[0, 2], [0, 1]]}, r"\(1, 2\), but after_TK \(2, 2\)"),
        ({"before_TK": [[0, 3]]}, "before_TK holds 0 to 3, but there are 3 experts"),
        ({"before_TK": [[0, -1]]}, "holds -1 to 0"),
        ({"after_TK": [[1, 1]]}, "after_TK gives token 0 an expert twice"),
        ({"after_TK": [[0.0, 1.0]]}, "float64"),
        ({"before_TK": np.zeros((0, 2), int)}, r"\(0, 2\).*at least 1 token"),
        ({"within": [0, 0]}, "within has shape"),
        ({"permutations": 0}, "permutations is 0"),
        ({"rng": 1}, "rng is 1"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        routing_churn(**GOOD | change)


def test_bad_matrix() -> None:
    with pytest.raises(ValueError, match=r"\(2, 3\); it must be square"):
        best_relabelling(np.zeros((2, 3)))
