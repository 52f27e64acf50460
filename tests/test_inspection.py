"""What is said of a trained layer, on routings whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from optimized.inspection import _facts
from reference import example, moe_forward
from reference.routing import Routing


def routing(expert: list[list[int]], gate: list[list[float]], keep: list[list[bool]]) -> Routing:
    expert_TK = np.array(expert)
    load_E = np.bincount(expert_TK.ravel(), minlength=4)
    nothing = np.zeros((len(expert), 4))
    return Routing(expert_TK, np.array(gate), np.array(keep), load_E, load_E / len(expert), nothing, nothing, {})


def test_known_loads_gates_and_drops() -> None:
    given = routing([[0, 1], [0, 1], [0, 2]], [[0.9, 0.3], [0.5, 0.5], [0.0, 0.0]], [[True, True], [True, True], [False, False]])
    found = _facts(given, np.array([-0.5, 0.0, 0.25, 0.0]))
    assert found.max_violation == pytest.approx(3 / 1.5 - 1) and found.dead == 1
    assert found.variation == pytest.approx(np.std([3, 2, 1, 0]) / 1.5)
    assert found.strongest == pytest.approx((0.75 + 0.5) / 2), "a token without gates has no strongest one"
    assert found.dropped == pytest.approx(2 / 6) and (found.bias_low, found.bias_high) == (-0.5, 0.25)


def test_nothing_kept_and_no_bias() -> None:
    found = _facts(routing([[0, 1]], [[0.0, 0.0]], [[False, False]]), None)
    assert found.strongest == 0 and found.dropped == 1 and found.bias_low is None


def test_the_running_example() -> None:
    output, _ = moe_forward(example.inputs(), example.params(), example.CONFIG)
    found = _facts(output.routing, None)
    assert found.dropped == pytest.approx(1 / 16) and found.max_violation == pytest.approx(5 / 4 - 1) and found.dead == 0
