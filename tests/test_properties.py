"""What must hold for every config and any numbers: symmetries, invariances and limits of the layer."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from configs import CONFIGS, SENT, random_params, random_tokens
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import (
    BalanceConfig,
    CapacityConfig,
    ExpertsConfig,
    GatingConfig,
    MoEConfig,
    MoEOutput,
    ScoresConfig,
    init_params,
    moe_backward,
    moe_forward,
)
from reference.balancing import BIAS_RULES, LOSSES
from reference.capacity import FORMULAS, ORDERS, RECYCLES, per_assignment, per_token
from reference.choices import CHOICES, choose
from reference.experts import ACTIVATIONS, Params
from reference.gating import GROUP_SCORES, NORMALIZERS, SECOND_CHOICES
from reference.layer import route_backward, route_forward
from reference.noise import LOGIT_NOISE
from reference.scores import INPUT_NOISE, INPUT_NORMS, SCORE_FUNCTIONS
from reference.shared import SHARED_GATES
from reference.tokens import token_info

bounded = settings(derandomize=True, deadline=None, max_examples=40, database=None)
names = st.sampled_from(list(CONFIGS))
seeds = st.integers(0, 2**32 - 1)
sizes = st.integers(1, 24)


def quiet(config: MoEConfig) -> MoEConfig:
    """The config without anything random."""
    choice = "top_k" if config.gating.choice == "gumbel" else config.gating.choice
    order = ORDERS[config.capacity.order].in_evaluation or config.capacity.order
    return replace(
        config,
        scores=replace(config.scores, noise="none", logit_noise="none"),
        gating=replace(config.gating, second_choice="always", choice=choice),
        capacity=replace(config.capacity, order=order, recycle="none"),
        experts=replace(config.experts, dropout=0.0),
    )


def dropless(config: MoEConfig) -> MoEConfig:
    return replace(quiet(config), capacity=CapacityConfig())


def run(config: MoEConfig, params: Params, x_TD: np.ndarray, **arguments: Any) -> MoEOutput:
    return moe_forward(x_TD, params, config, **{"training": True, **arguments})[0]


def assert_close(a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-12)


def test_configs_cover_every_row_of_every_table() -> None:
    rows = {
        "function": SCORE_FUNCTIONS, "noise": INPUT_NOISE, "input_norm": INPUT_NORMS, "logit_noise": LOGIT_NOISE, "recycle": RECYCLES,
        "choice": CHOICES, "group_score": GROUP_SCORES, "normalize": NORMALIZERS, "second_choice": SECOND_CHOICES, "formula": FORMULAS,
        "order": ORDERS, "activation": ACTIVATIONS, "shared_gate": SHARED_GATES, "bias_rule": BIAS_RULES,
    }  # fmt: skip
    used: dict[str, set] = {field: set() for field in rows}
    for config in CONFIGS.values():
        for part in (config.scores, config.gating, config.capacity, config.experts, config.balance):
            for field in rows.keys() & vars(part).keys():
                used[field].add(getattr(part, field))
    assert used == {field: set(table) for field, table in rows.items()}
    assert {name for config in CONFIGS.values() for name, _ in config.balance.losses} == set(LOSSES)


@bounded
@given(names, seeds, sizes)
def test_token_order_does_not_matter_without_drops(name: str, seed: int, tokens: int) -> None:
    config, rng = dropless(CONFIGS[name]), np.random.default_rng(seed)
    params, arguments = random_params(config, rng), random_tokens(config, rng, tokens, groups=2, pads=1)
    order = rng.permutation(tokens)
    plain, moved = run(config, params, **arguments), run(config, params, **{key: value[order] for key, value in arguments.items()})
    assert_close(moved.y, plain.y[order])
    np.testing.assert_array_equal(moved.routing.expert, plain.routing.expert[order])
    np.testing.assert_array_equal(moved.routing.load, plain.routing.load)
    assert moved.losses == pytest.approx(plain.losses)


@bounded
@given(names, seeds, sizes)
def test_how_groups_are_interleaved_does_not_matter(name: str, seed: int, tokens: int) -> None:
    config, rng = quiet(CONFIGS[name]), np.random.default_rng(seed)
    params, arguments = random_params(config, rng), random_tokens(config, rng, tokens, groups=3, pads=1)
    order = np.argsort(arguments["group_ids"], kind="stable")  # inside a group the order stays, so the drops do too
    plain, sorted_ = run(config, params, **arguments), run(config, params, **{key: value[order] for key, value in arguments.items()})
    np.testing.assert_array_equal(sorted_.routing.keep, plain.routing.keep[order])
    assert_close(sorted_.y, plain.y[order])
    assert sorted_.losses == pytest.approx(plain.losses)


@bounded
@given(names, seeds, sizes)
def test_experts_may_be_relabelled(name: str, seed: int, tokens: int) -> None:
    config, rng = quiet(CONFIGS[name]), np.random.default_rng(seed)
    params, arguments = random_params(config, rng), random_tokens(config, rng, tokens, groups=2)
    # Whole groups change places, and experts inside each group; what is no network keeps its place.
    members = np.arange(config.experts.networks).reshape(config.gating.groups, -1)
    old = rng.permuted(rng.permutation(members, axis=0), axis=1).ravel()  # new expert i is the old expert old[i]
    old = np.append(old, np.arange(config.experts.networks, config.experts.count))
    new = np.argsort(old)
    unmoved = ("shared", "router.penalty", "router.scale", "experts.constant")
    relabelled = {key: value if key.startswith(unmoved) else value[old[: len(value)]] for key, value in params.items()}
    if "router.hash_table" in params:
        relabelled["router.hash_table"] = new[params["router.hash_table"]]
    plain, other = run(config, params, **arguments), run(config, relabelled, **arguments)
    np.testing.assert_array_equal(other.routing.keep, plain.routing.keep)
    # Where a token may have any number of experts, those that it does not have are all alike.
    told = plain.routing.keep if CHOICES[config.gating.choice].every_expert else np.ones_like(plain.routing.keep)
    np.testing.assert_array_equal(old[other.routing.expert][told], plain.routing.expert[told])
    np.testing.assert_array_equal(other.routing.load, plain.routing.load[old])
    assert_close(other.y, plain.y)
    assert other.losses == pytest.approx(plain.losses)


@bounded
@given(names, seeds, sizes)
def test_normalized_gates_sum_to_the_scale(name: str, seed: int, tokens: int) -> None:
    config, rng = dropless(CONFIGS[name]), np.random.default_rng(seed)
    gate = run(config, random_params(config, rng), **random_tokens(config, rng, tokens)).routing.gate
    total, expected = gate.sum(1), config.gating.scale
    if config.gating.normalize != "none" and not config.gating.expert_scale:
        np.testing.assert_allclose(total, expected, rtol=1e-12)
    elif config.scores.function == "softmax" and not config.gating.expert_scale:
        assert (gate > 0).all() and (total <= expected * (1 + 1e-12)).all()


@bounded
@given(names, seeds, sizes, st.integers(1, 6))
def test_padding_changes_nothing(name: str, seed: int, tokens: int, pads: int) -> None:
    config, rng = quiet(CONFIGS[name]), np.random.default_rng(seed)
    params, arguments = random_params(config, rng), random_tokens(config, rng, tokens, groups=2)
    del arguments["pad_mask"]
    pad_mask = rng.permutation(np.arange(tokens + pads) < pads)
    padded = random_tokens(config, rng, tokens + pads, groups=4)  # pads lie in the same groups and in ones of their own
    padded["pad_mask"] = pad_mask
    padded["x_TD"] *= 100
    for key in arguments:
        padded[key][~pad_mask] = arguments[key]
    alone, (among, cache) = run(config, params, **arguments), moe_forward(params=params, config=config, training=True, **padded)
    assert_close(among.y[~pad_mask], alone.y)
    assert not among.y[pad_mask].any() and not among.routing.keep[pad_mask].any()
    np.testing.assert_array_equal(among.routing.expert[~pad_mask], alone.routing.expert)
    np.testing.assert_array_equal(among.routing.keep[~pad_mask], alone.routing.keep)
    np.testing.assert_array_equal(among.routing.load, alone.routing.load)
    assert_close(among.routing.importance, alone.routing.importance)
    assert among.losses == pytest.approx(alone.losses)
    assert not moe_backward(np.ones_like(among.y), cache)[0][pad_mask].any()


@bounded
@given(names, seeds, sizes)
def test_two_groups_together_equal_each_alone(name: str, seed: int, tokens: int) -> None:
    config, rng = quiet(CONFIGS[name]), np.random.default_rng(seed)
    params, arguments = random_params(config, rng), random_tokens(config, rng, tokens + 1, groups=2, pads=1)
    together, load, sequence = run(config, params, **arguments), 0, []
    for group in (0, 1):
        own = arguments["group_ids"] == group
        alone = run(config, params, **{key: value[own] for key, value in arguments.items()})
        np.testing.assert_array_equal(together.routing.keep[own], alone.routing.keep)
        assert_close(together.y[own], alone.y)
        load = load + alone.routing.load
        if not arguments["pad_mask"][own].all():
            sequence.append(alone.losses.get("sequence_balance", 0.0))
    np.testing.assert_array_equal(together.routing.load, load)
    if "sequence_balance" in together.losses:
        assert together.losses["sequence_balance"] == pytest.approx(np.mean(sequence))


@bounded
@given(names, seeds, sizes)
def test_evaluation_draws_nothing_and_has_no_losses(name: str, seed: int, tokens: int) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(seed)
    params, arguments = random_params(config, rng), random_tokens(config, rng, tokens, groups=2, pads=1)
    state = rng.bit_generator.state
    first, second = (run(config, params, training=False, rng=generator, **arguments) for generator in (None, rng))
    assert rng.bit_generator.state == state
    assert first.losses == {} and first.loss == 0.0 and first.routing.draws == {}
    np.testing.assert_array_equal(first.y, second.y)
    np.testing.assert_array_equal(first.y, run(quiet(config), params, training=False, **arguments).y)


@bounded
@given(
    st.sampled_from([name for name in CONFIGS if CONFIGS[name].gating.choice not in ("positive", "soft")]), seeds, sizes,
    st.sampled_from(["per_assignment", "per_token"]), st.sampled_from([name for name in ORDERS if ORDERS[name].in_evaluation is None]),
)  # fmt: skip
def test_dropless_is_a_large_capacity_factor(name: str, seed: int, tokens: int, formula: str, order: str) -> None:
    config, rng = dropless(CONFIGS[name]), np.random.default_rng(seed)
    params, arguments = random_params(config, rng), random_tokens(config, rng, tokens, groups=2, pads=1)
    large = replace(config, capacity=CapacityConfig(formula, factor=float(config.experts.count), order=order))
    small = replace(config, capacity=CapacityConfig(formula, factor=0.0, minimum=tokens, order=order))
    without = run(config, params, **arguments)
    assert without.routing.keep.sum() == without.routing.load.sum()
    for limited in (large, small):
        np.testing.assert_array_equal(run(limited, params, **arguments).y, without.y)


@bounded
@given(names, seeds, sizes)
def test_no_expert_holds_more_than_its_capacity(name: str, seed: int, tokens: int) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(seed)
    params, arguments = random_params(config, rng), random_tokens(config, rng, tokens, groups=2, pads=1)
    routing = run(config, params, rng=rng, **arguments).routing
    limit, experts = config.capacity, config.experts.count
    for group in (0, 1):
        own = arguments["group_ids"] == group
        real = int((own & ~arguments["pad_mask"]).sum())
        slots = max(limit.minimum, FORMULAS[limit.formula](limit.factor, config.gating.top_k, real, experts))
        held = np.bincount(routing.expert[own][routing.keep[own]], minlength=experts)
        picked = np.bincount(routing.expert[own & ~arguments["pad_mask"]].ravel(), minlength=experts)
        assert (held <= slots).all()
        if config.gating.second_choice == "always" and config.capacity.recycle == "none" and config.gating.choice != "positive":
            np.testing.assert_array_equal(held, np.minimum(picked, slots))  # nothing is dropped while there is room


@bounded
@given(st.integers(0, 400), st.integers(1, 8), st.integers(0, 5000), st.integers(1, 64))
def test_capacity_is_exact_for_written_decimals(hundredths: int, top_k: int, tokens: int, experts: int) -> None:
    factor = hundredths / 100
    assert per_assignment(factor, top_k, tokens, experts) == -(-hundredths * top_k * tokens // (100 * experts))
    assert per_token(factor, top_k, tokens, experts) == -(-hundredths * tokens // (100 * experts))


@pytest.mark.parametrize("factor, top_k, tokens, experts, slots", [(1.1, 2, 25, 5, 11), (1.1, 1, 50, 1, 55), (0.1, 3, 10, 1, 3)])
def test_capacity_where_binary_fractions_would_round_up(factor: float, top_k: int, tokens: int, experts: int, slots: int) -> None:
    assert math.ceil(factor * top_k * tokens / experts) == slots + 1
    assert per_assignment(factor, top_k, tokens, experts) == slots


@bounded
@given(names, seeds, sizes)
def test_replay_gives_the_same_bits_and_keeps_the_gradient(name: str, seed: int, tokens: int) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(seed)
    params, arguments = random_params(config, rng), random_tokens(config, rng, tokens, groups=2, pads=1)
    first, first_cache = moe_forward(params=params, config=config, training=True, rng=rng, **arguments)
    second, second_cache = moe_forward(params=params, config=config, training=True, replay=first.routing, **arguments)
    np.testing.assert_array_equal(first.y, second.y)
    assert first.losses == second.losses and first.loss == second.loss
    for field, value in vars(first.routing).items():
        if field == "draws":  # what a decision drew is in its outcome, so it is not needed again
            value = {drawn: numbers for drawn, numbers in value.items() if drawn in ("jitter", "logit_noise")}
        np.testing.assert_equal(getattr(second.routing, field), value)
    dy_TD = rng.standard_normal(first.y.shape)
    (dx_TD, dparams), (again_TD, again) = moe_backward(dy_TD, first_cache), moe_backward(dy_TD, second_cache)
    np.testing.assert_array_equal(dx_TD, again_TD)
    for key in dparams:
        np.testing.assert_array_equal(dparams[key], again[key])
    if first.routing.keep.any() and config.experts.count > 1 and config.gating.normalize == "none":
        assert again["router.weight"].any()


@bounded
@given(names, seeds, sizes)
def test_replay_keeps_choices_and_recomputes_gates(name: str, seed: int, tokens: int) -> None:
    config, rng = dropless(CONFIGS[name]), np.random.default_rng(seed)
    params, arguments = random_params(config, rng), random_tokens(config, rng, tokens)
    recorded = run(config, params, **arguments).routing
    moved = {**params, "router.weight": -params["router.weight"]}  # would choose other experts
    replayed = run(config, moved, replay=recorded, **arguments).routing
    np.testing.assert_array_equal(replayed.expert, recorded.expert)
    np.testing.assert_array_equal(replayed.keep, recorded.keep)
    scores = SCORE_FUNCTIONS[config.scores.function].forward(replayed.logits)[0]
    chosen = np.take_along_axis(scores, recorded.expert, 1)
    expected = NORMALIZERS[config.gating.normalize].forward(chosen, config.gating.eps)[0] * config.gating.scale
    factor = params.get("router.expert_scale", np.ones(config.experts.count))[recorded.expert]
    np.testing.assert_array_equal(replayed.gate, np.where(recorded.keep, expected * factor, 0))


def wheel(experts: int, top_k: int, function: str) -> tuple[np.ndarray, Params, MoEConfig]:
    """Tokens whose logits are one row turned step by step: an exactly even load for every K."""
    logits = np.linspace(1.5, -1.5, experts)
    config = MoEConfig(
        experts, ScoresConfig(function), GatingConfig(top_k=top_k), experts=ExpertsConfig(experts, 2),
        balance=BalanceConfig((("first_choice_balance", 1.0), ("expert_balance", 1.0), ("sequence_balance", 1.0))),
    )  # fmt: skip
    params = init_params(config, np.random.default_rng(0)) | {"router.weight": np.eye(experts)}
    return np.stack([np.roll(logits, shift) for shift in range(experts)]), params, config


@bounded
@given(st.integers(1, 9), st.data(), st.sampled_from([name for name in SCORE_FUNCTIONS if name != "relu"]))
def test_balance_losses_are_1_at_exact_balance_for_every_k(experts: int, data: st.DataObject, function: str) -> None:
    x_TD, params, config = wheel(experts, data.draw(st.integers(1, experts)), function)
    output = run(config, params, x_TD)
    assert (output.routing.load == config.gating.top_k).all()
    assert output.losses == pytest.approx(dict.fromkeys(output.losses, 1.0), rel=1e-12)


@bounded
@given(st.integers(2, 9), st.data(), st.sampled_from(list(SCORE_FUNCTIONS)))
def test_balance_losses_of_a_collapsed_router(experts: int, data: st.DataObject, function: str) -> None:
    top_k = data.draw(st.integers(1, experts))
    _, params, config = wheel(experts, top_k, function)
    logits = np.where(np.arange(experts) < top_k, 50.0, -50.0)  # every token loves the same K experts equally, and no other
    losses = run(config, params, np.tile(logits, (5, 1))).losses
    assert losses == pytest.approx(dict.fromkeys(losses, experts / top_k), rel=1e-9)


@bounded
@given(seeds, sizes, st.sampled_from(["none", "sum"]))
def test_correction_bias_steers_choices_and_enters_no_gate(seed: int, tokens: int, normalize: str) -> None:
    base = CONFIGS["deepseek-v3"]
    config, rng = replace(base, gating=replace(base.gating, normalize=normalize)), np.random.default_rng(seed)
    params, x_TD = random_params(config, rng), rng.standard_normal((tokens, config.d_model))
    favoured = params | {"router.correction_bias": np.array([9, 9, 0, 0, 8, 8, 0, 0], np.float32)}
    output, cache = moe_forward(x_TD, favoured, config, training=True)
    routing = output.routing
    assert np.isin(routing.expert, [0, 1]).all()
    chosen = np.take_along_axis(1 / (1 + np.exp(-(x_TD @ params["router.weight"].T))), routing.expert, 1)
    assert_close(routing.gate, 2.5 * (chosen / chosen.sum(1, keepdims=True) if normalize == "sum" else chosen))
    assert "router.correction_bias" not in moe_backward(np.ones_like(output.y), cache)[1]


@bounded
@given(seeds, sizes, st.integers(-640, 640))
def test_a_constant_added_to_the_correction_bias_changes_nothing(seed: int, tokens: int, steps: int) -> None:
    config, rng = CONFIGS["deepseek-v3"], np.random.default_rng(seed)
    params, x_TD = random_params(config, rng), rng.standard_normal((tokens, config.d_model))
    bias = np.round(params["router.correction_bias"] * 64) / 64  # multiples of 1/64: their sums are exact in fp32
    plain, shifted = (run(config, params | {"router.correction_bias": bias + np.float32(c)}, x_TD) for c in (0, steps / 64))
    np.testing.assert_array_equal(shifted.routing.expert, plain.routing.expert)
    np.testing.assert_array_equal(shifted.y, plain.y)
    assert shifted.losses == plain.losses


@bounded
@given(seeds, st.sampled_from(list(GROUP_SCORES)), st.integers(2, 4), st.floats(-1e3, -1.0))
def test_no_expert_outside_the_best_groups_is_chosen(seed: int, rule: str, top_groups: int, level: float) -> None:
    config = GatingConfig(top_k=3, correction_bias=True, groups=4, top_groups=top_groups, group_score=rule)
    rng = np.random.default_rng(seed)
    scores_TE, bias_E = rng.random((20, 12)), (level + rng.standard_normal(12)).astype(np.float32)
    expert_TK, _ = choose(scores_TE, bias_E, config, token_info(20))
    for choice, experts in zip(scores_TE + bias_E, expert_TK, strict=True):
        best_two = [sorted(choice[3 * group : 3 * group + 3], reverse=True)[:2] for group in range(4)]
        value = [pair[0] if rule == "max" else sum(pair) for pair in best_two]
        best = sorted(range(4), key=lambda group, value=value: (-value[group], group))[:top_groups]
        allowed = [e for e in range(12) if e // 3 in best]
        assert experts.tolist() == sorted(allowed, key=lambda e, choice=choice: (-choice[e], e))[:3]


@bounded
@given(st.integers(1, 8), st.data())
def test_ties_go_to_the_lowest_id(experts: int, data: st.DataObject) -> None:
    top_k = data.draw(st.integers(1, experts))
    scores_TE = np.array(data.draw(st.lists(st.lists(st.sampled_from([0.0, 0.5, 1.0]), min_size=experts, max_size=experts), min_size=1)))
    expert_TK, picked_TK = choose(scores_TE, None, GatingConfig(top_k=top_k), token_info(len(scores_TE)))
    assert picked_TK.all()
    for scores, chosen in zip(scores_TE, expert_TK, strict=True):
        assert chosen.tolist() == sorted(range(experts), key=lambda e, scores=scores: (-scores[e], e))[:top_k]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("size", [1e4, -1e4])
@pytest.mark.parametrize("name", CONFIGS)
def test_extreme_logits_stay_finite(name: str, size: float, dtype: type) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(0)
    params, arguments = random_params(config, rng, dtype), random_tokens(config, rng, 9, groups=2, pads=1)
    # All logits near `size` in even tokens and mixed signs in odd ones; at −1e4 every sigmoid is exactly 0.
    params["router.weight"] = np.full_like(params["router.weight"], size) + params["router.weight"]
    arguments["x_TD"] = np.abs(arguments["x_TD"]).astype(dtype)
    arguments["x_TD"][1::2, 0] *= -3
    with np.errstate(over="raise", invalid="raise", divide="raise"):
        output, cache = moe_forward(params=params, config=config, training=True, rng=rng, **arguments)
        dx_TD, dparams = moe_backward(np.ones_like(output.y), cache)
    assert output.y.dtype == dtype and np.isfinite(output.y).all() and np.isfinite(output.loss)
    assert np.isfinite(dx_TD).all() and all(np.isfinite(gradient).all() for gradient in dparams.values())
    if config.scores.function == "sigmoid" and size < 0:
        assert (output.routing.scores == 0).any()
    assert np.isfinite(output.routing.gate).all()


def test_scores_are_computed_in_fp32_when_x_is_narrow() -> None:
    config, rng = CONFIGS["mixtral"], np.random.default_rng(0)
    params = random_params(config, rng, np.float16)
    x_TD = rng.standard_normal((5, config.d_model)).astype(np.float16)
    output = run(config, params, x_TD)
    assert output.y.dtype == np.float16
    assert {output.routing.logits.dtype, output.routing.scores.dtype, output.routing.gate.dtype} == {np.dtype(np.float32)}
    exact = x_TD.astype(np.float64) @ params["router.weight"].astype(np.float64).T
    np.testing.assert_allclose(output.routing.logits, exact, rtol=1e-5, atol=1e-5)


@bounded
@given(seeds, st.integers(1, 500))
def test_jitter_touches_the_router_only(seed: int, steps: int) -> None:
    base, rng = CONFIGS["switch"], np.random.default_rng(seed)
    config = replace(base, scores=replace(base.scores, noise_scale=steps / 1000), capacity=CapacityConfig())
    params, x_TD = random_params(config, rng), rng.standard_normal((6, config.d_model))
    noisy = run(config, params, x_TD, rng=rng)
    factor = noisy.routing.draws["jitter"] * 2 * steps / 1000 + 1 - steps / 1000
    assert_close(noisy.routing.logits, (x_TD * factor) @ params["router.weight"].T)
    clean = run(quiet(config), params, x_TD, replay=noisy.routing)
    assert_close(noisy.y / noisy.routing.gate, clean.y / clean.routing.gate)


@bounded
@given(seeds, sizes)
def test_evaluation_has_its_own_capacity_factor(seed: int, tokens: int) -> None:
    config, rng = quiet(CONFIGS["switch"]), np.random.default_rng(seed)
    params, x_TD = random_params(config, rng), rng.standard_normal((tokens, config.d_model))
    assert config.capacity.eval_factor not in (None, config.capacity.factor)
    as_training = replace(config, capacity=replace(config.capacity, factor=config.capacity.eval_factor, eval_factor=None))
    in_training = replace(config, capacity=replace(config.capacity, eval_factor=None))
    evaluated, trained = run(config, params, x_TD, training=False).routing, run(config, params, x_TD).routing
    np.testing.assert_array_equal(evaluated.keep, run(as_training, params, x_TD).routing.keep)
    np.testing.assert_array_equal(trained.keep, run(in_training, params, x_TD, training=False).routing.keep)


@bounded
@given(st.sampled_from(list(SENT)), seeds, sizes)
def test_the_gate_of_a_dropped_assignment_teaches_nothing(name: str, seed: int, tokens: int) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(seed)
    params, arguments = random_params(config, rng), random_tokens(config, rng, tokens, groups=2, pads=1)
    info = token_info(tokens, **{key: value for key, value in arguments.items() if key != "x_TD"})
    routing, _, cache = route_forward(arguments["x_TD"], params, config, info, training=True, rng=rng)
    dgate_TK = rng.standard_normal(routing.gate.shape)
    given_all, given_kept = (route_backward(dgate, {}, cache) for dgate in (dgate_TK, np.where(routing.keep, dgate_TK, 0)))
    np.testing.assert_array_equal(given_all[0], given_kept[0])
    np.testing.assert_array_equal(given_all[2]["router.weight"], given_kept[2]["router.weight"])
