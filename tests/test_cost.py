"""Costs: parameters against published totals, against models that others wrote, and against the arrays themselves."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from reference import AttentionConfig, ExpertsConfig, GatingConfig, ModelConfig, MoEConfig, ScoresConfig, cost, init_params, presets
from reference.experts import ACTIVATIONS
from reference.layer import BUFFERS
from reference.shared import SHARED_GATES

# A device context learns at its first use which constructors it redirects: here, before a fixture wraps them.
with torch.device("meta"):
    torch.empty(0)

ALL: frozenset[str] = frozenset()
NO_LOOKUP = frozenset({"embedding"})
NO_TABLES = frozenset({"embedding", "head"})
EXPERTS_ONLY = frozenset(cost.COMPONENTS) - {"routed_experts", "shared_experts"}
SHARED_ONLY = frozenset({"routed_experts"})


class Published(NamedTuple):
    """A printed number of billions, of which components, and how closely its print lets it be judged.

    rule   "percent": within 1 %. Where the print is too coarse for that, "rounded": the count rounds to it, in units of its last
           digit, or "cut": the count begins with its digits (3.35 printed as 3.3). "at most": the print is a bound.
           "language": the print includes encoders of images, of at most 2 %.
    """

    preset: str
    what: str
    billions: float
    without: frozenset[str]
    rule: str
    unit: float
    where: str


PUBLISHED = [
    Published("dense", "total", 7.3, ALL, "percent", 0.1, "Mistral 7B, announcement; the paper says 7B"),
    Published("gshard-600b", "total", 600, ALL, "rounded", 100, "GShard, Table 1; abstract: beyond 600 billion; its sizes give 619"),
    Published("switch-base-128", "total", 7.4, ALL, "percent", 0.1, "Switch, Tables 7 and 8"),
    Published("switch-c-2048", "total", 1571, ALL, "percent", 1, "Switch, Table 9, with 15 encoder and 15 decoder layers"),
    Published("mixtral-8x7b", "total", 46.7, ALL, "percent", 0.1, "Mixtral announcement; the paper says 47B"),
    Published("mixtral-8x7b", "active", 12.9, ALL, "percent", 0.1, "Mixtral announcement; the paper says 13B"),
    Published("mixtral-8x22b", "total", 141, ALL, "percent", 1, "Mixtral 8x22B, announcement"),
    Published("mixtral-8x22b", "active", 39, ALL, "percent", 1, "Mixtral 8x22B, announcement"),
    Published("olmoe-1b-7b", "total", 6.9, ALL, "percent", 0.1, "OLMoE, §2"),
    Published("olmoe-1b-7b", "active", 1.3, ALL, "rounded", 0.1, "OLMoE, §2"),
    Published("olmoe-1b-7b", "active", 1.2, NO_LOOKUP, "rounded", 0.1, "first version of the model card"),
    Published("qwen3-30b-a3b", "total", 30.5, ALL, "percent", 0.1, "model card"),
    Published("qwen3-30b-a3b", "total", 29.9, NO_TABLES, "percent", 0.1, "model card, non-embedding: neither embedding nor head"),
    Published("qwen3-30b-a3b", "active", 3.3, ALL, "cut", 0.1, "model card"),
    Published("qwen3-235b-a22b", "total", 235, ALL, "percent", 1, "model card"),
    Published("qwen3-235b-a22b", "total", 234, NO_TABLES, "percent", 1, "model card, non-embedding"),
    Published("qwen3-235b-a22b", "active", 22, ALL, "percent", 1, "model card"),
    Published("deepseek-moe-2b", "total", 2.0, ALL, "rounded", 0.1, "DeepSeekMoE, Table 7"),
    Published("deepseek-moe-2b", "active", 0.3, ALL, "rounded", 0.1, "DeepSeekMoE, Table 1"),
    Published("deepseek-moe-2b", "total", 1.89, EXPERTS_ONLY, "percent", 0.01, "DeepSeekMoE, Table 2, expert parameters"),
    Published("deepseek-moe-2b", "active", 0.24, EXPERTS_ONLY, "rounded", 0.01, "DeepSeekMoE, Table 2, expert parameters"),
    Published("deepseek-moe-16b", "total", 16.4, ALL, "percent", 0.1, "DeepSeekMoE, Table 7"),
    Published("deepseek-moe-16b", "active", 2.8, ALL, "rounded", 0.1, "DeepSeekMoE, §5.1.2"),
    Published("deepseek-moe-145b", "total", 144.6, ALL, "percent", 0.1, "DeepSeekMoE, §7.1"),
    Published("deepseek-moe-145b", "active", 22.2, ALL, "percent", 0.1, "DeepSeekMoE, §7.1"),
    Published("deepseek-v2", "total", 236, ALL, "percent", 1, "DeepSeek-V2, §3.1.2"),
    Published("deepseek-v2", "active", 21, NO_LOOKUP, "percent", 1, "DeepSeek-V2, §3.1.2; with the embedding 21.4"),
    Published("deepseek-v2-lite", "total", 15.7, ALL, "percent", 0.1, "DeepSeek-V2, §B.1"),
    Published("deepseek-v2-lite", "active", 2.4, NO_LOOKUP, "cut", 0.1, "DeepSeek-V2, §B.1; with the embedding 2.7"),
    Published("deepseek-v3", "total", 671, ALL, "percent", 1, "DeepSeek-V3, §4.2: without the multi-token-prediction module"),
    Published("deepseek-v3", "active", 37, NO_LOOKUP, "rounded", 1, "DeepSeek-V3, §4.2; with the embedding 37.6, which rounds to 38"),
    Published("deepseek-v3", "active", 36.7, NO_LOOKUP, "percent", 0.1, "DeepSeek-V3 repository, README_WEIGHTS"),
    Published("shazeer-2017", "total", 0.2729, NO_TABLES, "percent", 0.0001, "Shazeer et al. 2017, Table 7: one more LSTM than counted"),
    Published("glam-64b-64e", "total", 1200, ALL, "rounded", 100, "GLaM, abstract; its sizes give 1162"),
    Published("glam-64b-64e", "active", 96.6, ALL, "percent", 0.1, "GLaM, its table of model sizes"),
    Published("st-moe-32b", "total", 269, ALL, "percent", 1, "ST-MoE, abstract"),
    Published("openmoe-8b", "total", 8.7, ALL, "percent", 0.1, "OpenMoE, Table 11"),
    Published("openmoe-34b", "total", 34, NO_TABLES, "percent", 1, "OpenMoE, Table 11, a name: with the table its sizes give 34.6"),
    Published("openmoe-34b", "active", 6, NO_TABLES, "cut", 1, "OpenMoE, Table 11; with the tied table 7.4"),
    Published("soft-moe-s16-128", "total", 0.933, ALL, "percent", 0.001, "Soft MoE, Table 8"),
    Published("soft-moe-s16-128", "active", 0.033, ALL, "percent", 0.001, "Soft MoE, Table 1: the dense ViT S/16"),
    Published("soft-moe-b16-128", "total", 3.7, ALL, "percent", 0.1, "Soft MoE, Table 1"),
    Published("soft-moe-b16-128", "active", 0.108, ALL, "percent", 0.001, "Soft MoE, Table 1: the dense ViT B/16"),
    Published("base-layer-44b", "total", 44.4, ALL, "percent", 0.1, "BASE layers, §4.3"),
    Published("base-layer-44b", "total", 1.3, SHARED_ONLY, "percent", 0.1, "BASE layers, §4.3: shared parameters"),
    Published("hash-layer-1.28b", "total", 1.28, ALL, "percent", 0.01, "ParlAI, params_vs_compute; its vocabulary follows from this total"),
    Published("hash-layer-1.28b", "active", 0.2176, ALL, "rounded", 0.0128, "ParlAI, params_vs_compute: 17 % of the total"),
    Published("expert-choice-8b-64e", "total", 143, ALL, "percent", 1, "Expert Choice, Table 1"),
    Published("moe-plus-plus-7b", "total", 7, NO_TABLES, "rounded", 1, "MoE++, Table 2, a name: with the tables its sizes give 7.7"),
    Published("moe-plus-plus-7b", "active", 1.2, NO_TABLES, "at most", 0.1, "MoE++, Table 2: at most, with two networks for each token"),
    Published("deepspeed-moe-1.3b-128", "total", 52, ALL, "percent", 1, "DeepSpeed-MoE, Table 4"),
    Published("deepspeed-moe-1.3b-128", "active", 1.3, ALL, "rounded", 0.1, "DeepSpeed-MoE, §3"),
    Published("deepspeed-moe-350m-128", "total", 13, ALL, "rounded", 1, "DeepSpeed-MoE, Table 4"),
    Published("deepspeed-moe-350m-128", "active", 0.35, ALL, "cut", 0.01, "DeepSpeed-MoE, §3"),
    Published("pr-moe-1.3b-64-128", "total", 31, ALL, "rounded", 1, "DeepSpeed-MoE, Table 4"),
    Published("pr-moe-350m-32-64", "total", 4, ALL, "rounded", 1, "DeepSpeed-MoE, Table 4"),
    Published("remoe-182m", "active", 0.182, ALL, "percent", 0.001, "ReMoE, Table 1; its total is not printed there"),
    Published("deepseek-r1", "total", 671, ALL, "percent", 1, "model card"),
    Published("deepseek-r1", "active", 37, NO_LOOKUP, "rounded", 1, "model card"),
    Published("switch-xxl-128", "total", 395, ALL, "percent", 1, "Switch, Table 9"),
    Published("qwen1.5-moe-a2.7b", "total", 14.3, ALL, "percent", 0.1, "model card"),
    Published("qwen1.5-moe-a2.7b", "active", 2.7, ALL, "percent", 0.1, "model card"),
    Published("qwen2-57b-a14b", "total", 57, ALL, "percent", 1, "Qwen2, Table 1"),
    Published("qwen2-57b-a14b", "active", 14, ALL, "rounded", 1, "Qwen2, Table 1"),
    Published("gpt-oss-120b", "total", 116.83, ALL, "percent", 0.01, "gpt-oss model card, Table 1"),
    Published("gpt-oss-120b", "active", 5.13, NO_LOOKUP, "percent", 0.01, "gpt-oss model card, Table 1: with the head alone"),
    Published("gpt-oss-20b", "total", 20.91, ALL, "percent", 0.01, "gpt-oss model card, Table 1"),
    Published("gpt-oss-20b", "active", 3.61, NO_LOOKUP, "percent", 0.01, "gpt-oss model card, Table 1: with the head alone"),
    Published("deepseek-v4-flash", "total", 284, ALL, "percent", 1, "DeepSeek-V4, §4.2.1"),
    Published("deepseek-v4-flash", "active", 13, ALL, "rounded", 1, "DeepSeek-V4, §4.2.1"),
    Published("deepseek-v4-flash-hash", "total", 284, ALL, "percent", 1, "DeepSeek-V4, §4.2.1: the same model"),
    Published("llama4-scout", "total", 109, ALL, "language", 1, "model card; with a vision encoder that is not counted here"),
    Published("llama4-scout", "active", 17, ALL, "rounded", 1, "model card"),
    Published("llama4-maverick", "total", 400, ALL, "percent", 1, "model card"),
    Published("longcat-flash", "total", 560, ALL, "percent", 1, "LongCat-Flash, abstract"),
    Published("longcat-flash", "active", 27, NO_LOOKUP, "percent", 1, "LongCat-Flash, abstract: the mean over tokens"),
    Published("llama4-maverick", "active", 17, ALL, "rounded", 1, "model card"),
]


def by_percent(count: float, row: Published) -> bool:
    return abs(count - row.billions) <= 0.01 * row.billions


def by_rounding(count: float, row: Published) -> bool:
    return abs(count - row.billions) <= row.unit / 2


def by_cutting(count: float, row: Published) -> bool:
    return row.billions <= count < row.billions + row.unit


def by_a_bound(count: float, row: Published) -> bool:
    return count <= row.billions


def by_the_language_part(count: float, row: Published) -> bool:
    return 0.98 * row.billions <= count < row.billions


RULES = {"percent": by_percent, "rounded": by_rounding, "cut": by_cutting, "language": by_the_language_part, "at most": by_a_bound}


def billions(row: Published) -> float:
    parts = cost.model_parameters(presets.model(row.preset))
    return getattr(cost.sum_parameters(parts, without=row.without), row.what) / 1e9


@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row.preset}-{row.what}-{row.billions}")
def test_published_sizes(row):
    count = billions(row)
    assert RULES[row.rule](count, row), f"{count:.4f}B, published {row.billions}B ({row.where})"
    assert row.rule == "percent" or not by_percent(count, row), "1 % holds, so judge by it"


def test_every_preset_has_a_published_size():
    printed = {row.preset for row in PUBLISHED}
    assert printed | {name for name in presets.names() if name.startswith("fastmoe-")} == set(presets.names())
    assert not any(name.startswith("fastmoe-") for name in printed), "a system's example, whose size nobody printed"


@pytest.mark.parametrize(("preset", "without_tables", "all_of_it"), [("openmoe-34b", 33.8, 34.6), ("moe-plus-plus-7b", 7.5, 7.7)])
def test_a_size_that_is_a_name_says_so_in_its_source(preset, without_tables, all_of_it):
    parts = cost.model_parameters(presets.model(preset))
    counted = [round(cost.sum_parameters(parts, without=left_out).total / 1e9, 1) for left_out in (NO_TABLES, ALL)]
    assert counted == [without_tables, all_of_it]
    assert re.search(rf"is its name: {without_tables} billion without .*, {all_of_it} with", presets.source(preset))


@pytest.mark.parametrize(("experts", "published"), [(32, 2.0), (64, 3.8), (128, 7.4), (256, 14.7)])
def test_switch_base_with_other_numbers_of_experts(experts, published):
    """Switch, Table 7: the same model with more and more experts."""
    model = presets.model("switch-base-128")
    model = replace(model, moe=replace(model.moe, experts=replace(model.moe.experts, count=experts)))
    assert round(cost.sum_parameters(cost.model_parameters(model)).total / 1e9, 1) == published


def common(model: ModelConfig) -> dict:
    attention = model.attention
    return dict(
        hidden_size=model.d_model, num_hidden_layers=model.layers, vocab_size=model.vocabulary, intermediate_size=model.dense_width,
        num_attention_heads=attention.heads, num_key_value_heads=attention.kv_heads, tie_word_embeddings=model.tied_embeddings,
        num_experts_per_tok=model.moe.gating.top_k,
    )  # fmt: skip


def latent(model: ModelConfig) -> dict:
    attention, experts = model.attention, model.moe.experts
    return common(model) | dict(
        q_lora_rank=attention.q_rank or None, kv_lora_rank=attention.kv_rank, qk_rope_head_dim=attention.rope_dim,
        qk_nope_head_dim=attention.head_dim, v_head_dim=attention.v_head_dim, first_k_dense_replace=model.first_dense,
        moe_intermediate_size=experts.width, n_routed_experts=experts.count, n_shared_experts=experts.shared, pad_token_id=None,
    )  # fmt: skip


def switch(model: ModelConfig) -> transformers.SwitchTransformersConfig:
    sparse = sum(map(model.is_moe, range(model.layers)))
    return transformers.SwitchTransformersConfig(
        vocab_size=model.vocabulary, d_model=model.d_model, d_kv=model.attention.head_dim, d_ff=model.dense_width,
        num_layers=model.encoder_layers, num_decoder_layers=model.layers, num_heads=model.attention.heads,
        num_sparse_encoder_layers=sparse, num_sparse_decoder_layers=sparse, num_experts=model.moe.experts.count,
        relative_attention_num_buckets=model.attention.relative_buckets,
    )  # fmt: skip


def mixtral(model: ModelConfig) -> transformers.MixtralConfig:
    return transformers.MixtralConfig(**common(model), num_local_experts=model.moe.experts.count)


def qwen3(model: ModelConfig) -> transformers.Qwen3MoeConfig:
    experts, head_dim = model.moe.experts, model.attention.head_dim
    return transformers.Qwen3MoeConfig(**common(model), head_dim=head_dim, moe_intermediate_size=experts.width, num_experts=experts.count)


def qwen2(model: ModelConfig) -> transformers.Qwen2MoeConfig:
    experts = model.moe.experts
    return transformers.Qwen2MoeConfig(
        **common(model), moe_intermediate_size=experts.width, num_experts=experts.count,
        shared_expert_intermediate_size=experts.total_shared_width,
    )  # fmt: skip


def llama4(model: ModelConfig) -> transformers.Llama4TextConfig:
    experts = model.moe.experts
    return transformers.Llama4TextConfig(
        **{**common(model), "intermediate_size": experts.width}, intermediate_size_mlp=model.dense_width, num_local_experts=experts.count,
        head_dim=model.attention.head_dim, interleave_moe_layer_step=model.moe_every,
    )  # fmt: skip


THEIR_CONFIGS = {
    "qwen1.5-moe-a2.7b": qwen2,
    "qwen2-57b-a14b": qwen2,
    "llama4-scout": llama4,
    "llama4-maverick": llama4,
    "dense": lambda model: transformers.MistralConfig(**common(model)),
    "switch-base-128": switch,
    "mixtral-8x7b": mixtral,
    "mixtral-8x22b": mixtral,
    "olmoe-1b-7b": lambda model: transformers.OlmoeConfig(**common(model), num_experts=model.moe.experts.count),
    "qwen3-30b-a3b": qwen3,
    "qwen3-235b-a22b": qwen3,
    "deepseek-v2": lambda model: transformers.DeepseekV2Config(**latent(model)),
    "deepseek-v2-lite": lambda model: transformers.DeepseekV2Config(**latent(model)),
    "deepseek-v3": lambda model: transformers.DeepseekV3Config(**latent(model)),
}


@pytest.mark.parametrize("name", THEIR_CONFIGS)
def test_exactly_as_many_parameters_as_in_transformers(name):
    model = presets.model(name)
    config = THEIR_CONFIGS[name](model)
    auto = transformers.AutoModelForSeq2SeqLM if model.encoder_layers else transformers.AutoModelForCausalLM
    with torch.device("meta"):
        theirs = auto.from_config(config)
    assert cost.sum_parameters(cost.model_parameters(model)).total == sum(parameter.numel() for parameter in theirs.parameters())


@st.composite
def layers(draw) -> MoEConfig:
    experts = draw(st.integers(1, 9))
    return MoEConfig(
        d_model=draw(st.integers(1, 7)),
        scores=ScoresConfig(bias=draw(st.booleans())),
        gating=GatingConfig(top_k=draw(st.integers(1, experts)), correction_bias=draw(st.booleans())),
        experts=ExpertsConfig(
            count=experts,
            width=draw(st.integers(1, 6)),
            activation=draw(st.sampled_from(sorted(ACTIVATIONS))),
            bias=draw(st.booleans()),
            shared=(shared := draw(st.integers(0, 2))),
            shared_gate=draw(st.sampled_from(sorted(SHARED_GATES))) if shared else "none",
        ),
    )


@st.composite
def models(draw) -> ModelConfig:
    kv_heads, encoder = draw(st.integers(1, 3)), draw(st.integers(0, 3))
    kind = draw(st.sampled_from(["gqa", "mla"]))
    heads = kv_heads * draw(st.integers(1, 3))
    ranks = dict(q_rank=draw(st.integers(0, 3)), kv_rank=3, rope_dim=2, v_head_dim=4) if kind == "mla" else {}
    attention = AttentionConfig(kind, heads, kv_heads, head_dim=draw(st.integers(1, 4)), **ranks)
    return ModelConfig(
        "drawn",
        draw(layers()),
        layers=draw(st.integers(1, 5)),
        attention=attention,
        vocabulary=draw(st.integers(1, 9)),
        dense_width=5,
        first_dense=draw(st.integers(0, 3)),
        moe_every=draw(st.integers(0, 3)),
        encoder_layers=encoder,
        max_positions=draw(st.integers(0, 4)),
    )


@settings(deadline=None)
@given(layers())
def test_a_layer_counts_its_arrays(config):
    arrays = init_params(config, np.random.default_rng(0))
    counts = cost.layer_parameters(config)
    assert sum(count.total for count in counts.values()) == sum(a.size for name, a in arrays.items() if name not in BUFFERS)
    one_expert = sum(a[0].size for name, a in arrays.items() if name.startswith("experts."))
    assert counts["routed_experts"].active == config.gating.top_k * one_expert


@settings(deadline=None)
@given(layers())
def test_all_experts_chosen_means_all_parameters_active(config):
    counts = cost.layer_parameters(replace(config, gating=replace(config.gating, top_k=config.experts.count)))
    assert all(count.active == count.total for count in counts.values())


@settings(max_examples=60, deadline=None)
@given(models())
def test_components_of_a_model(model):
    parts = cost.model_parameters(model)
    assert tuple(parts) == cost.COMPONENTS
    assert all(0 <= count.active <= count.total for count in parts.values())
    everything = cost.sum_parameters(parts)
    assert everything.total - everything.active == parts["routed_experts"].total - parts["routed_experts"].active
    halves = [cost.sum_parameters(parts, without=set(cost.COMPONENTS[i::2])) for i in (0, 1)]
    assert halves[0].total + halves[1].total == everything.total
    assert (parts["cross_attention"].total > 0) == (model.encoder_layers > 0)
    assert (parts["router"].total == 0) == (not any(map(model.is_moe, range(max(model.layers, model.encoder_layers)))))


@settings(max_examples=60, deadline=None)
@given(models())
def test_one_more_layer_costs_that_layer(model):
    fewer, more = cost.model_parameters(model), cost.model_parameters(replace(model, layers=model.layers + 1))
    grown = {name: more[name].total - fewer[name].total for name in cost.COMPONENTS}
    assert (grown["router"] > 0) == model.is_moe(model.layers)
    assert (grown["dense_ffn"] > 0) == (not model.is_moe(model.layers))
    assert grown["norms"] == (3 if model.encoder_layers else 2) * model.d_model
    assert grown["embedding"] == grown["head"] == 0


@settings(max_examples=30, deadline=None)
@given(models())
def test_tied_embeddings_are_counted_once(model):
    free, tied = (cost.sum_parameters(cost.model_parameters(replace(model, tied_embeddings=flag))) for flag in (False, True))
    assert free.total - tied.total == model.vocabulary * model.d_model


@pytest.mark.parametrize("without", [{"embeddings"}, {"embedding", "experts"}])
def test_unknown_component(without):
    with pytest.raises(ValueError, match=r"there is no component '(embeddings|experts)'; known: embedding, attention"):
        cost.sum_parameters(cost.model_parameters(presets.model("dense")), without=without)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: AttentionConfig(qk_norm_joint=True), "qk_norm_joint is True but attention.qk_norm is False"),
        (lambda: AttentionConfig(relative_buckets=-1), "attention.relative_buckets is -1; it must be an integer ≥ 0"),
        (lambda: AttentionConfig("mla", kv_rank=1.5), "attention.kv_rank is 1.5"),
        (lambda: replace(presets.model("dense"), encoder_layers=-2), "encoder_layers is -2"),
        (lambda: replace(presets.model("dense"), max_positions=None), "max_positions is None"),
        (lambda: replace(presets.model("dense"), dense_width=0), "dense_width is 0; it must be an integer ≥ 1"),
    ],
)
def test_sizes_that_cannot_be_counted(build, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        build()


# Sizes whose costs can be counted on paper: D = 4, one layer, V = 10, one head of 4.
SMALL = ModelConfig(
    "small",
    MoEConfig(4, gating=GatingConfig(top_k=2), experts=ExpertsConfig(8, 3, shared=1)),
    layers=1,
    attention=AttentionConfig("gqa", 1, 1, 4),
    vocabulary=10,
)


def test_flops_by_hand():
    # q, k, v, o 4 · 16; router 8 · 4; two experts and the shared one 3 · (3 · 4 · 3); head 40.
    assert cost.flops_per_token(SMALL, 5).weights == 2 * (64 + 32 + 108 + 40)
    # On average 3 tokens seen, each with a key and a value of 4.
    assert cost.flops_per_token(SMALL, 5).attention == 2 * 8 * 3
    assert cost.flops_per_token(SMALL, 5).forward == 536 and cost.flops_per_token(SMALL, 5).training == 1608
    assert cost.flops_per_token(replace(SMALL, layers=3), 5).attention == 3 * 48
    latent = AttentionConfig("mla", 2, 2, 3, q_rank=2, kv_rank=2, rope_dim=1, v_head_dim=5)
    assert cost.flops_per_token(replace(SMALL, attention=latent), 1).attention == 2 * 2 * 9
    # An encoder layer sees all 5, and so does the decoder's cross-attention.
    recurrent = cost.flops_per_token(presets.model("shazeer-2017"), 5)
    assert recurrent.attention == 0 < recurrent.weights
    assert cost.flops_per_token(replace(SMALL, encoder_layers=1), 5).attention == 2 * 8 * (3 + 5 + 5)


def test_causal_attention_is_counted_pair_by_pair():
    context = 7
    pairs = sum(position + 1 for position in range(context))
    assert cost.flops_per_token(SMALL, context).attention * context == 2 * 8 * pairs


@pytest.mark.parametrize("name", presets.names())
def test_every_preset_has_its_flops(name):
    assert cost.flops_per_token(presets.model(name), 4096).weights > 0


def test_training_costs_three_forwards_as_pytorch_counts_them():
    from torch.utils.flop_counter import FlopCounterMode

    weight, x = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        y = x @ weight.T
        forward = counter.get_total_flops()
        y.sum().backward()
    assert forward == 2 * 3 * 4 * 5 and counter.get_total_flops() == 3 * forward


def test_experts_touched_by_hand_and_by_drawing(rng):
    config = SMALL.moe
    assert [cost.expected_experts_touched(config, tokens) for tokens in (0, 1, 2)] == [0, 2, 3.5]
    drawn = [cost.experts_touched(np.stack([rng.permutation(8)[:2] for _ in range(6)]), np.ones((6, 2), bool)) for _ in range(4000)]
    assert np.mean(drawn) == pytest.approx(cost.expected_experts_touched(config, 6), abs=0.06)
    kept = np.array([[True, False], [True, True], [False, False]])
    assert cost.experts_touched(np.array([[3, 1], [3, 0], [7, 5]]), kept) == 2


def test_bytes_by_hand():
    # attention 64, norms 3 · 4, router 32, shared 36, head 40; a row of 4 per token; experts of 36 numbers.
    assert cost.weight_bytes(SMALL, 1) == 2 * (184 + 4 + 2 * 36)
    assert cost.weight_bytes(SMALL, 2, bytes_per_weight=1) == 184 + 8 + 3.5 * 36
    assert cost.weight_bytes(SMALL, 2, touched=2, bytes_per_weight=1) == 184 + 8 + 2 * 36
    assert cost.weight_bytes(SMALL, 0) == 0
    everything = cost.sum_parameters(cost.model_parameters(SMALL), without={"embedding"}).total
    assert cost.weight_bytes(SMALL, 10_000, bytes_per_weight=1) == pytest.approx(everything + 40_000)


def test_activations_by_hand():
    # x 4, logits 8, two rows of (4 + 6 + 3 + 4), shared 6 + 3.
    assert cost.activation_bytes(SMALL.moe, 5) == 2 * 5 * (4 + 8 + 2 * 17 + 9)
    relu = replace(SMALL.moe, experts=ExpertsConfig(8, 3, "relu"))
    assert cost.activation_bytes(relu, 1, bytes_per_number=4) == 4 * (4 + 8 + 2 * (4 + 3 + 3 + 4))


@pytest.mark.parametrize("what", ["active", "total"])
@pytest.mark.parametrize("name", ["mixtral-8x7b", "deepseek-v3", "switch-base-128", "gpt-oss-20b", "llama4-maverick", "qwen2-57b-a14b"])
def test_dense_equals_have_the_size_asked_for(name, what):
    model = presets.model(name)
    wanted = getattr(cost.sum_parameters(cost.model_parameters(model)), what)
    dense = cost.sum_parameters(cost.model_parameters(cost.dense_equal(model, what)))
    assert dense.total == dense.active == pytest.approx(wanted, rel=1e-3)
    flops, equal = cost.flops_per_token(model, 4096), cost.flops_per_token(cost.dense_equal(model, what), 4096)
    assert equal.attention == flops.attention
    assert (equal.weights == pytest.approx(flops.weights, rel=2e-3)) == (what == "active")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: cost.flops_per_token(SMALL, 0), "context is 0"),
        (lambda: cost.expected_experts_touched(SMALL.moe, -1), "tokens is -1"),
        (lambda: cost.activation_bytes(SMALL.moe, -2), "tokens is -2"),
        (lambda: cost.weight_bytes(SMALL, 3, touched=9), "touched is 9; a layer has 8 experts"),
        (lambda: cost.experts_touched(np.zeros((3, 2), int), np.ones((2, 2), bool)), "keep has shape (2, 2), expert (3, 2)"),
        (lambda: cost.dense_equal(SMALL, "both"), "dense_equal was asked for 'both'; known: total, active"),
    ],
)
def test_costs_refuse_what_cannot_be(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
