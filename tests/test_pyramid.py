"""Models whose MoE layers differ in their number of experts: what they cost, and that they are built and trained as configured."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from reference import AttentionConfig, ExpertsConfig, GatingConfig, ModelConfig, MoEConfig, ScoresConfig, cost, presets
from reference.autograd.transformer import LanguageModel

PYRAMID = ModelConfig(
    "pyramid",
    MoEConfig(16, gating=GatingConfig(top_k=2), experts=ExpertsConfig(6, 5, shared=1, shared_gate="softmax")),
    layers=6,
    attention=AttentionConfig("gqa", 2, 2, 8),
    vocabulary=20,
    moe_every=2,
    expert_counts=(2, 3, 6),
)


def test_layers_have_their_own_experts():
    assert [PYRAMID.layer_moe(layer).experts.count for layer in (1, 3, 5)] == [2, 3, 6]
    assert [config.experts.count for config in PYRAMID.moe_layers()] == [2, 3, 6]
    flat = replace(PYRAMID, expert_counts=())
    assert flat.moe_layers() == [PYRAMID.moe] * 3
    pr_moe = presets.model("pr-moe-1.3b-64-128")
    assert [config.experts.count for config in pr_moe.moe_layers()] == [64] * 10 + [128] * 2
    assert pr_moe.moe_layers()[-1] == presets.get("pr-moe-1.3b-64-128")
    assert presets.model("pr-moe-1.3b-64-128", tiny=True).expert_counts == (4, 8)


def test_costs_are_sums_over_the_layers():
    parts, flat = cost.model_parameters(PYRAMID), cost.model_parameters(replace(PYRAMID, expert_counts=()))
    one_expert = 3 * 16 * 5
    assert parts["routed_experts"] == ((2 + 3 + 6) * one_expert, 3 * 2 * one_expert) and parts["router"].total == 11 * 16
    assert {name: parts[name] for name in parts if name not in ("routed_experts", "router")} == {
        name: flat[name] for name in flat if name not in ("routed_experts", "router")
    }
    model = LanguageModel(PYRAMID)
    assert cost.sum_parameters(parts).total == sum(parameter.numel() for parameter in model.parameters())
    few, many = (cost.weight_bytes(PYRAMID, tokens, bytes_per_weight=1) for tokens in (1, 10_000))
    assert many - few == pytest.approx(9_999 * 16 + 5 * one_expert)
    with pytest.raises(ValueError, match="touched is 3; a layer has 2 experts"):
        cost.weight_bytes(PYRAMID, 1, touched=3)


@pytest.mark.parametrize("what", ["active", "total"])
@pytest.mark.parametrize("name", ["pr-moe-1.3b-64-128", "longcat-flash"])
def test_dense_equals_of_uneven_models_have_the_size_asked_for(name, what):
    model = presets.model(name)
    wanted = getattr(cost.sum_parameters(cost.model_parameters(model)), what)
    dense = cost.sum_parameters(cost.model_parameters(cost.dense_equal(model, what)))
    assert dense.total == dense.active == pytest.approx(wanted, rel=1e-3)


@pytest.mark.parametrize("networks, billions", [(0, 18.6), (12, 31.3)])
def test_longcat_s_easiest_and_hardest_tokens(networks, billions):
    """The report's abstract: between 18.6 and 31.3 billion parameters are active for a token; printed digits, not rounded."""
    model = presets.model("longcat-flash")
    parts = cost.model_parameters(model)
    rest = cost.sum_parameters(parts, without={"embedding", "routed_experts"}).active
    active = rest + 28 * networks * cost.ffn_parameters(model.d_model, model.moe.experts.width, "swiglu")
    assert billions <= active / 1e9 < billions + 0.1


def test_moe_plus_plus_s_bound_is_a_token_with_two_networks():
    model = presets.model("moe-plus-plus-7b")
    parts = cost.model_parameters(model)
    rest = cost.sum_parameters(parts, without={"embedding", "routed_experts"}).active
    assert round((rest + 24 * 2 * cost.ffn_parameters(1536, 4096, "swiglu")) / 1e9, 1) == 1.2
    plain = replace(model.moe, experts=ExpertsConfig(16, 4096))
    share = cost.layer_parameters(model.moe)["routed_experts"].active / cost.layer_parameters(plain)["routed_experts"].active
    assert share == pytest.approx(0.75 * 16 / (0.75 * 16 + 4), rel=1e-3), "Table 1"


def test_experts_touched_are_networks(rng):
    config = presets.tiny("longcat-flash")
    networks = config.experts.networks
    drawn = [np.stack([rng.permutation(8)[:3] for _ in range(4)]) for _ in range(4000)]
    counted = np.mean([cost.experts_touched(expert_TK, np.ones((4, 3), bool), networks) for expert_TK in drawn])
    assert counted == pytest.approx(cost.expected_experts_touched(config, 4), abs=0.06)
    assert cost.activation_bytes(config, 1) < cost.activation_bytes(replace(config, experts=ExpertsConfig(8, 8)), 1)


def test_a_pyramid_trains():
    model = LanguageModel(replace(PYRAMID, moe=replace(PYRAMID.moe, gating=GatingConfig(top_k=2, correction_bias=True))))
    tokens = torch.randint(0, 20, (2, 9))
    logits, aux = model(tokens)
    assert {layer: len(part.routing.load) for layer, part in aux.layers.items()} == {1: 2, 3: 3, 5: 6}
    logits.square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for name, parameter in model.named_parameters() if "down_proj" in name)
    model.update_bias({layer: part.routing.load for layer, part in aux.layers.items()})


BAD = {
    "too few": (dict(expert_counts=(2, 6)), "expert_counts has 2 entries; the model has 3 MoE layers"),
    "no expert": (dict(expert_counts=(0, 3, 6)), "expert_counts is (0, 3, 6); a layer needs at least 1 expert"),
    "more than the layer has": (dict(expert_counts=(2, 3, 7)), "the largest of expert_counts is 7, but moe.experts.count is 6"),
    "fewer than are chosen": (dict(expert_counts=(1, 3, 6)), "gating.top_k is 2 but experts.count is 1"),
    "with gating residuals": (
        dict(moe=replace(PYRAMID.moe, scores=ScoresConfig(residual=True))),
        "scores.residual adds logits of layers with equal experts, but expert_counts is (2, 3, 6)",
    ),
    "with an encoder": (dict(encoder_layers=2), "expert_counts is for decoders alone, but encoder_layers is 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_counts_are_refused(name):
    fields, message = BAD[name]
    with pytest.raises(ValueError, match=re.escape(message)):
        replace(PYRAMID, **fields)
