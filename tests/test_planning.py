"""What a plan says, against counts by hand, the cost equations and what cannot be exceeded."""

from __future__ import annotations

import pytest

from optimized import planning
from reference import presets
from reference.choices import CHOICES
from reference.cost import expected_experts_touched, layer_parameters, model_parameters, sum_parameters

SPARSE = [name for name in presets.names() if presets.model(name).moe_layers()]


def total(name: str) -> int:
    return sum_parameters(model_parameters(presets.model(name))).total


@pytest.mark.parametrize("name", SPARSE)
def test_one_rank_has_everything_and_sends_nothing(name: str) -> None:
    alone = planning.spread(presets.model(name), 1, dtype="bfloat16")
    assert alone.weight_bytes == 2 * total(name) and alone.experts == max(c.experts.networks for c in presets.model(name).moe_layers())
    assert alone.rows == alone.forward_bytes == alone.backward_bytes == 0


@pytest.mark.parametrize("name", SPARSE)
def test_a_token_reaches_at_most_k_other_ranks(name: str) -> None:
    model = presets.model(name)
    some = planning.spread(model, 4, dtype="bfloat16")
    if CHOICES[model.moe.gating.choice].mixes:
        elsewhere = model.moe.experts.count - some.experts
        assert some.unit == "group" and some.rows == elsewhere * model.moe.gating.slots
    else:
        most = 3 if CHOICES[model.moe.gating.choice].every_expert else min(3, model.moe.gating.top_k)
        assert some.unit == "token" and 0 < some.rows <= most
    row = 2 * model.d_model
    layers = len(model.moe_layers())
    assert some.forward_bytes >= 2 * layers * some.rows * row, "each row goes there and one comes back"
    assert some.forward_bytes <= 2 * layers * some.rows * row * 1.1, "gates and ids are little beside rows"


def test_mixtral_by_hand() -> None:
    """Two of eight experts on eight ranks: of the two rows, 7/8 are not at home. Each rank has one expert of each of the 32 layers."""
    some = planning.spread(presets.model("mixtral-8x7b"), 8, dtype="bfloat16")
    assert some.experts == 1 and some.rows == pytest.approx(2 * 7 / 8, rel=0.05)
    assert some.weight_bytes == 2 * (total("mixtral-8x7b") - 32 * 7 * 3 * 4096 * 14336)


def test_groups_bound_the_ranks_of_deepseek_v3() -> None:
    """Four groups of eight: with a rank for each group nobody reaches more than four, though eight experts are chosen."""
    some = planning.spread(presets.model("deepseek-v3"), 8, dtype="fp8")
    assert 3 < some.rows <= 4
    assert planning.spread(presets.model("deepseek-v3"), 8, dtype="bfloat16").weight_bytes == 2 * some.weight_bytes


def test_what_has_no_network_is_on_every_rank() -> None:
    model = presets.model("moe-plus-plus-7b")
    config = model.moe
    networks = config.experts.networks
    others = layer_parameters(config)["routed_experts"].total - networks * 3 * config.d_model * config.experts.width
    assert others > 0
    some = planning.spread(model, networks, dtype="float32")
    assert some.weight_bytes == 4 * (
        total(model.name) - len(model.moe_layers()) * (networks - 1) * 3 * config.d_model * config.experts.width
    )


def test_a_step_of_one_token_reads_its_experts_and_a_large_one_all_of_them() -> None:
    model = presets.model("deepseek-v3")
    one, many = (planning.step(model, tokens, context=4096, dtype="bfloat16") for tokens in (1, 100_000))
    assert one.experts == expected_experts_touched(model.moe, 1) == 8 and many.experts == pytest.approx(256)
    active = sum_parameters(model_parameters(model), without={"embedding"}).active
    assert one.read_bytes == pytest.approx(2 * (active + model.d_model))
    assert many.flops == pytest.approx(100_000 * one.flops)


def test_layers_of_different_sizes_are_averaged() -> None:
    model = presets.model("pr-moe-1.3b-64-128")
    counts = [config.experts.count for config in model.moe_layers()]
    assert len(set(counts)) == 2
    expected = sum(expected_experts_touched(config, 5) for config in model.moe_layers()) / len(counts)
    assert planning.step(model, 5, context=2048, dtype="float16").experts == pytest.approx(expected)


def test_a_dense_model_has_steps_and_no_ranks() -> None:
    model = presets.model("dense")
    assert planning.step(model, 3, context=10, dtype="float32").experts is None
    with pytest.raises(ValueError, match="dense has no MoE layer"):
        planning.spread(model, 2, dtype="float32")


@pytest.mark.parametrize(
    "arguments, told",
    [
        (dict(tokens=[0], ranks=[1], dtype="fp8", context=1), "tokens is 0"),
        (dict(tokens=[1], ranks=[0], dtype="fp8", context=1), "ranks is 0"),
        (dict(tokens=[1], ranks=[5000], dtype="fp8", context=1), "ranks is 5000; from 1 to 4096"),
        (dict(tokens=[1], ranks=[1], dtype="int3", context=1), "dtype is 'int3'; known: float32"),
        (dict(tokens=[1], ranks=[1], dtype="fp8", context=0), "context is 0"),
    ],
)
def test_bad_input_is_named(arguments: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        planning.plan(presets.model("mixtral-8x7b"), **arguments)
