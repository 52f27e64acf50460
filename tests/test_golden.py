"""Numbers computed once outside this project, and small ones by hand: every router of the reference on the same four tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from reference import (
    BalanceConfig,
    CapacityConfig,
    ExpertsConfig,
    GatingConfig,
    MoEConfig,
    MoEOutput,
    ScoresConfig,
    init_params,
    moe_forward,
)
from reference.balancing import (
    coefficient_of_variation,
    dead_experts,
    drop_rate_by_position,
    load_entropy,
    max_violation,
)
from reference.capacity import keep_within_capacity, queue_order
from reference.gating import limit_to_groups, random_second
from reference.layer import update_bias
from reference.tokens import Draws, token_info

LOGITS_TE = np.array([
    [1.0, -0.5, 0.25, 2.0, -1.0, 0.0, 0.75, -2.0],
    [0.5, 0.5, -1.0, 0.0, 1.5, 1.0, -0.25, 0.1],
    [2.0, 1.75, -0.5, -0.5, 0.0, 0.0, 0.25, 1.0],
    [3.0, -1.0, 0.5, -2.0, 0.5, 2.5, -0.75, 0.0],
])  # fmt: skip
TOP2 = [[3, 0], [4, 5], [0, 1], [0, 5]]
PLAIN = [[0.473108, 0.174047], [0.325958, 0.197704], [0.362938, 0.282656], [0.535029, 0.324511]]
SHARES = [[0.731059, 0.268941], [0.622459, 0.377541], [0.562177, 0.437823], [0.622459, 0.377541]]
BIAS_E = np.array([-1.2, 0.0, 0.3, 0.0, 0.0, -0.2, 0.0, 0.1])


def run(
    scores: str = "softmax", capacity: CapacityConfig | None = None, losses: tuple[str, ...] = (), bias: Any = None, **gating: Any
) -> MoEOutput:
    """The layer on tokens that are their own logits: its router is the identity matrix."""
    config = MoEConfig(
        8,
        ScoresConfig(scores),
        GatingConfig(**{"top_k": 2, "correction_bias": bias is not None} | gating),
        capacity or CapacityConfig(),
        ExpertsConfig(8, 2),
        BalanceConfig(tuple((name, 1.0) for name in losses)),
    )
    params = init_params(config, np.random.default_rng(0)) | {"router.weight": np.eye(8)}
    if bias is not None:
        params["router.correction_bias"] = np.asarray(bias, np.float32)
    return moe_forward(LOGITS_TE, params, config, training=True)[0]


def v3(bias: Any, **settings: Any) -> MoEOutput:
    """DeepSeek-V3's router in small: 4 groups of 2, the 2 best of them open."""
    gating = {"groups": 4, "top_groups": 2, "group_score": "top2_sum", "normalize": "sum", "eps": 1e-20, "scale": 2.5}
    return run("sigmoid", bias=bias, **gating | settings)


@pytest.mark.parametrize(
    "scores, normalize, gates", [("softmax", "none", PLAIN), ("softmax", "sum", SHARES), ("identity", "softmax", SHARES)]
)
def test_top_2_and_its_gates(scores: str, normalize: str, gates: list) -> None:
    routing = run(scores, normalize=normalize).routing
    assert routing.expert.tolist() == TOP2
    assert routing.load.tolist() == [3, 1, 0, 1, 1, 2, 0, 0]
    np.testing.assert_allclose(routing.gate, gates, atol=6e-7)


@pytest.mark.parametrize("scores", ["softmax", "identity"])
@pytest.mark.parametrize(
    "name, value",
    [("expert_balance", 1.579873), ("first_choice_balance", 1.702819), ("sequence_balance", 1.579873), ("router_z", 9.162137)],
)
def test_losses(name: str, value: float, scores: str) -> None:
    output = run(scores, losses=(name,))
    assert output.losses[name] == pytest.approx(value, abs=6e-7)
    assert output.loss == output.losses[name]


def test_published_forms_of_the_balance_losses_differ_by_constants() -> None:
    losses = run(losses=("expert_balance", "first_choice_balance")).losses
    assert 2 * losses["expert_balance"] == pytest.approx(3.159746, abs=1e-6)  # transformers: not divided by K
    assert losses["first_choice_balance"] / 8**2 == pytest.approx(0.0266065, abs=1e-7)  # GShard's text: 1/E instead of E


KEPT = {
    "choice_major": [[1, 0], [1, 1], [1, 1], [0, 0]],
    "token_major": [[1, 1], [1, 1], [0, 1], [0, 0]],
}


@pytest.mark.parametrize("order", KEPT)
def test_drops_at_capacity_1(order: str) -> None:
    routing = run(capacity=CapacityConfig("per_assignment", 1.0, order=order)).routing
    assert routing.keep.astype(int).tolist() == KEPT[order]
    assert routing.load.tolist() == [3, 1, 0, 1, 1, 2, 0, 0], "the load is counted before the drop"
    np.testing.assert_array_equal(routing.gate == 0, ~routing.keep)


