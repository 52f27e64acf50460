"""Presets: every row builds, survives JSON, runs at its tiny size, and says what the released configurations say."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import transformers

from reference import ModelConfig, MoEConfig, cost, init_params, moe_backward, moe_forward, presets

every_preset = pytest.mark.parametrize("name", presets.names())


def test_issue_names_are_there():
    wanted = {"dense", "gshard-600b", "switch-base-128", "mixtral-8x7b", "mixtral-8x22b", "olmoe-1b-7b", "qwen3-30b-a3b", "qwen3-235b-a22b",
              "deepseek-moe-2b", "deepseek-moe-16b", "deepseek-moe-145b", "deepseek-v2", "deepseek-v3", "deepseek-r1"}  # fmt: skip
    assert wanted <= set(presets.names())


@every_preset
@pytest.mark.parametrize("tiny", [False, True])
def test_round_trip_through_json(name, tiny):
    model = presets.model(name, tiny=tiny)
    assert ModelConfig.from_dict(json.loads(json.dumps(model.to_dict()))) == model
    assert MoEConfig.from_dict(json.loads(json.dumps(model.moe.to_dict()))) == model.moe
    assert model.moe == (presets.tiny(name) if tiny else presets.get(name))


@every_preset
def test_source_names_a_paper_or_a_model_card(name):
    text = presets.source(name)
    assert "arXiv" in text or "card" in text
    assert presets.model(name).source == text
    assert name in presets.model(name, tiny=True).source


@every_preset
def test_tiny_keeps_the_router(name):
    full, tiny = presets.get(name), presets.tiny(name)
    assert (tiny.d_model, tiny.experts.width) == (16, 8) and tiny.experts.count <= 8
    sizes = dict(top_k=full.gating.top_k, groups=full.gating.groups, top_groups=full.gating.top_groups, vocabulary=full.gating.vocabulary)
    assert replace(tiny.gating, **sizes) == full.gating
    assert (tiny.scores, tiny.capacity, tiny.balance) == (full.scores, full.capacity, full.balance)
    assert tiny.experts.shared == full.experts.shared and tiny.experts.activation == full.experts.activation


@every_preset
def test_tiny_router_still_decides(name):
    full, tiny = presets.get(name).gating, presets.tiny(name).gating
    experts = presets.tiny(name).experts.count
    assert tiny.top_k < tiny.top_groups * experts // tiny.groups or experts == 1
    assert (tiny.top_groups < tiny.groups) == (full.top_groups < full.groups)
    assert (tiny.top_k > 1) == (full.top_k > 1)


@every_preset
def test_tiny_layer_runs_forward_and_backward(name, rng):
    config = presets.tiny(name)
    params = init_params(config, rng)
    x_TD = rng.standard_normal((12, config.d_model))
    output, cache = moe_forward(x_TD, params, config, training=True, rng=rng, token_ids=np.arange(12))
    assert output.y.shape == x_TD.shape and np.isfinite(output.y).all() and output.routing.load.sum() > 0
    assert set(output.losses) == {loss for loss, _ in config.balance.losses}
    dx_TD, dparams = moe_backward(rng.standard_normal(x_TD.shape), cache)
    assert np.isfinite(dx_TD).all() and all(np.isfinite(gradient).all() for gradient in dparams.values())


@every_preset
def test_tiny_model_has_the_pattern_of_the_full_one(name):
    full, tiny = presets.model(name), presets.model(name, tiny=True)
    kinds = [tiny.is_moe(layer) for layer in range(tiny.layers)]
    assert 2 <= tiny.layers <= 4 and tiny.vocabulary == 256 and tiny.encoder_layers == 0
    assert any(kinds) == any(full.is_moe(layer) for layer in range(full.layers))
    assert (False in kinds) == any(not full.is_moe(layer) for layer in range(full.layers))
    attention = tiny.attention
    assert attention.kind == "gqa" and attention.head_dim % 2 == 0 and attention.heads * attention.head_dim == tiny.d_model
    assert (attention.kv_heads < attention.heads) == (full.attention.kv_heads < full.attention.heads)
    assert cost.sum_parameters(cost.model_parameters(tiny)).total < 50_000


def test_layers_follow_the_papers():
    v3, gshard = presets.model("deepseek-v3"), presets.model("gshard-600b")
    assert [v3.is_moe(layer) for layer in range(5)] == [False, False, False, True, True]
    assert [gshard.is_moe(layer) for layer in range(4)] == [False, True, False, True]
    assert not any(presets.model("dense").is_moe(layer) for layer in range(32))
    r1 = presets.model("deepseek-r1")
    assert replace(r1, name=v3.name, source=v3.source) == v3


@pytest.mark.parametrize("call", [presets.get, presets.tiny, presets.model, presets.source])
def test_unknown_name_lists_the_known_and_suggests(call):
    with pytest.raises(ValueError, match=r"'deepseek_v3'; did you mean 'deepseek-v3'\? Known: dense, gshard-600b"):
        call("deepseek_v3")
    with pytest.raises(ValueError, match=r"no preset 'zzz'\. Known: dense"):
        call("zzz")


def test_mixtral_is_the_released_default():
    released, model = transformers.MixtralConfig(), presets.model("mixtral-8x7b")
    experts, attention = model.moe.experts, model.attention
    assert (model.d_model, model.layers, model.vocabulary) == (released.hidden_size, released.num_hidden_layers, released.vocab_size)
    assert (experts.count, experts.width) == (released.num_local_experts, released.intermediate_size)
    assert model.moe.gating.top_k == released.num_experts_per_tok
    assert (attention.heads, attention.kv_heads) == (released.num_attention_heads, released.num_key_value_heads)
    assert model.tied_embeddings == released.tie_word_embeddings


def test_openmoe_34b_is_the_released_configuration():
    """Values of ColossalAI's openmoe_34b_config.json, whose untied head is the one field that is not followed."""
    model, experts = presets.model("openmoe-34b"), presets.get("openmoe-34b").experts
    assert (model.d_model, model.layers, model.moe_every, model.vocabulary) == (3072, 32, 4, 256384)
    assert (model.dense_width, experts.count, experts.width, presets.get("openmoe-34b").gating.top_k) == (12288, 32, 12288, 2)
    assert (model.attention.heads, model.attention.kv_heads, model.attention.head_dim) == (24, 24, 128)
    capacity = presets.get("openmoe-34b").capacity
    assert (capacity.factor, capacity.eval_factor, capacity.minimum) == (1.25, 2.0, 4)


