"""Three writings of each published layer agree: the recipe of its paper, the layer that a config drives, and PyTorch's autograd."""

from __future__ import annotations

import ast
import inspect
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import REPOSITORY
from tracer import traced

from optimized.status import BOUNDS, autograd_errors, draw, recipe_errors
from reference import MoEConfig, init_params, moe_forward, presets
from reference.architectures import RECIPES, run

every_preset = pytest.mark.parametrize("name", presets.names())

SIZES = {
    "tiny": dict(tokens=60, groups=3, padded=0.15),
    "one group": dict(tokens=31, groups=1, padded=0.0),
    "many groups": dict(tokens=40, groups=17, padded=0.5),
    "one token": dict(tokens=1, groups=1, padded=0.0),
    "no token": dict(tokens=0, groups=1, padded=0.0),
    "all padding": dict(tokens=5, groups=2, padded=1.0),
}


def changed(name: str, **parts: Any) -> MoEConfig:
    """The tiny preset with some fields replaced: `d_model`, or a dict of fields for a part."""
    config = presets.tiny(name)
    return replace(config, **{k: replace(getattr(config, k), **v) if isinstance(v, dict) else v for k, v in parts.items()})


# Other shapes of the routers that have more than one: experts, chosen, groups, capacities.
SHAPES = {
    "gshard-600b": [dict(experts=dict(count=3)), dict(capacity=dict(factor=0.3)), dict(capacity=dict(factor=4.0))],
    "switch-base-128": [dict(experts=dict(count=5)), dict(capacity=dict(factor=0.5)), dict(scores=dict(noise_scale=0.5))],
    "mixtral-8x7b": [dict(gating=dict(top_k=1)), dict(gating=dict(top_k=8)), dict(experts=dict(count=7))],
    "olmoe-1b-7b": [dict(gating=dict(top_k=1)), dict(experts=dict(count=13))],
    "qwen3-30b-a3b": [dict(gating=dict(top_k=8)), dict(experts=dict(count=11))],
    "deepseek-moe-16b": [dict(experts=dict(shared=3)), dict(experts=dict(shared_width=5))],
    "deepseek-moe-145b": [dict(gating=dict(groups=2, top_groups=2)), dict(experts=dict(count=12), gating=dict(top_k=5))],
    "deepseek-v2": [dict(gating=dict(groups=2, top_groups=1)), dict(experts=dict(count=24), gating=dict(top_groups=3, top_k=7))],
    "switch-xxl-128": [dict(experts=dict(count=5)), dict(capacity=dict(factor=0.5))],
    "qwen2-57b-a14b": [dict(experts=dict(shared=1)), dict(gating=dict(top_k=8)), dict(experts=dict(count=11, shared_width=5))],
    "gpt-oss-120b": [dict(gating=dict(top_k=1)), dict(gating=dict(top_k=8)), dict(experts=dict(count=5, width=30))],
    "llama4-scout": [dict(gating=dict(top_k=2)), dict(experts=dict(count=5, shared_width=3))],
    "shazeer-2017": [dict(gating=dict(top_k=1)), dict(experts=dict(count=7))],
    "glam-64b-64e": [dict(capacity=dict(factor=0.3)), dict(experts=dict(count=3))],
    "st-moe-32b": [dict(experts=dict(count=3)), dict(capacity=dict(factor=0.3))],
    "openmoe-8b": [dict(experts=dict(count=3)), dict(capacity=dict(factor=0.3))],
    "soft-moe-s16-128": [dict(gating=dict(slots=3)), dict(experts=dict(count=5)), dict(experts=dict(count=1))],
    "base-layer-44b": [dict(experts=dict(count=5)), dict(experts=dict(count=1))],
    "hash-layer-1.28b": [dict(experts=dict(count=5)), dict(gating=dict(vocabulary=3))],
    "deepseek-v4-flash": [dict(gating=dict(top_k=8)), dict(experts=dict(count=13))],
    "deepseek-v4-flash-hash": [dict(gating=dict(top_k=2)), dict(gating=dict(vocabulary=3)), dict(experts=dict(count=13))],
    "expert-choice-8b-64e": [dict(gating=dict(top_k=1)), dict(experts=dict(count=5)), dict(capacity=dict(factor=4.0))],
    "longcat-flash": [
        dict(gating=dict(top_k=1)),
        dict(gating=dict(top_k=8)),
        dict(experts=dict(count=5, zero_computation=(("copy", 1),))),
    ],
    "moe-plus-plus-7b": [
        dict(capacity=dict(factor=0.3), experts=dict(network_share=0.3)),
        dict(experts=dict(count=6, zero_computation=(("constant", 1), ("copy", 1), ("zero", 1)), network_share=1.0)),
        dict(experts=dict(count=8, zero_computation=(("constant", 3), ("copy", 1), ("zero", 1)))),
    ],
    "deepspeed-moe-1.3b-128": [dict(experts=dict(count=3)), dict(capacity=dict(factor=0.3, minimum=0))],
    "pr-moe-1.3b-64-128": [dict(experts=dict(count=3, shared_width=5)), dict(capacity=dict(factor=4.0))],
    "fastmoe-naive": [dict(gating=dict(top_k=1)), dict(experts=dict(count=5))],
    "fastmoe-noisy": [dict(gating=dict(top_k=1)), dict(experts=dict(count=5))],
    "fastmoe-gshard": [dict(capacity=dict(factor=0.3)), dict(experts=dict(count=3))],
    "fastmoe-switch": [dict(capacity=dict(factor=0.3)), dict(experts=dict(count=3))],
    "remoe-182m": [dict(gating=dict(top_k=3)), dict(experts=dict(count=5))],
    "deepseek-v3": [dict(gating=dict(groups=1, top_groups=1)), dict(experts=dict(count=24), gating=dict(top_groups=3, top_k=8))],
}
SHAPE_CASES = [
    pytest.param(name, parts, id=f"{name}-{number}") for name, all_parts in SHAPES.items() for number, parts in enumerate(all_parts)
]

