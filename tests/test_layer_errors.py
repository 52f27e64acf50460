"""Bad input is refused with a ValueError that names the value and its limit, and nothing good is refused."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from configs import CONFIGS, random_params, random_tokens

from reference import (
    AttentionConfig,
    BalanceConfig,
    CapacityConfig,
    ExpertsConfig,
    GatingConfig,
    MoEConfig,
    ScoresConfig,
    apply_experts,
    moe_backward,
    moe_forward,
    presets,
    route,
    update_bias,
)

EIGHT = ExpertsConfig(count=8)

BAD_CONFIGS: dict[str, tuple[Callable[[], Any], str]] = {
    "no width": (lambda: MoEConfig(0), "d_model is 0; it must be an integer ≥ 1"),
    "width no integer": (lambda: MoEConfig(4.0), "d_model is 4.0"),
    "width is a truth value": (lambda: MoEConfig(True), "d_model is True"),
    "no expert": (lambda: ExpertsConfig(count=0), "experts.count is 0; a layer needs at least 1 expert"),
    "negative experts": (lambda: ExpertsConfig(count=-3), "experts.count is -3"),
    "no expert width": (lambda: ExpertsConfig(width=0), "experts.width is 0"),
    "negative shared": (lambda: ExpertsConfig(shared=-1), "experts.shared is -1"),
    "shared width alone": (lambda: ExpertsConfig(shared_width=8), "experts.shared_width is 8 with experts.shared = 0"),
    "shared gate alone": (lambda: ExpertsConfig(shared_gate="sigmoid"), "experts.shared_gate is 'sigmoid' but experts.shared is 0"),
    "shared width 0": (lambda: ExpertsConfig(shared=1, shared_width=0), "experts.shared_width is 0 with experts.shared = 1"),
    "no choice": (lambda: GatingConfig(top_k=0), "gating.top_k is 0; a token needs at least 1 expert"),
    "more choices than experts": (
        lambda: MoEConfig(4, gating=GatingConfig(top_k=9), experts=EIGHT),
        "gating.top_k is 9 but experts.count is 8",
    ),
    "groups that do not divide": (
        lambda: MoEConfig(4, gating=GatingConfig(groups=3, top_groups=1), experts=EIGHT),
        "gating.groups is 3, which does not divide experts.count = 8",
    ),
    "no group": (lambda: GatingConfig(groups=0), "gating.groups is 0"),
    "more top groups than groups": (
        lambda: GatingConfig(groups=4, top_groups=5),
        "gating.top_groups is 5; it must lie between 1 and gating.groups = 4",
    ),
    "no top group": (lambda: GatingConfig(groups=4, top_groups=0), "gating.top_groups is 0"),
    "open groups too small": (
        lambda: MoEConfig(4, gating=GatingConfig(top_k=3, groups=4, top_groups=1), experts=EIGHT),
        "gating.top_k is 3 but top_groups = 1 of groups = 4 leave 2 experts",
    ),
    "negative eps": (lambda: GatingConfig(eps=-1e-9), "gating.eps is -1e-09"),
    "no scale": (lambda: GatingConfig(scale=0.0), "gating.scale is 0.0; it must be a finite number > 0"),
    "random second of three": (
        lambda: GatingConfig(top_k=3, second_choice="random"),
        "gating.second_choice is 'random' but gating.top_k is 3",
    ),
    "negative capacity": (lambda: CapacityConfig(factor=-1.0), "capacity.factor is -1.0; a capacity cannot be negative or infinite"),
    "infinite capacity": (lambda: CapacityConfig(eval_factor=float("inf")), "capacity.eval_factor is inf"),
    "capacity NaN": (lambda: CapacityConfig(factor=float("nan")), "capacity.factor is nan"),
    "no training capacity": (lambda: CapacityConfig(factor=None), "capacity.factor is None"),
    "negative minimum": (lambda: CapacityConfig(minimum=-2), "capacity.minimum is -2"),
    "negative noise": (lambda: ScoresConfig(noise_scale=-0.1), "scores.noise_scale is -0.1"),
    "loss twice": (lambda: BalanceConfig((("router_z", 1.0), ("router_z", 2.0))), r"names a loss twice: \['router_z', 'router_z'\]"),
    "negative loss": (lambda: BalanceConfig((("router_z", -1.0),)), "gives 'router_z' the weight -1.0"),
    "negative rate": (lambda: BalanceConfig(bias_rate=-0.5), "balance.bias_rate is -0.5"),
    "rule without bias": (
        lambda: MoEConfig(4, balance=BalanceConfig(bias_rule="sign")),
        "balance.bias_rule is 'sign' but gating.correction_bias is False",
    ),
    "unknown field": (lambda: MoEConfig.from_dict({"d_model": 4, "depth": 2}), "MoEConfig has no field 'depth'; known: d_model, scores"),
    "unknown field of a part": (
        lambda: MoEConfig.from_dict({"d_model": 4, "gating": {"topk": 2}}),
        "GatingConfig has no field 'topk'; known: top_k",
    ),
    "part that is no mapping": (lambda: MoEConfig.from_dict({"d_model": 4, "gating": 2}), "GatingConfig wants a mapping of fields, got 2"),
    "flag in words": (
        lambda: MoEConfig.from_dict({"d_model": 4, "gating": {"correction_bias": "no"}}),
        "gating.correction_bias is 'no'; it must be True or False",
    ),
    "part of another kind": (lambda: MoEConfig(4, scores={"bias": True}), "scores is {'bias': True}; it must be a ScoresConfig"),
    "choice that is a list": (lambda: MoEConfig(4, scores=ScoresConfig(function=["softmax"])), r"scores.function is \['softmax'\]; known"),
    "losses without weights": (lambda: BalanceConfig(("router_z",)), r"balance.losses is \('router_z',\); it must be a sequence of pairs"),
    "losses that are a number": (lambda: BalanceConfig(5), "balance.losses is 5; it must be a sequence of pairs"),
    "kinds without counts": (lambda: ExpertsConfig(zero_computation=("zero",)), r"experts.zero_computation is \('zero',\)"),
    "flag of a model": (
        lambda: replace(presets.model("dense", tiny=True), extra_dense="no"),
        "extra_dense is 'no'; it must be True or False",
    ),
    "flag of attention": (lambda: AttentionConfig(bias=1), "attention.bias is 1; it must be True or False"),
    "name that is a number": (lambda: replace(presets.model("dense", tiny=True), name=5), "name is 5; it must be a string"),
    "unknown preset": (lambda: presets.get("switsch-base-128"), "switsch-base-128"),
}


@pytest.mark.parametrize("name", BAD_CONFIGS)
def test_bad_config_is_refused(name: str) -> None:
    build, message = BAD_CONFIGS[name]
    with pytest.raises(ValueError, match=message):
        build()


TAGGED = {
    "scores": ("function", "noise", "input_norm", "logit_noise"),
    "gating": ("choice", "group_score", "normalize", "second_choice"),
    "capacity": ("formula", "order", "recycle"),
    "experts": ("activation",),
    "balance": ("bias_rule",),
}


@pytest.mark.parametrize("part, field", [(part, field) for part, fields in TAGGED.items() for field in fields])
def test_unknown_choice_is_refused_with_the_known_ones(part: str, field: str) -> None:
    base = MoEConfig(4, gating=GatingConfig(top_k=2, correction_bias=True))
    wrong = dataclasses.replace(getattr(base, part), **{field: "nonesuch"})
    known = getattr(getattr(base, part), field)
    with pytest.raises(ValueError, match=f"{part}.{field} is 'nonesuch'; known: .*{known}"):
        dataclasses.replace(base, **{part: wrong})


def test_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"balance.losses is 'nonesuch'; known: .*expert_balance"):
        MoEConfig(4, balance=BalanceConfig((("nonesuch", 1.0),)))


def changed(array: np.ndarray, value: float) -> np.ndarray:
    """A copy with one element replaced."""
    out = array.copy()
    out[-1, ..., -1] = value
    return out


V3 = CONFIGS["deepseek-v3"]
# name → (what becomes of the arguments of a good pass, the message)
BAD_CALLS: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "x not an array": (lambda a: {"x_TD": a["x_TD"].tolist()}, "x must be a float array, got <class 'list'>"),
    "x integers": (lambda a: {"x_TD": a["x_TD"].astype(int)}, "x must be a float array, got int64"),
    "x complex": (lambda a: {"x_TD": a["x_TD"].astype(complex)}, "x must be a float array, got complex128"),
    "x too wide": (lambda a: {"x_TD": np.zeros((9, 7))}, r"x has shape \(9, 7\); it must be \(T, 6\)"),
    "x with three axes": (lambda a: {"x_TD": a["x_TD"][None]}, r"x has shape \(1, 9, 6\); it must be \(T, 6\)"),
    "x NaN": (lambda a: {"x_TD": changed(a["x_TD"], np.nan)}, r"x holds NaN or infinity, in tokens \[8\]"),
    "x infinite": (lambda a: {"x_TD": changed(a["x_TD"], -np.inf)}, r"x holds NaN or infinity, in tokens \[8\]"),
    "parameter missing": (
        lambda a: {"params": {key: value for key, value in a["params"].items() if key != "experts.down_proj"}},
        "params has no 'experts.down_proj'; this config needs router.weight",
    ),
    "parameter shape": (
        lambda a: {"params": a["params"] | {"router.weight": np.zeros((7, 6))}},
        r"router.weight has shape \(7, 6\); this config needs \(8, 6\)",
    ),
    "parameter NaN": (
        lambda a: {"params": a["params"] | {"experts.down_proj": changed(a["params"]["experts.down_proj"], np.nan)}},
        "experts.down_proj holds NaN or infinity",
    ),
    "bias infinite": (
        lambda a: {"params": a["params"] | {"router.correction_bias": np.full(8, np.inf)}},
        "router.correction_bias holds NaN or infinity",
    ),
    "group_ids too long": (
        lambda a: {"group_ids": np.zeros(10, int)},
        r"group_ids has shape \(10,\); x has 9 tokens, so it must be \(9,\)",
    ),
    "group_ids float": (lambda a: {"group_ids": np.zeros(9)}, "group_ids has dtype float64; it must be integer"),
    "token_ids float": (lambda a: {"token_ids": np.zeros(9)}, "token_ids has dtype float64; it must be integer"),
    "pad_mask integers": (lambda a: {"pad_mask": np.zeros(9, int)}, "pad_mask has dtype int64; it must be bool"),
    "pad_mask with two axes": (lambda a: {"pad_mask": np.zeros((3, 3), bool)}, r"pad_mask has shape \(3, 3\); x has 9 tokens"),
}


def good_call(config: MoEConfig) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    return {"params": random_params(config, rng), "config": config, **random_tokens(config, rng, 9, groups=2, pads=1)}


@pytest.mark.parametrize("function", [moe_forward, route])
@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_call_is_refused(name: str, function: Callable) -> None:
    change, message = BAD_CALLS[name]
    arguments = good_call(V3)
    function(**arguments)
    with pytest.raises(ValueError, match=message):
        function(**{**arguments, **change(arguments)})


# name → (fields of a recorded routing to replace, the message)
BAD_REPLAYS: dict[str, tuple[Callable[[Any], dict[str, Any]], str]] = {
    "fewer tokens": (
        lambda r: {"expert": r.expert[:-1], "keep": r.keep[:-1]},
        r"replay.expert has shape \(8, 2\); this pass needs \(9, 2\)",
    ),
    "fewer choices": (
        lambda r: {"expert": r.expert[:, :1], "keep": r.keep[:, :1]},
        r"replay.expert has shape \(9, 1\); this pass needs \(9, 2\)",
    ),
    "keep of another shape": (lambda r: {"keep": r.keep[:, 0]}, r"replay.keep has shape \(9,\), replay.expert \(9, 2\)"),
    "load of another shape": (lambda r: {"load": r.load[:-1]}, r"replay.load has shape \(7,\); the layer has 8 experts"),
    "expert too high": (lambda r: {"expert": np.where(r.keep, 8, r.expert)}, "replay.expert has ids [0-7] … 8; the layer has 8 experts"),
    "expert negative": (lambda r: {"expert": np.full_like(r.expert, -1)}, "replay.expert has ids -1 … .*; the layer has 8 experts"),
    "expert no integer": (lambda r: {"expert": r.expert.astype(float)}, "replay.expert has dtype float64; it must be integer"),
    "keep no bool": (lambda r: {"keep": r.keep.astype(int)}, "replay.keep has dtype int64; it must be bool"),
    "padding kept": (lambda r: {"keep": np.ones_like(r.keep)}, r"replay keeps assignments of padding, in tokens \[\d\]"),
}


@pytest.mark.parametrize("name", BAD_REPLAYS)
def test_replay_that_does_not_fit_is_refused(name: str) -> None:
    change, message = BAD_REPLAYS[name]
    arguments = good_call(V3)
    routing = route(**arguments)
    with pytest.raises(ValueError, match=message):
        moe_forward(**arguments, replay=dataclasses.replace(routing, **change(routing)))


@pytest.mark.parametrize("name, drawn", [("switch", "jitter"), ("gshard", "second_choice")])
def test_noise_needs_a_generator_or_recorded_draws(name: str, drawn: str) -> None:
    arguments = good_call(CONFIGS[name])
    with pytest.raises(ValueError, match=f"draws random numbers .{drawn}. in training: pass rng="):
        moe_forward(**arguments, training=True)
    quiet = route(**arguments)
    assert quiet.draws == {}
    if drawn == "jitter":
        with pytest.raises(ValueError, match="replay holds no draws named 'jitter'"):
            moe_forward(**arguments, training=True, replay=quiet)
        short = dataclasses.replace(quiet, draws={"jitter": np.zeros((8, 6))})
        with pytest.raises(ValueError, match=r"replay holds draws 'jitter' of shape \(8, 6\); this pass needs \(9, 6\)"):
            moe_forward(**arguments, training=True, replay=short)


def test_unknown_loss_cotangent_is_refused() -> None:
    arguments = good_call(V3)
    output, cache = moe_forward(**arguments, training=True)
    with pytest.raises(ValueError, match="dloss names the loss 'router_z'; this pass computed sequence_balance"):
        moe_backward(output.y, cache, dloss={"router_z": 1.0})
    output, cache = moe_forward(**arguments)
    with pytest.raises(ValueError, match=re.escape("this pass computed none (it was an evaluation)")):
        moe_backward(output.y, cache, dloss={"sequence_balance": 1.0})


@pytest.mark.parametrize("shape", [(9,), (9, 1), (1, 6), (8, 6)])
def test_cotangent_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    _, cache = moe_forward(**good_call(V3))
    with pytest.raises(ValueError, match=re.escape(f"dy has shape {shape}; y has (9, 6)")):
        moe_backward(np.ones(shape), cache)


def test_load_of_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"load has shape \(7,\); the bias has \(8,\)"):
        update_bias(np.zeros(8), np.zeros(7), V3)


@pytest.mark.parametrize("name", CONFIGS)
def test_good_calls_pass_with_no_and_one_token(name: str) -> None:
    config, rng = CONFIGS[name], np.random.default_rng(0)
    params = random_params(config, rng)
    for tokens, pads in ((0, 0), (1, 0), (1, 1)):
        arguments = random_tokens(config, rng, tokens, pads=pads)
        output, cache = moe_forward(params=params, config=config, training=True, rng=rng, **arguments)
        assert output.y.shape == (tokens, config.d_model) and np.isfinite(output.loss)
        assert apply_experts(arguments["x_TD"], output.routing, params, config).shape == output.y.shape
        dx_TD, dparams = moe_backward(np.ones_like(output.y), cache)
        assert dx_TD.shape == output.y.shape and all(np.isfinite(gradient).all() for gradient in dparams.values())
        if tokens == pads:
            assert output.loss == 0 and not output.routing.load.any() and not output.y.any()
            assert not any(gradient.any() for gradient in dparams.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_config_survives_a_round_trip(name: str) -> None:
    assert MoEConfig.from_dict(CONFIGS[name].to_dict()) == CONFIGS[name]
