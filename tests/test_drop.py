"""Drop rates by position: a case by hand, what the orders share, and the committed measurement."""

from __future__ import annotations

import json

import numpy as np
import pytest
from conftest import REPOSITORY

from optimized.lab import EXPERIMENTS, drop
from reference import presets

RESULT = REPOSITORY / "docs/results/drop-by-position.json"


def crowded(sequences: int) -> drop.Routed:
    """Everybody wants expert 0, and later tokens want it more."""
    tokens = sequences * drop.LENGTH
    position_T = np.tile(np.arange(drop.LENGTH), sequences)
    gate_TK = (1 + position_T[:, None]) / (1 + drop.LENGTH)
    return drop.Routed("crowd", np.zeros((tokens, 1), np.int64), gate_TK, np.repeat(np.arange(sequences), drop.LENGTH), position_T)


@pytest.mark.parametrize(
    "order, rates",
    [
        ("token_major", [0, 0, 0, 0, 1, 1, 1, 1]),
        ("choice_major", [0, 0, 0, 0, 1, 1, 1, 1]),
        ("batch_prioritized", [1, 1, 1, 1, 0, 0, 0, 0]),
    ],
)
def test_half_a_sequence_fits_by_hand(order: str, rates: list[int]) -> None:
    assert drop.drop_rates(crowded(3), order, 2, np.random.default_rng(0)) == rates


def test_a_lot_drops_everywhere_and_as_much() -> None:
    rates = drop.drop_rates(crowded(40), "random", 2, np.random.default_rng(0))
    assert np.mean(rates) == pytest.approx(0.5) and np.ptp(rates) < 0.1


def test_the_same_seed_throws_the_same_dice() -> None:
    config = presets.tiny("olmoe-1b-7b")
    first, second, other = (drop.thrown(config, 2, np.random.default_rng(seed)) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first.expert_TK, second.expert_TK)
    assert (first.expert_TK != other.expert_TK).any()


def test_a_claim_that_does_not_hold_says_so() -> None:
    flat, falling = [0.1] * drop.BINS, [0.3] * (drop.BINS - 1) + [0.1]
    held = [one["held"] for one in drop.judged([{"dice": dict.fromkeys(drop.ORDERS, flat)}])]
    assert held == [False, False, False]
    assert not drop.judged([{"dice": dict.fromkeys(drop.ORDERS, falling)}])[0]["held"]


def test_a_small_run_has_the_form_of_the_committed_one() -> None:
    found, committed = drop.run([0, 1], True), json.loads(RESULT.read_text(encoding="utf-8"))
    assert found.keys() == committed.keys()
    assert found["summary"].keys() == committed["summary"].keys() == {"dice", "layer 1", "layer 2", "layer 3"}
    assert found["smoke"] and not committed["smoke"] and len(committed["seeds"]) >= 3
    assert EXPERIMENTS["drop"].result == RESULT.stem and RESULT.name in committed["command"]
    for router, orders in committed["summary"].items():
        means = {order: np.mean([rate["mean"] for rate in rates]) for order, rates in orders.items()}
        assert np.ptp(list(means.values())) < 0.02, f"{router}: the order moves drops, it does not save any"
    assert [one["held"] for one in committed["claims"]] == [True, True, True]
