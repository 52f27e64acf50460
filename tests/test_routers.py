"""The rarer routers: numbers computed outside this project or by hand, and what each of them promises."""

from __future__ import annotations

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
import torch
from configs import CONFIGS, random_params, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from test_golden import LOGITS_TE, run

from reference import BalanceConfig, CapacityConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig, init_params, moe_forward, presets
from reference.autograd import MoE
from reference.autograd.scores import sqrt_softplus_forward as torch_sqrt_softplus
from reference.autograd.transformer import LanguageModel
from reference.capacity import Placed, keep_within_capacity, queue_order, recycle_at_random
from reference.choices import ChoiceContext, balanced_assignment, balanced_hash, choose, sinkhorn_potential
from reference.gating import gates_forward, random_second, survivors
from reference.layer import update_penalty
from reference.noise import Noisy, smooth_load, squared_variation, standard_normal
from reference.scores import rms_norm_forward, softcap_forward, sqrt_softplus_forward
from reference.tokens import Draws, token_info

bounded = settings(derandomize=True, deadline=None, max_examples=25, database=None)
seeds = st.integers(0, 2**32 - 1)


def test_smooth_load_and_importance_of_the_golden_logits() -> None:
    estimate = smooth_load(LOGITS_TE, Noisy(LOGITS_TE, np.full((4, 8), 0.5)), 2, token_info(4))
    expected = [2.827367, 1.093198, 0.066874, 1.016544, 0.977546, 1.864296, 0.316097, 0.102738]
    np.testing.assert_allclose(estimate.load_E, expected, atol=6e-7)
    assert run(normalize="sum", losses=("importance",)).losses["importance"] == pytest.approx(0.898313, abs=6e-7)


def test_smooth_load_is_the_chance_of_being_chosen_again(rng: np.random.Generator) -> None:
    clean_TE, deviation_TE = rng.standard_normal((3, 5)), rng.uniform(0.3, 1, (3, 5))
    noise = Noisy(clean_TE + rng.standard_normal((3, 5)) * deviation_TE, deviation_TE)
    again, chosen_E = 20_000, np.zeros(5)
    for expert in range(5):
        trial = np.repeat(noise.noisy_TE[None], again, axis=0)
        trial[:, :, expert] = clean_TE[:, expert] + rng.standard_normal((again, 3)) * deviation_TE[:, expert]
        chosen_E[expert] = (np.argsort(-trial, axis=2)[:, :, :2] == expert).any(2).mean(0).sum()
    np.testing.assert_allclose(smooth_load(clean_TE, noise, 2, token_info(3)).load_E, chosen_E, atol=0.02)


def test_expert_choice_of_the_golden_logits() -> None:
    output = run(choice="expert_choice", top_k=2, capacity=CapacityConfig("per_assignment", 1.0))
    routing = output.routing
    picked = {(int(routing.expert[t, k]), int(t)) for t, k in np.argwhere(routing.keep)}
    assert picked == set(enumerate([3, 2, 0, 0, 1, 3, 0, 2]))
    assert routing.load.tolist() == [1] * 8 and routing.expert.shape == (4, 8)


KEPT = {
    "probability": [[1, 0], [1, 0], [0, 1], [1, 1]],
    # Highest gates of the tokens: 3, 0, 2, 1. First round: 0, 3, 0 (full), 4; second: 5, 0 (full), 1, 5 (full).
    "batch_prioritized": [[1, 0], [1, 0], [0, 1], [1, 1]],
}


@pytest.mark.parametrize("order", KEPT)
def test_drops_at_capacity_1(order: str) -> None:
    routing = run(capacity=CapacityConfig("per_assignment", 1.0, order=order)).routing
    assert routing.keep.astype(int).tolist() == KEPT[order]


def test_batch_prioritized_serves_first_choices_first_by_hand() -> None:
    gate_TK = np.array([[0.6, 0.4], [0.9, 0.1], [0.7, 0.3]])
    assert queue_order(gate_TK, "batch_prioritized", Draws(None), training=True).tolist() == [2, 4, 0, 3, 5, 1]
    assert queue_order(gate_TK, "probability", Draws(None), training=True).tolist() == [2, 4, 0, 1, 5, 3]
    draws = Draws(None, {"order": np.array([0.5, 0.9, 0.1])})
    assert queue_order(gate_TK, "random", draws, training=True).tolist() == [4, 0, 2, 5, 1, 3]
    assert queue_order(gate_TK, "random", Draws(None), training=False).tolist() == [0, 2, 4, 1, 3, 5]


