"""Balance losses over groups of experts and over whole batches, and the rules that move the correction bias: by hand and as properties."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from reference import BalanceConfig, CapacityConfig, ExpertsConfig, GatingConfig, MoEConfig, init_params, moe_backward, moe_forward
from reference.autograd import balancing as torch_balancing
from reference.balancing import (
    BIAS_RULES,
    LOSSES,
    LossInputs,
    count_load,
    global_balance_backward,
    global_balance_forward,
    mean_probability,
)
from reference.scores import softmax_forward
from reference.tokens import token_info

LOGITS_TE = np.array([
    [1.0, -0.5, 0.25, 2.0, -1.0, 0.0, 0.75, -2.0],
    [0.5, 0.5, -1.0, 0.0, 1.5, 1.0, -0.25, 0.1],
    [2.0, 1.75, -0.5, -0.5, 0.0, 0.0, 0.25, 1.0],
    [3.0, -1.0, 0.5, -2.0, 0.5, 2.5, -0.75, 0.0],
])  # fmt: skip
EXPERT_TK = np.array([[3, 0], [4, 5], [0, 1], [0, 5]])


def loss(name: str, logits_TE: np.ndarray, expert_TK: np.ndarray, groups: int, top_groups: int = 1) -> float:
    scores_TE, _ = softmax_forward(logits_TE)
    picked_TK = np.ones(expert_TK.shape, bool)
    tokens, slots = token_info(len(logits_TE)), expert_TK.shape[1]
    inputs = LossInputs(logits_TE, scores_TE, scores_TE, expert_TK, picked_TK, tokens, top_k=slots, groups=groups, top_groups=top_groups)
    return float(LOSSES[name].forward(inputs)[0])


@pytest.mark.parametrize("choice", ["expert_choice", "positive"])
def test_sequence_loss_counts_k_choices_where_a_token_may_have_all(choice: str, rng: np.random.Generator) -> None:
    """Counting all E of them instead would make the loss 1 whatever the router does."""
    config = MoEConfig(
        4,
        gating=GatingConfig(top_k=2, choice=choice),
        capacity=CapacityConfig("per_assignment" if choice == "expert_choice" else "none"),
        experts=ExpertsConfig(8, 4),
        balance=BalanceConfig((("sequence_balance", 1.0),)),
    )
    x_TD, params = rng.normal(size=(6, 4)), init_params(config, rng)
    output, cache = moe_forward(x_TD, params, config, training=True)
    scores_TE = output.routing.scores
    count_E = np.bincount(np.argsort(-scores_TE, axis=1)[:, :2].ravel(), minlength=8)
    assert output.losses["sequence_balance"] == pytest.approx(8 / (2 * 6) * count_E @ scores_TE.mean(0))
    assert np.abs(moe_backward(np.zeros_like(x_TD), cache)[1]["router.weight"]).max() > 1e-3


def test_device_loss_by_hand() -> None:
    probability_E = softmax_forward(LOGITS_TE)[0].mean(0)
    # Loads 3 1 0 1 | 1 2 0 0 of 8: the first device holds 5/8 of the assignments, so f' = 5/4 and 3/4.
    expected = 5 / 4 * probability_E[:4].sum() + 3 / 4 * probability_E[4:].sum()
    assert loss("device_balance", LOGITS_TE, EXPERT_TK, 2) == pytest.approx(expected, rel=1e-14)


def test_device_loss_lies_between_no_groups_and_all_groups() -> None:
    assert loss("device_balance", LOGITS_TE, EXPERT_TK, 1) == pytest.approx(1, rel=1e-14)
    assert loss("device_balance", LOGITS_TE, EXPERT_TK, 8) == pytest.approx(1.579873, abs=6e-7)


def test_communication_loss_by_hand() -> None:
    probability_E = softmax_forward(LOGITS_TE)[0].mean(0)
    # Devices 01 | 23 | 45 | 67 are reached by the tokens 0 2 3, 0, 1 3 and none; f'' = 4/(2 · 4) of 3, 1, 2, 0.
    expected = (np.array([3, 1, 2, 0]) / 2 * probability_E.reshape(4, 2).sum(1)).sum()
    assert loss("communication_balance", LOGITS_TE, EXPERT_TK, 4, 2) == pytest.approx(expected, rel=1e-14)


def test_communication_is_cheaper_where_experts_of_a_token_share_a_device() -> None:
    together, apart = np.array([[0, 1], [2, 3], [4, 5], [6, 7]]), np.array([[0, 2], [2, 4], [4, 6], [6, 0]])
    even = np.zeros((4, 8))
    assert loss("communication_balance", even, apart, 4, 2) == pytest.approx(1, rel=1e-14)
    assert loss("communication_balance", even, together, 4, 2) == pytest.approx(0.5, rel=1e-14)
    assert loss("device_balance", even, together, 4) == loss("device_balance", even, apart, 4) == pytest.approx(1, rel=1e-14)


@pytest.mark.parametrize("name", ["device_balance", "communication_balance"])
@pytest.mark.parametrize("tokens", [0, 3])
def test_padding_is_no_part_of_the_group_losses(name: str, tokens: int, rng: np.random.Generator) -> None:
    config = MoEConfig(
        4, gating=GatingConfig(top_k=2, groups=4, top_groups=2), experts=ExpertsConfig(8, 2), balance=BalanceConfig(((name, 1.0),))
    )
    params, x_TD = init_params(config, rng), rng.standard_normal((tokens + 2, 4))
    bare, _ = moe_forward(x_TD[:tokens], params, config, training=True)
    padded, cache = moe_forward(x_TD, params, config, training=True, pad_mask=np.arange(tokens + 2) >= tokens)
    assert padded.losses[name] == pytest.approx(bare.losses[name], rel=1e-13) and (tokens > 0) == (bare.losses[name] > 0)
    assert not moe_backward(np.zeros_like(x_TD), cache)[0][tokens:].any()


def test_micro_batches_against_the_global_load_are_the_whole_batch(rng: np.random.Generator) -> None:
    config = MoEConfig(6, gating=GatingConfig(top_k=2), experts=ExpertsConfig(5, 3), balance=BalanceConfig((("expert_balance", 1.0),)))
    params, x_TD = init_params(config, rng), rng.standard_normal((24, 6))
    whole = moe_forward(x_TD, params, config, training=True)[0]
    parts = [moe_forward(part_TD, params, config, training=True)[0] for part_TD in np.split(x_TD, 4)]
    load_E = sum(part.routing.load for part in parts)
    values = [global_balance_forward(part.routing.importance, load_E)[0] for part in parts]
    assert np.mean(values) == pytest.approx(whole.losses["expert_balance"], rel=1e-13)
    assert np.mean([part.losses["expert_balance"] for part in parts]) > np.mean(values) + 1e-3, "each part by itself is less even"


def test_global_balance_gradient_and_its_twin(rng: np.random.Generator) -> None:
    importance, load = rng.random(5), np.array([3, 0, 1, 4, 2])
    value, cache = global_balance_forward(importance, load)
    gradient = global_balance_backward(0.7, cache)
    for e in range(5):
        ahead, behind = importance.copy(), importance.copy()
        ahead[e], behind[e] = ahead[e] + 1e-6, behind[e] - 1e-6
        slope = 0.7 * (global_balance_forward(ahead, load)[0] - global_balance_forward(behind, load)[0]) / 2e-6
        assert gradient[e] == pytest.approx(slope, abs=1e-8)
    tensor = torch.tensor(importance, requires_grad=True)
    twin = torch_balancing.global_balance_forward(tensor, torch.tensor(load))
    (0.7 * twin).backward()
    assert twin.item() == pytest.approx(value, rel=1e-14)
    assert tensor.grad is not None
    np.testing.assert_allclose(tensor.grad.numpy(), gradient, rtol=1e-13)
    assert global_balance_forward(importance, np.zeros(5, int))[0] == 0
    with pytest.raises(ValueError, match=r"load has shape \(4,\), importance \(5,\)"):
        global_balance_forward(importance, load[:4])


LOAD = np.array([4, 0, 1, 3])
MOVED = {"none": [0, 0, 0, 0], "sign": [-1, 1, 1, -1], "centered_sign": [-1, 1, 1, -1], "proportional": [-0.25, 0.25, 0.125, -0.125]}


@pytest.mark.parametrize("name", BIAS_RULES)
def test_bias_rules_by_hand(name: str) -> None:
    moved = BIAS_RULES[name](np.zeros(4, np.float32), LOAD, 1.0)
    assert moved.tolist() == MOVED[name] and moved.dtype == np.float32


@pytest.mark.parametrize("name", BIAS_RULES)
def test_bias_rules_in_pytorch_hold_the_same_bits(name: str, rng: np.random.Generator) -> None:
    bias, twin = np.zeros(7, np.float32), torch.zeros(7)
    for _ in range(200):
        load = rng.integers(0, 9, 7)
        bias = BIAS_RULES[name](bias, load, 0.001)
        twin = torch_balancing.BIAS_RULES[name](twin, torch.tensor(load), 0.001)
    np.testing.assert_array_equal(twin.numpy(), bias)
    idle = BIAS_RULES[name](bias, np.zeros(7, int), 0.001)
    np.testing.assert_array_equal(idle, bias)
    np.testing.assert_array_equal(torch_balancing.BIAS_RULES[name](twin, torch.zeros(7, dtype=torch.int64), 0.001).numpy(), bias)


def test_centered_steps_keep_the_sum_where_plain_ones_drift() -> None:
    plain = centered = np.zeros(4)
    for _ in range(100):
        plain, centered = (BIAS_RULES[name](bias, np.array([9, 1, 1, 1]), 0.01) for name, bias in
                           (("sign", plain), ("centered_sign", centered)))  # fmt: skip
    assert plain.sum() == pytest.approx(2) and centered.sum() == pytest.approx(0, abs=1e-12)
    np.testing.assert_allclose(centered - centered[0], plain - plain[0], atol=1e-12)


@pytest.mark.parametrize("name", ["sign", "centered_sign", "proportional"])
def test_bias_rules_even_out_a_lopsided_router(name: str) -> None:
    rng = np.random.default_rng(0)
    scores_TE = softmax_forward(rng.standard_normal((400, 6)) + np.linspace(1.5, -1.5, 6))[0]
    bias, tokens = np.zeros(6), token_info(400)
    loads = []
    for _ in range(300):
        expert_TK = (scores_TE + bias).argmax(1)[:, None]
        loads.append(count_load(expert_TK, np.ones((400, 1), bool), 6))
        bias = BIAS_RULES[name](bias, loads[-1], 0.02 if name == "proportional" else 0.002)
    assert loads[-1].max() < 0.6 * loads[0].max() and loads[-1].min() > 0.7 * 400 / 6
    assert mean_probability(scores_TE, tokens).argmax() == 0, "the router itself stays lopsided"
