"""The layer against MoE blocks that others wrote: output, and gradients of input, router, every expert and the shared experts.

Known differences that stay outside: transformers leaves the order of a token's experts open (`sorted=False`), so outputs are compared
and not slots; DeepSeek-V2's block masks closed groups with 0 instead of −∞, the same while scores are probabilities; Switch's block
routes each sequence with a fixed capacity, which the layer reaches with one group per sequence.
"""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import needs_tool
from test_architectures import changed

from optimized import oracles
from optimized.status import BOUNDS, random_bias, transformers_errors
from reference import moe_forward, presets

# A router in float32 rounds its logits and scores: a few units of 2⁻²³ on average, some tens at worst.
NATIVE_RMS, NATIVE_MAX = 10 * 2.0**-23, 60 * 2.0**-23


@pytest.fixture(autouse=True)
def _needs_transformers() -> None:
    needs_tool("transformers")


SHAPES = {
    "switch-base-128": [dict(capacity=dict(eval_factor=0.5)), dict(experts=dict(count=3, width=20)), dict(d_model=7)],
    "mixtral-8x7b": [dict(gating=dict(top_k=8)), dict(experts=dict(count=5, width=3)), dict(d_model=9)],
    "olmoe-1b-7b": [dict(gating=dict(top_k=1)), dict(experts=dict(count=11, width=3)), dict(gating=dict(normalize="sum"))],
    "qwen3-30b-a3b": [dict(gating=dict(top_k=8)), dict(experts=dict(count=11, width=3)), dict(gating=dict(normalize="none"))],
    "deepseek-moe-16b": [dict(experts=dict(shared=3)), dict(gating=dict(top_k=1, scale=0.5))],
    "deepseek-v2": [
        dict(gating=dict(groups=2, top_groups=1, scale=1.0)),
        dict(experts=dict(count=24, width=3, shared=1), gating=dict(groups=8, top_groups=3, top_k=6)),
    ],
    "qwen2-57b-a14b": [
        dict(gating=dict(top_k=8)),
        dict(experts=dict(count=11, width=3, shared_width=5)),
        dict(gating=dict(normalize="sum")),
    ],
    "gpt-oss-120b": [dict(gating=dict(top_k=8)), dict(experts=dict(count=5, width=40)), dict(d_model=9, gating=dict(top_k=1))],
    "llama4-scout": [dict(gating=dict(top_k=2)), dict(experts=dict(count=5, width=3)), dict(d_model=9)],
    "longcat-flash": [
        dict(gating=dict(top_k=8)),
        dict(gating=dict(top_k=2, scale=1.0)),  # the block cannot choose 1: its squeeze takes the axis of the choices for another
        dict(experts=dict(count=11, width=3, zero_computation=(("copy", 6),))),
    ],
    "deepseek-v3": [
        dict(gating=dict(groups=1, top_groups=1, scale=1.0)),
        dict(experts=dict(count=32, width=3, shared=2), gating=dict(groups=8, top_groups=4, top_k=8)),
        dict(gating=dict(normalize="none", top_k=2)),
    ],
}
SHAPE_CASES = [
    pytest.param(name, parts, id=f"{name}-{number}") for name, all_parts in SHAPES.items() for number, parts in enumerate(all_parts)
]

# The block is built for the preset, the layer follows the wrong rule.
WRONG = {
    "mixtral without normalized gates": ("mixtral-8x7b", dict(scores=dict(function="softmax"), gating=dict(normalize="none"))),
    "gates 2 % too large": ("olmoe-1b-7b", dict(gating=dict(scale=1.02))),
    "another capacity": ("switch-base-128", dict(capacity=dict(eval_factor=0.5))),
    "a normalized gate": ("switch-base-128", dict(gating=dict(normalize="sum"))),
    "qwen3 without normalized gates": ("qwen3-30b-a3b", dict(gating=dict(normalize="none"))),
    "deepseek-v2 with the top-2 group score": ("deepseek-v2", dict(gating=dict(group_score="top2_sum"))),
    "deepseek-v2 without groups": ("deepseek-v2", dict(gating=dict(groups=1, top_groups=1))),
    "qwen2 with normalized gates": ("qwen2-57b-a14b", dict(gating=dict(normalize="sum"))),
    "gpt-oss with plain SwiGLU": ("gpt-oss-120b", dict(experts=dict(activation="swiglu"))),
    "gpt-oss with a softmax over all experts": ("gpt-oss-120b", dict(scores=dict(function="softmax"), gating=dict(normalize="none"))),
    "llama4 with gates on outputs": ("llama4-scout", dict(experts=dict(gate_inputs=False))),
    "longcat with experts that answer nothing": ("longcat-flash", dict(experts=dict(zero_computation=(("zero", 3),)))),
    "longcat without its bias": ("longcat-flash", dict(gating=dict(correction_bias=False), balance=dict(bias_rule="none"))),
    "deepseek-v3 with the max group score": ("deepseek-v3", dict(gating=dict(group_score="max"))),
    "deepseek-v3 without its bias": ("deepseek-v3", dict(gating=dict(correction_bias=False), balance=dict(bias_rule="none"))),
}