def test_thresholded_second_choice() -> None:
    config = GatingConfig(top_k=2, second_choice="random", second_threshold=0.2)
    gate_TK = np.array([[1.0, 0.0], [0.9, 0.1], [0.9, 0.1], [0.79, 0.21]])
    wanted = random_second(gate_TK, config, Draws(None, {"second_choice": np.array([0.0, 0.49, 0.51, 0.999])}))
    assert wanted.tolist() == [[True, False], [True, True], [True, False], [True, True]]
    scaled = replace(config, scale=2.5)
    draws = Draws(None, {"second_choice": np.array([0.0, 0.49, 0.51, 0.999])})
    assert random_second(2.5 * gate_TK, scaled, draws).tolist() == wanted.tolist(), "the scale made a second expert likelier"


@pytest.mark.parametrize("normalize, gates", [("sum", [[1, 0], [0.5, 0.5], [0, 0]]), ("softmax", [[1, 0], [0.5, 0.5], [0, 0]])])
def test_survivors_of_a_drop_share_the_whole_weight(normalize: str, gates: list) -> None:
    keep_TK = np.array([[True, False], [True, True], [False, False]])
    config = GatingConfig(top_k=2, normalize=normalize, after_drop=True)
    gate_TK, _ = gates_forward(np.full((3, 2), 0.3), np.array([[0, 1]] * 3), config, survivors(keep_TK))
    np.testing.assert_allclose(np.where(keep_TK, gate_TK, 0), gates)


@bounded
@given(seeds, st.integers(1, 20))
def test_gates_after_the_drop_sum_to_the_scale(seed: int, tokens: int) -> None:
    config, rng = CONFIGS["by-probability"], np.random.default_rng(seed)
    arguments = random_tokens(config, rng, tokens, groups=2, pads=1)
    routing = moe_forward(params=random_params(config, rng), config=config, training=True, **arguments)[0].routing
    np.testing.assert_allclose(routing.gate.sum(1), routing.keep.any(1), rtol=1e-12)