@pytest.mark.parametrize("rule, groups", [("top2_sum", [[1, 3], [1, 2], [1, 3], [1, 2]]), ("max", [[1, 3], [2, 3], [0, 3], [1, 2]])])
def test_best_groups(rule: str, groups: list) -> None:
    choice_TE = 1 / (1 + np.exp(-LOGITS_TE)) + BIAS_E
    limited_TE = limit_to_groups(choice_TE, GatingConfig(top_k=2, groups=4, top_groups=2, group_score=rule))
    opened = np.isfinite(limited_TE)
    assert [sorted({e // 2 for e in np.flatnonzero(row)}) for row in opened] == groups
    np.testing.assert_array_equal(limited_TE[opened], choice_TE[opened])


def test_deepseek_v3() -> None:
    output = v3(BIAS_E, losses=("sequence_balance",))
    assert output.routing.expert.tolist() == [[3, 2], [4, 2], [7, 2], [2, 5]]
    gates = [[1.52601, 0.97399], [1.881184, 0.618816], [1.648609, 0.851391], [1.006173, 1.493827]]
    np.testing.assert_allclose(output.routing.gate, gates, atol=6e-7)
    assert output.losses["sequence_balance"] == pytest.approx(1.188534, abs=6e-7)
    assert max_violation(output.routing.load) == 3.0


def test_deepseek_v3_bias_update() -> None:
    load = v3(BIAS_E).routing.load
    config = MoEConfig(8, gating=GatingConfig(correction_bias=True), balance=BalanceConfig(bias_rule="sign", bias_rate=0.5))
    moved = update_bias(np.zeros(8, np.float32), load, config)
    assert moved.tolist() == [0.5, 0.5, -0.5, 0, 0, 0, 0.5, 0] and moved.dtype == np.float32


def test_negative_bias_opens_no_closed_group() -> None:
    assert v3(np.full(8, -2.0)).routing.expert.tolist() == TOP2


# Four tokens of one group and one of another; expert 0 is everybody's favourite.
EXPERT_TK = np.array([[0, 1], [0, 1], [1, 0], [0, 1], [0, 1]])
GROUPS = token_info(5, group_ids=np.array([0, 0, 0, 0, 7]))


def in_order(order: str) -> np.ndarray:
    return queue_order(np.ones((5, 2)), order, Draws(None), training=True)


@pytest.mark.parametrize(
    "order, capacity, kept",
    [
        ("choice_major", 2, [[1, 1], [1, 0], [1, 0], [0, 0], [1, 1]]),
        ("token_major", 2, [[1, 1], [1, 1], [0, 0], [0, 0], [1, 1]]),
        ("choice_major", 3, [[1, 1], [1, 1], [1, 0], [1, 0], [1, 1]]),
        ("token_major", 3, [[1, 1], [1, 1], [1, 1], [0, 0], [1, 1]]),
        ("choice_major", 0, [[0, 0]] * 5),
    ],
)
def test_drop_order_by_hand(order: str, capacity: int, kept: list) -> None:
    keep_TK = keep_within_capacity(EXPERT_TK, np.ones((5, 2), bool), np.array([capacity, capacity]), in_order(order), GROUPS)
    assert keep_TK.astype(int).tolist() == kept


def test_rejected_second_choice_frees_its_slot() -> None:
    wanted_TK = np.ones((5, 2), bool)
    wanted_TK[0, 1] = False
    keep_TK = keep_within_capacity(EXPERT_TK, wanted_TK, np.array([2, 2]), in_order("choice_major"), GROUPS)
    assert keep_TK.astype(int).tolist() == [[1, 0], [1, 1], [1, 0], [0, 0], [1, 1]]


def test_random_second_choice_compares_twice_its_gate() -> None:
    draws = Draws(None, {"second_choice": np.array([0.0, 0.39, 0.41, 0.99])})
    gate_TK = np.array([[1.0, 0.0], [0.8, 0.2], [0.8, 0.2], [0.5, 0.5]])
    assert random_second(gate_TK, GatingConfig(top_k=2), draws).tolist() == [[True, False], [True, True], [True, False], [True, True]]


def test_load_measures_by_hand() -> None:
    load = np.array([4, 0, 2, 2])
    assert max_violation(load) == 1.0
    assert coefficient_of_variation(load) == pytest.approx(np.sqrt(2) / 2)
    assert dead_experts(load) == 1
    assert load_entropy(load) == pytest.approx(0.75)
    assert load_entropy(np.array([0, 9, 0, 0])) == 0.0
    even = np.full(4, 3)
    assert (max_violation(even), coefficient_of_variation(even), dead_experts(even)) == (0.0, 0.0, 0)
    assert load_entropy(even) == pytest.approx(1.0)
    nothing = np.zeros(4, int)
    assert (max_violation(nothing), coefficient_of_variation(nothing), dead_experts(nothing), load_entropy(nothing)) == (0.0, 0.0, 4, 1.0)


def test_drop_rate_by_position_by_hand() -> None:
    picked_TK = np.array([[1, 1], [1, 1], [1, 1], [0, 0], [1, 1], [1, 1]], bool)
    keep_TK = np.array([[1, 1], [1, 0], [1, 0], [0, 0], [0, 0], [1, 0]], bool)
    rate = drop_rate_by_position(picked_TK, keep_TK, np.array([0, 1, 2, 3, 0, 5]), 3)
    np.testing.assert_allclose(rate, [0.5, 0.5, 0.5])
    empty = drop_rate_by_position(picked_TK[:2], keep_TK[:2], np.array([0, 3]), 4)
    np.testing.assert_array_equal(empty, [0.0, np.nan, np.nan, 0.5])