@pytest.mark.parametrize("name", oracles.ORACLES)
@pytest.mark.parametrize("seed", [10, 11])
def test_layer_is_the_block(name, seed):
    forward, gradient = transformers_errors(name, presets.tiny(name), seed)
    assert forward.max <= BOUNDS["transformers"] and gradient.max <= BOUNDS["transformers"]


@pytest.mark.parametrize("name, parts", SHAPE_CASES)
@pytest.mark.parametrize("size", [dict(sequences=1, length=1), dict(sequences=2, length=33)], ids=["one token", "two sequences"])
def test_layer_is_the_block_at_other_shapes(name, parts, size):
    forward, gradient = transformers_errors(name, changed(name, **parts), 12, **size)
    assert forward.max <= BOUNDS["transformers"] and gradient.max <= BOUNDS["transformers"]


# That of gpt-oss computes in the dtype of its weights, which is float64 here.
@pytest.mark.parametrize("name", sorted(SHAPES.keys() - {"gpt-oss-120b"}))
def test_layer_is_the_block_as_it_ships(name):
    forward, gradient = transformers_errors(name, presets.tiny(name), 13, native_router=True)
    for errors in (forward, gradient):
        assert errors.rms <= NATIVE_RMS and errors.max <= NATIVE_MAX
    # The router of these blocks is a float32 one indeed; else nothing would be learned about it here.
    assert forward.max > BOUNDS["transformers"]


@pytest.mark.parametrize("case", WRONG)
def test_another_layer_is_not_the_block(case, monkeypatch):
    name, parts = WRONG[case]
    right = presets.tiny(name)
    run = oracles.run
    bias = random_bias(right, np.random.default_rng(0)) if right.gating.correction_bias else None

    def run_right(name, config, x_BSD, dy_BSD, *, seed, correction_bias, native_router):
        return run(name, right, x_BSD, dy_BSD, seed=seed, correction_bias=bias, native_router=native_router)

    monkeypatch.setattr(oracles, "run", run_right)
    forward, gradient = transformers_errors(name, changed(name, **parts), 14)
    assert forward.max > 1e-2 and gradient.max > 1e-2


def test_bias_and_capacity_of_the_comparison_decide_something(rng):
    config = presets.tiny("deepseek-v3")
    x_BSD, bias = rng.standard_normal((2, 20, config.d_model)), random_bias(config, rng)
    assert bias.min() < 0
    block = oracles.run("deepseek-v3", config, x_BSD, x_BSD, correction_bias=bias)
    x_TD = x_BSD.reshape(-1, config.d_model)
    routing = moe_forward(x_TD, block.params, config)[0].routing
    unbiased = moe_forward(x_TD, block.params | {"router.correction_bias": 0 * bias}, config)[0].routing
    assert (np.sort(routing.expert, axis=1) != np.sort(unbiased.expert, axis=1)).any()

    config = changed("switch-base-128", capacity=dict(eval_factor=0.5))
    block = oracles.run("switch-base-128", config, x_BSD, x_BSD)
    output = moe_forward(x_TD, block.params, config, group_ids=np.repeat([0, 1], 20))[0]
    assert not output.routing.keep.all() and (block.y[~output.routing.keep[:, 0]] == 0).all()


def test_oracle_refuses_what_it_cannot_build(monkeypatch):
    with pytest.raises(ValueError, match=r"'gshard-600b' has no block in transformers.*mixtral-8x7b"):
        oracles.build("gshard-600b", presets.tiny("gshard-600b"), sequence=4, seed=0)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError, match="need transformers: install the extra `test`"):
        oracles.build("mixtral-8x7b", presets.tiny("mixtral-8x7b"), sequence=4, seed=0)