@bounded
@given(seeds, st.integers(1, 7), st.integers(1, 4))
def test_balanced_assignment_is_the_best(seed: int, tokens: int, experts: int) -> None:
    affinity_TE, slots = np.random.default_rng(seed).standard_normal((tokens, experts)), -(-tokens // experts)
    expert_T = balanced_assignment(affinity_TE, slots)
    assert np.bincount(expert_T).max() <= slots
    places = np.repeat(np.arange(experts), slots)
    best = max(affinity_TE[np.arange(tokens), list(way)].sum() for way in set(permutations(places, tokens)))
    assert affinity_TE[np.arange(tokens), expert_T].sum() == pytest.approx(best, abs=1e-9)


@bounded
@given(seeds, st.integers(1, 6), st.integers(1, 5))
def test_base_gives_every_expert_as_many_tokens(seed: int, each: int, experts: int) -> None:
    config = replace(CONFIGS["balanced"], experts=ExpertsConfig(experts, 3, "relu"))
    rng = np.random.default_rng(seed)
    params, x_TD = random_params(config, rng), rng.standard_normal((each * experts, config.d_model)) + 3
    trained, evaluated = (moe_forward(x_TD, params, config, training=training)[0].routing for training in (True, False))
    assert trained.load.tolist() == [each] * experts
    np.testing.assert_array_equal(evaluated.expert[:, 0], evaluated.logits.argmax(1))
    np.testing.assert_allclose(trained.gate, 1 / (1 + np.exp(-np.take_along_axis(trained.logits, trained.expert, 1))))


def test_no_cycle_of_moves_improves_an_assignment_of_many_tokens(rng: np.random.Generator) -> None:
    affinity_TE = rng.standard_normal((200, 8)) + np.array([2.0, 0, 0, 0, 0, 0, 0, -2])
    expert_T = balanced_assignment(affinity_TE, 25)
    assert np.bincount(expert_T).tolist() == [25] * 8
    # No cycle of moves adds anything: the best gain of handing tokens around from any expert back to itself is not positive.
    gain = np.array([[(affinity_TE[expert_T == i, j] - affinity_TE[expert_T == i, i]).max() for j in range(8)] for i in range(8)])
    for _ in range(8):
        gain = np.maximum(gain, (gain[:, :, None] + gain[None]).max(1))
    assert gain.diagonal().max() < 1e-9


@bounded
@given(seeds, st.integers(1, 40), st.integers(1, 9))
def test_hash_tables_are_even_and_name_each_expert_once_per_token(seed: int, vocabulary: int, experts: int) -> None:
    config = GatingConfig(top_k=(experts + 1) // 2, choice="hash", vocabulary=vocabulary)
    table = balanced_hash(vocabulary, config, experts, np.random.default_rng(seed))
    assert table.shape == (vocabulary, config.top_k) and all(len(set(row)) == config.top_k for row in table.tolist())
    for column in table.T:
        counts = np.bincount(column, minlength=experts)
        assert counts.max() - counts.min() <= 1


@bounded
@given(seeds, st.integers(1, 20))
def test_hash_routes_by_id_alone_and_weighs_by_score(seed: int, tokens: int) -> None:
    config, rng = CONFIGS["hash"], np.random.default_rng(seed)
    params, arguments = random_params(config, rng), random_tokens(config, rng, tokens)
    routing = moe_forward(params=params, config=config, **arguments)[0].routing
    np.testing.assert_array_equal(routing.expert, params["router.hash_table"][arguments["token_ids"]])
    scores_TE = np.sqrt(np.log1p(np.exp(arguments["x_TD"] @ params["router.weight"].T)))
    chosen_TK = np.take_along_axis(scores_TE, routing.expert, axis=1)
    np.testing.assert_allclose(routing.gate, 1.5 * chosen_TK / chosen_TK.sum(1, keepdims=True))


def test_hash_refuses_what_it_cannot_look_up(rng: np.random.Generator) -> None:
    config = CONFIGS["hash"]
    arguments = {"params": random_params(config, rng), "config": config, **random_tokens(config, rng, 5, pads=1)}
    with pytest.raises(ValueError, match=r"'hash', which looks token ids up: pass token_ids="):
        moe_forward(**{**arguments, "token_ids": None})
    with pytest.raises(ValueError, match=r"token_ids has ids 0 … 11; router.hash_table has 11 rows"):
        moe_forward(**{**arguments, "token_ids": np.full(5, 11)})
    moe_forward(**{**arguments, "token_ids": np.where(arguments["pad_mask"], 99, 3)})
    with pytest.raises(ValueError, match=r"router.hash_table names experts 5 … 5"):
        moe_forward(**{**arguments, "params": arguments["params"] | {"router.hash_table": np.full((11, 2), 5)}})


@bounded
@given(seeds, st.integers(2, 6))
def test_sinkhorn_makes_expected_loads_even(seed: int, experts: int) -> None:
    logits_TE = 2 * np.random.default_rng(seed).standard_normal((30, experts)) + np.arange(experts)
    even_TE = logits_TE + sinkhorn_potential(logits_TE, 200)
    share_TE = np.exp(even_TE - np.logaddexp.reduce(even_TE, axis=1)[:, None])
    np.testing.assert_allclose(share_TE.sum(0), 30 / experts, rtol=1e-3)


def test_gumbel_draws_in_proportion_to_the_probability(rng: np.random.Generator) -> None:
    probability = np.array([0.5, 0.3, 0.15, 0.05])
    scores_TE = np.tile(probability, (20_000, 1))
    context = ChoiceContext(np.log(scores_TE), scores_TE, draws=Draws(rng), training=True)
    expert_TK, _ = choose(scores_TE, None, GatingConfig(top_k=2, choice="gumbel"), token_info(20_000), context)
    np.testing.assert_allclose(np.bincount(expert_TK[:, 0]) / 20_000, probability, atol=0.015)
    after_first = np.bincount(expert_TK[expert_TK[:, 0] == 0, 1], minlength=4)
    np.testing.assert_allclose(after_first / after_first.sum(), [0, 0.6, 0.3, 0.1], atol=0.015)


@bounded
@given(seeds, st.integers(1, 24))
def test_relu_routing_uses_exactly_the_positive_scores(seed: int, tokens: int) -> None:
    config, rng = CONFIGS["relu"], np.random.default_rng(seed)
    arguments = random_tokens(config, rng, tokens, pads=1)
    output, _ = moe_forward(params=random_params(config, rng), config=config, training=True, **arguments)
    routing, real_T = output.routing, ~arguments["pad_mask"]
    np.testing.assert_array_equal(routing.load, (routing.logits[real_T] > 0).sum(0))
    np.testing.assert_array_equal(np.sort(routing.gate[real_T], 1), np.sort(np.maximum(routing.logits[real_T], 0), 1))
    assert output.loss == pytest.approx(0.1 * np.float32(0.7) * output.losses["gate_l1"])


def test_penalty_follows_the_number_of_experts_used() -> None:
    config = MoEConfig(4, gating=GatingConfig(top_k=2), experts=ExpertsConfig(4, 2), balance=BalanceConfig((("gate_l1", 1.0),)))
    moe, penalty = MoE(config), init_params(config, np.random.default_rng(0))["router.penalty"]
    assert penalty.dtype == np.float32 and penalty[0] == np.float32(1e-8)
    for load in ([9, 9, 3, 0], [9, 9, 3, 0], [5, 5, 5, 5], [1, 1, 1, 0]):
        penalty = update_penalty(penalty, np.array(load), 10, config)
        moe.update_penalty(torch.tensor(load), 10)
        assert np.array_equal(moe.router.penalty.numpy(), penalty)
    assert penalty[0] == pytest.approx(1.2e-8, rel=1e-6)  # up, up, as it was, down
    assert moe.bfloat16().router.penalty.dtype == torch.float32 and "router.penalty" in moe.state_dict()


def test_a_training_step_moves_the_penalty_of_every_layer() -> None:
    model = LanguageModel(presets.model("remoe-182m", tiny=True))
    tokens = torch.randint(0, 256, (2, 9))
    load = {number: routing.load for number, routing in model(tokens)[1].routing.items()}
    model.update_penalty(load, tokens.numel())
    for number, moe in model.moe_layers().items():
        factor = 1.2 ** np.sign(int(load[number].sum()) - tokens.numel())
        assert moe.get_buffer("router.penalty").item() == pytest.approx(1e-8 * factor, rel=1e-6)


@bounded
@given(seeds, st.integers(1, 30))
def test_recycled_tokens_fill_free_slots_only(seed: int, tokens: int) -> None:
    config, rng = CONFIGS["recycled"], np.random.default_rng(seed)
    arguments = random_tokens(config, rng, tokens, groups=2, pads=1)
    params = random_params(config, rng)
    params["router.weight"][0] += 1
    arguments["x_TD"] += 1  # expert 0 is everybody's favourite
    output, _ = moe_forward(params=params, config=config, training=True, rng=rng, **arguments)
    plain = replace(config, capacity=replace(config.capacity, recycle="none"))
    dropped, _ = moe_forward(params=params, config=plain, training=True, **arguments)
    real_T, kept_T = ~arguments["pad_mask"], dropped.routing.keep[:, 0]
    np.testing.assert_array_equal(output.routing.keep[:, 0], real_T)  # ⌈S/E⌉ slots each hold everybody
    np.testing.assert_array_equal(output.routing.expert[kept_T], dropped.routing.expert[kept_T])
    np.testing.assert_array_equal(output.routing.load, dropped.routing.load)
    assert output.losses == dropped.losses
    for group in (0, 1):
        own = (arguments["group_ids"] == group) & real_T
        assert np.bincount(output.routing.expert[own, 0], minlength=4).max(initial=0) <= -(-own.sum() // 4)


def test_recycling_by_hand() -> None:
    expert_TK, wanted_TK, tokens = np.zeros((4, 1), np.int64), np.ones((4, 1), bool), token_info(4)
    kept_TK = keep_within_capacity(expert_TK, wanted_TK, np.array([1]), np.arange(4), tokens)
    draws = Draws(None, {"recycle": np.array([0.9, 0.99, 0.0, 0.5])})  # free: 1, 2 of three experts; the last token finds none
    placed = recycle_at_random(Placed(expert_TK, kept_TK), wanted_TK, np.array([1]), 3, tokens, draws)
    assert placed.expert_TK[:, 0].tolist() == [0, 2, 1, 0] and placed.keep_TK[:, 0].tolist() == [True, True, True, False]


def test_noise_is_normal_and_as_wide_as_learned(rng: np.random.Generator) -> None:
    normal = standard_normal(Draws(rng), "logit_noise", (4000, 5))
    assert abs(normal.mean()) < 0.02 and normal.std() == pytest.approx(1, abs=0.02)
    assert (normal**4).mean() == pytest.approx(3, abs=0.2)
    config = CONFIGS["noisy"]
    params, x_TD = random_params(config, rng), rng.standard_normal((8, 6))
    routing = moe_forward(x_TD, params, config, training=True, rng=rng)[0].routing
    deviation_TE = np.log1p(np.exp(x_TD @ params["router.noise_weight"].T)) + 0.01
    normal_TE = standard_normal(Draws(None, routing.draws), "logit_noise", (8, 5))
    np.testing.assert_allclose(routing.logits, x_TD @ params["router.weight"].T, rtol=1e-12)
    np.testing.assert_allclose(routing.scores, routing.logits + normal_TE * deviation_TE, rtol=1e-12)


def test_variation_by_hand() -> None:
    assert squared_variation(np.array([0.0, 4.0]))[0] == pytest.approx(1)
    assert squared_variation(np.array([4.0]))[0] == 0 and squared_variation(np.zeros(3))[0] == 0


@bounded
@given(seeds, st.floats(0.1, 50))
def test_normed_inputs_have_no_length_and_capped_logits_a_bound(seed: int, factor: float) -> None:
    config, rng = CONFIGS["normed"], np.random.default_rng(seed)
    params, x_TD = random_params(config, rng), 10 * rng.standard_normal((7, config.d_model))
    first, second = (moe_forward(scale * x_TD, params, config)[0].routing for scale in (1, factor))
    np.testing.assert_allclose(first.logits, second.logits, rtol=1e-4)
    assert (np.abs(moe_forward(x_TD, params | {"router.weight": 99 * params["router.weight"]}, config)[0].routing.logits) <= 2).all()
    np.testing.assert_allclose((rms_norm_forward(x_TD)[0] ** 2).mean(1), 1, rtol=1e-5)
    assert softcap_forward(x_TD, 0.0)[0] is x_TD


def test_sqrt_softplus_by_hand_and_where_it_underflows() -> None:
    scores_TE, _ = sqrt_softplus_forward(np.array([[0.0, 1e4, -1e4]]))
    np.testing.assert_allclose(scores_TE, [[np.sqrt(np.log(2)), 100, 0]])
    logits = torch.tensor([[-200.0, 0.0]], requires_grad=True)
    torch.nn.functional.softplus(logits).sqrt().sum().backward()
    assert logits.grad[0, 0].isnan(), "the plain chain of PyTorch has become safe; say so in the museum"
    logits.grad = None
    torch_sqrt_softplus(logits).sum().backward()
    assert logits.grad.isfinite().all()


BAD = {
    "groups of a hash": (
        lambda: config_of(GatingConfig(choice="hash", vocabulary=4, groups=2, top_groups=1)),
        "'hash', which knows no groups, but gating.groups is 2",
    ),
    "steered assignment": (lambda: config_of(GatingConfig(choice="balanced", correction_bias=True)), "'balanced', which no bias steers"),
    "two of an assignment": (lambda: GatingConfig(choice="balanced", top_k=2), "'balanced' but gating.top_k is 2"),
    "no rows": (lambda: GatingConfig(choice="hash"), "gating.vocabulary is 0 with gating.choice = 'hash'"),
    "rows of nothing": (lambda: GatingConfig(vocabulary=9), "gating.vocabulary is 9 with gating.choice = 'top_k'"),
    "recycled pairs": (
        lambda: config_of(GatingConfig(top_k=2), capacity=CapacityConfig("per_token", recycle="random")),
        "capacity.recycle is 'random', for one expert per token",
    ),
    "recycled importance": (
        lambda: config_of(
            GatingConfig(), capacity=CapacityConfig("per_token", recycle="random"), balance=BalanceConfig((("importance", 1.0),))
        ),
        "names 'importance'.*capacity.recycle is 'random'",
    ),
    "full thresholds": (
        lambda: config_of(GatingConfig(choice="positive"), capacity=CapacityConfig("per_token")),
        "'positive', which is dropless, but capacity.formula is 'per_token'",
    ),
    "second of all": (
        lambda: config_of(GatingConfig(top_k=2, choice="expert_choice", second_choice="random")),
        "'expert_choice', which knows no second choice",
    ),
    "sum of zeros": (
        lambda: config_of(GatingConfig(normalize="sum"), scores=ScoresConfig("relu")),
        "gating.eps is 0.0, but scores.function 'relu'",
    ),
    "negative cap": (lambda: ScoresConfig(softcap=-1.0), "scores.softcap is -1.0"),
    "threshold 0": (lambda: GatingConfig(second_threshold=0.0), "gating.second_threshold is 0.0"),
    "no iteration": (lambda: GatingConfig(iterations=0), "gating.iterations is 0"),
    "no penalty": (lambda: BalanceConfig(penalty_start=0.0), "balance.penalty_start is 0.0"),
    "shrinking rate": (lambda: BalanceConfig(penalty_rate=0.5), "balance.penalty_rate is 0.5"),
}


def config_of(gating: GatingConfig, **parts: object) -> MoEConfig:
    return MoEConfig(4, gating=gating, **parts)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", BAD)
def test_contradiction_is_refused(name: str) -> None:
    build, message = BAD[name]
    with pytest.raises(ValueError, match=message):
        build()