def test_longcat_flash_says_that_its_rate_is_not_known():
    balance = presets.get("longcat-flash").balance
    assert (balance.bias_rule, balance.bias_rate) == ("proportional", 0.0)
    assert "no published value of μ was found" in presets.source("longcat-flash")


def test_longcat_flash_is_the_released_default():
    released, model = transformers.LongcatFlashConfig(), presets.model("longcat-flash")
    experts, attention = model.moe.experts, model.attention
    assert (model.d_model, model.layers, model.vocabulary) == (released.hidden_size, released.num_hidden_layers, released.vocab_size)
    assert (experts.networks, experts.width) == (released.n_routed_experts, released.expert_ffn_hidden_size)
    assert experts.zero_computation == (("copy", released.zero_expert_num),)
    assert (model.moe.gating.top_k, model.moe.gating.scale) == (released.moe_topk, released.routed_scaling_factor)
    assert (model.dense_width, attention.heads) == (released.ffn_hidden_size, released.num_attention_heads)
    assert (attention.q_rank, attention.kv_rank) == (released.q_lora_rank, released.kv_lora_rank)
    assert (attention.head_dim, attention.rope_dim) == (released.qk_nope_head_dim, released.qk_rope_head_dim)
    assert attention.v_head_dim == released.v_head_dim


def test_deepseek_v3_is_the_released_default():
    released, model = transformers.DeepseekV3Config(), presets.model("deepseek-v3")
    experts, gating, attention = model.moe.experts, model.moe.gating, model.attention
    assert (model.d_model, model.layers, model.vocabulary) == (released.hidden_size, released.num_hidden_layers, released.vocab_size)
    assert (experts.count, experts.width) == (released.n_routed_experts, released.moe_intermediate_size)
    assert experts.shared == released.n_shared_experts
    assert (gating.top_k, gating.groups, gating.top_groups) == (released.num_experts_per_tok, released.n_group, released.topk_group)
    assert gating.scale == released.routed_scaling_factor and (gating.normalize == "sum") == released.norm_topk_prob
    assert (model.first_dense, model.dense_width) == (released.first_k_dense_replace, released.intermediate_size)
    assert (attention.heads, attention.q_rank, attention.kv_rank) == (128, released.q_lora_rank, released.kv_lora_rank)
    assert (attention.head_dim, attention.rope_dim) == (released.qk_nope_head_dim, released.qk_rope_head_dim)
    assert attention.v_head_dim == released.v_head_dim