# One wrong rule of each kind: a recipe that agreed with these too would prove nothing.
WRONG = {
    "gshard drops by position": ("gshard-600b", dict(capacity=dict(order="token_major"))),
    "gshard without normalized gates": ("gshard-600b", dict(gating=dict(normalize="none"))),
    "gshard with Switch's capacity": ("gshard-600b", dict(capacity=dict(formula="per_token"))),
    "switch with a normalized gate": ("switch-base-128", dict(gating=dict(normalize="sum"))),
    "switch without capacity": ("switch-base-128", dict(capacity=dict(formula="none"))),
    "mixtral without normalized gates": ("mixtral-8x7b", dict(scores=dict(function="softmax"), gating=dict(normalize="none"))),
    "olmoe with normalized gates": ("olmoe-1b-7b", dict(gating=dict(normalize="sum"))),
    "qwen3 without normalized gates": ("qwen3-30b-a3b", dict(gating=dict(normalize="none"))),
    "deepseek-moe with normalized gates": ("deepseek-moe-16b", dict(gating=dict(normalize="sum"))),
    "deepseek-v2 with the top-2 group score": ("deepseek-v2", dict(gating=dict(group_score="top2_sum"))),
    "deepseek-v2 with normalized gates": ("deepseek-v2", dict(gating=dict(normalize="sum"))),
    "xxl with a normalized gate": ("switch-xxl-128", dict(gating=dict(normalize="sum"))),
    "qwen2 with normalized gates": ("qwen2-57b-a14b", dict(gating=dict(normalize="sum"))),
    "gpt-oss without the clamp and the 1": ("gpt-oss-120b", dict(experts=dict(activation="swiglu"))),
    "gpt-oss with a softmax over all experts": ("gpt-oss-120b", dict(scores=dict(function="softmax"), gating=dict(normalize="none"))),
    "llama4 with gates on outputs": ("llama4-scout", dict(experts=dict(gate_inputs=False))),
    "llama4 with a softmax": ("llama4-scout", dict(scores=dict(function="softmax"))),
    "shazeer on a normalised input": ("shazeer-2017", dict(scores=dict(input_norm="rms"))),
    "shazeer with a softmax over all": ("shazeer-2017", dict(scores=dict(function="softmax"), gating=dict(normalize="none"))),
    "glam with Switch's capacity": ("glam-64b-64e", dict(capacity=dict(formula="per_token"))),
    "st-moe with GShard's threshold": ("st-moe-32b", dict(gating=dict(second_threshold=0.5))),
    "st-moe normalized after the drop": ("st-moe-32b", dict(gating=dict(after_drop=True))),
    "st-moe drops by probability": ("st-moe-32b", dict(capacity=dict(order="batch_prioritized"))),
    "openmoe with normalized gates": ("openmoe-8b", dict(gating=dict(normalize="sum"))),
    "soft moe with other experts": ("soft-moe-s16-128", dict(experts=dict(activation="relu"))),
    "base by its best expert": ("base-layer-44b", dict(gating=dict(choice="top_k"))),
    "base with a softmax": ("base-layer-44b", dict(scores=dict(function="softmax"))),
    "hash weighed by its score": ("hash-layer-1.28b", dict(scores=dict(function="softmax"), gating=dict(normalize="none"))),
    "deepseek-v4 with a sigmoid": ("deepseek-v4-flash", dict(scores=dict(function="sigmoid"))),
    "deepseek-v4 without normalized gates": ("deepseek-v4-flash", dict(gating=dict(normalize="none"))),
    "deepseek-v4 by hash without normalized gates": ("deepseek-v4-flash-hash", dict(gating=dict(normalize="none"))),
    "expert choice by tokens": ("expert-choice-8b-64e", dict(gating=dict(choice="top_k"))),
    "remoe with the top 2": ("remoe-182m", dict(gating=dict(choice="top_k", top_k=2))),
    "longcat with experts that answer nothing": ("longcat-flash", dict(experts=dict(zero_computation=(("zero", 3),)))),
    "longcat with normalized gates": ("longcat-flash", dict(gating=dict(normalize="sum"))),
    "moe++ with one capacity for all": ("moe-plus-plus-7b", dict(capacity=dict(factor=0.5, formula="per_token"))),
    "moe++ with normalized gates": ("moe-plus-plus-7b", dict(gating=dict(normalize="sum"))),
    "deepspeed with a normalized gate": ("deepspeed-moe-1.3b-128", dict(gating=dict(normalize="sum"))),
    "pr-moe with ReLU experts": ("pr-moe-1.3b-64-128", dict(experts=dict(activation="relu"))),
    "fastmoe's naive gate of sigmoids": ("fastmoe-naive", dict(scores=dict(function="sigmoid"))),
    "fastmoe's gshard gate by rounds": ("fastmoe-gshard", dict(capacity=dict(order="choice_major", factor=0.5))),
    "fastmoe's switch gate normalized": ("fastmoe-switch", dict(gating=dict(normalize="sum"))),
    "deepseek-v3 with the max group score": ("deepseek-v3", dict(gating=dict(group_score="max"))),
    "deepseek-v3 with a softmax": ("deepseek-v3", dict(scores=dict(function="softmax"))),
    "deepseek-v3 without normalized gates": ("deepseek-v3", dict(gating=dict(normalize="none"))),
}


