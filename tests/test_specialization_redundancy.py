"""Redundancy by masking: the rules, the experts that take over, and losses whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from reference.gating import top_k
from reference.redundancy import disable_random, disable_top, redundancy, without_disabled

SCORES = np.array([[0.1, 0.9, 0.5, 0.5], [0.7, 0.2, 0.7, 0.1]])


def test_top_rule_and_who_takes_over() -> None:
    assert disable_top(0)(SCORES).sum() == 0
    np.testing.assert_array_equal(disable_top(1)(SCORES), [[0, 1, 0, 0], [1, 0, 0, 0]])
    np.testing.assert_array_equal(disable_top(2)(SCORES), [[0, 1, 1, 0], [1, 0, 1, 0]])
    assert without_disabled(SCORES, disable_top(1), 2).tolist() == [[2, 3], [2, 1]]
    assert without_disabled(SCORES, disable_top(0), 2).tolist() == top_k(SCORES, 2).tolist()


def test_random_rule_takes_as_many_from_each_token_evenly() -> None:
    disabled_TE = disable_random(2, np.random.default_rng(0))(np.zeros((3000, 5)))
    assert (disabled_TE.sum(1) == 2).all()
    assert np.abs(disabled_TE.mean(0) - 0.4).max() < 0.04


def toy(value_TE: np.ndarray, preference_TE: np.ndarray):
    """A loss that is minus the mean value of the K = 1 experts chosen by preference."""

    def loss(rule) -> float:
        chosen_TK = without_disabled(preference_TE, rule, 1)
        return -float(np.take_along_axis(value_TE, chosen_TK, 1).mean())

    return loss


def test_specialists_cost_more_than_chance_and_copies_nothing() -> None:
    rng = np.random.default_rng(0)
    preference_TE = rng.standard_normal((400, 6))
    (specialists,) = redundancy(
        toy((preference_TE == preference_TE.max(1, keepdims=True)) * 1.0, preference_TE), [1], rng, experts=6, top_k=1
    )
    assert specialists.increase.value == 1 and specialists.loss == 0
    assert specialists.increase.null_mean == pytest.approx(1 / 6, abs=0.03) and specialists.increase.p_value == 1 / 21
    (copies,) = redundancy(toy(np.ones((400, 6)), preference_TE), [2], rng, experts=6, top_k=1)
    assert (copies.increase.value, copies.increase.null_low, copies.increase.null_high, copies.increase.p_value) == (0, 0, 0, 1)
    (indifferent,) = redundancy(toy(rng.standard_normal((400, 6)), preference_TE), [1], rng, experts=6, top_k=1, draws=100)
    assert indifferent.increase.p_value > 0.01 or indifferent.increase.value < 0.2


def test_calls_and_determinism() -> None:
    calls = []

    def loss(rule) -> float:
        calls.append(rule)
        return float((rule(np.arange(40.0).reshape(8, 5)) * np.arange(5.0)).sum())

    found = redundancy(loss, (0, 1, 3), np.random.default_rng(3), experts=5, top_k=2, draws=4)
    assert len(calls) == 1 + 3 * 5 and [one.disabled for one in found] == [0, 1, 3]
    assert found[0].increase.value == 0 and found[1].loss == 4 * 8 and found[2].increase.value == (4 + 3 + 2) * 8
    assert found == redundancy(loss, (0, 1, 3), np.random.default_rng(3), experts=5, top_k=2, draws=4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"counts": [4]}, "counts holds 4; 5 experts with top_k 2 leave 0 to 3"),
        ({"counts": [-1]}, "counts holds -1"),
        ({"draws": 0}, "draws is 0"),
        ({"rng": None}, "rng is None"),
    ],
)
def test_bad_input(change: dict, message: str) -> None:
    good = {"loss": lambda rule: 0.0, "counts": [1], "rng": np.random.default_rng(0), "experts": 5, "top_k": 2}
    with pytest.raises(ValueError, match=message):
        redundancy(**good | change)


def test_bad_rule() -> None:
    with pytest.raises(ValueError, match="1 experts are left for a token, but top_k is 2"):
        without_disabled(SCORES, disable_top(3), 2)
    with pytest.raises(ValueError, match=r"shape \(1, 4\)"):
        without_disabled(SCORES, lambda choice_TE: np.zeros((1, 4), bool), 2)