def test_every_preset_has_a_recipe():
    assert tuple(RECIPES) == presets.names()


@every_preset
def test_recipe_is_a_straight_line(name):
    nodes = list(ast.walk(ast.parse(inspect.getsource(RECIPES[name]))))
    assert not [node for node in nodes if isinstance(node, (ast.If, ast.IfExp, ast.Match, ast.While))]
    assert len({str(inspect.signature(recipe)) for recipe in RECIPES.values()}) == 1


def test_suffixes_of_recipes_are_real_shapes():
    with traced(REPOSITORY / "reference" / "architectures") as trace:
        for name in RECIPES:
            config = presets.tiny(name)
            recipe_errors(name, config, draw(config, 0))
    assert trace.errors == [] and trace.seen


@every_preset
@pytest.mark.parametrize("size", SIZES)
def test_recipe_is_the_layer(name, size):
    config = presets.tiny(name)
    assert recipe_errors(name, config, draw(config, 10, **SIZES[size])).max <= BOUNDS["recipe"]


@pytest.mark.parametrize("name, parts", SHAPE_CASES)
@pytest.mark.parametrize("seed", range(3))
def test_recipe_is_the_layer_at_other_shapes(name, parts, seed):
    config = changed(name, **parts)
    assert recipe_errors(name, config, draw(config, seed)).max <= BOUNDS["recipe"]


@pytest.mark.parametrize("case", WRONG)
def test_recipe_is_not_another_layer(case):
    name, parts = WRONG[case]
    config = changed(name, **parts)
    assert recipe_errors(name, config, draw(config, 0)).max > 1e-2


def test_recipe_draws_like_the_layer(rng):
    for name in ("gshard-600b", "switch-base-128"):
        config = presets.tiny(name)
        x_TD, params = rng.standard_normal((40, config.d_model)), init_params(config, rng)
        y_TD, losses = run(name, x_TD, params, config, rng=np.random.default_rng(3))
        output, _ = moe_forward(x_TD, params, config, training=True, rng=np.random.default_rng(3))
        assert np.allclose(y_TD, output.y, rtol=0, atol=1e-13) and losses == pytest.approx(output.losses)
        other, _ = run(name, x_TD, params, config, rng=np.random.default_rng(4))
        assert not np.allclose(y_TD, other)


def test_recipe_refuses_bad_input(rng):
    config = presets.tiny("mixtral-8x7b")
    x_TD, params = rng.standard_normal((4, config.d_model)), init_params(config, rng)
    with pytest.raises(ValueError, match="no recipe 'mixtrall'; known: dense"):
        run("mixtrall", x_TD, params, config)
    with pytest.raises(ValueError, match=r"x has shape \(4, 3\); it must be \(T, 16\)"):
        run("mixtral-8x7b", x_TD[:, :3], params, config)
    with pytest.raises(ValueError, match=r"group_ids has shape \(3,\)"):
        run("mixtral-8x7b", x_TD, params, config, group_ids=np.zeros(3, int))
    with pytest.raises(ValueError, match=r"second_choice.*pass rng="):
        gshard = presets.tiny("gshard-600b")
        run("gshard-600b", x_TD, init_params(gshard, rng), gshard)


@every_preset
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("size", SIZES)
def test_autograd_is_the_layer(name, training, size):
    config = presets.tiny(name)
    forward, gradient = autograd_errors(config, draw(config, 20, **SIZES[size]), training=training)
    assert forward.max <= BOUNDS["autograd"] and gradient.max <= BOUNDS["autograd"]


@pytest.mark.parametrize("name, parts", SHAPE_CASES)
def test_autograd_is_the_layer_at_other_shapes(name, parts):
    config = changed(name, **parts)
    forward, gradient = autograd_errors(config, draw(config, 30))
    assert forward.max <= BOUNDS["autograd"] and gradient.max <= BOUNDS["autograd"]
