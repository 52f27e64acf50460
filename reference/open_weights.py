"""Rows of `presets.ROWS` for models whose sizes and router are public through their released weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .config import BalanceConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig
from .model_config import AttentionConfig

# fmt: off
_QWEN2 = MoEConfig(
    2048,
    gating=GatingConfig(top_k=4),
    experts=ExpertsConfig(60, 1408, shared=4, shared_gate="sigmoid"),
    balance=BalanceConfig((("expert_balance", 0.001),)),
)
_GPT_OSS = MoEConfig(
    2880,
    ScoresConfig("identity", bias=True),
    GatingConfig(top_k=4, normalize="softmax"),
    experts=ExpertsConfig(128, 2880, "clamped_swiglu", bias=True),
)
_LONGCAT = MoEConfig(
    6144,
    gating=GatingConfig(top_k=12, correction_bias=True, scale=6.0),
    experts=ExpertsConfig(768, 2048, zero_computation=(("copy", 256),)),
    balance=BalanceConfig(bias_rule="proportional", bias_rate=0.0),
)
# SwiGLU's sides are capped at ±10 while V4 is trained, which is left out.
_DEEPSEEK_V4 = MoEConfig(
    4096,
    ScoresConfig("sqrt_softplus"),
    GatingConfig(top_k=6, correction_bias=True, normalize="sum", eps=1e-20, scale=1.5),
    experts=ExpertsConfig(256, 2048, shared=1),
    balance=BalanceConfig((("sequence_balance", 1e-4),), bias_rule="sign", bias_rate=0.001),
)
_LLAMA4 = MoEConfig(5120, ScoresConfig("sigmoid"), experts=ExpertsConfig(16, 8192, gate_inputs=True, shared=1))

ROWS: Mapping[str, Mapping[str, Any]] = {
    "qwen1.5-moe-a2.7b": dict(
        source="Model card Qwen/Qwen1.5-MoE-A2.7B; the layer: Yang et al. 2024 (Qwen2, arXiv 2407.10671), §2.2.2",
        layers=24, vocabulary=151936, dense_width=5632, attention=AttentionConfig("gqa", 16, 16, 128, bias=True), moe=_QWEN2,
    ),
    "qwen2-57b-a14b": dict(
        source="Yang et al. 2024 (Qwen2, arXiv 2407.10671), §2.2.2 and Table 1; model card Qwen/Qwen2-57B-A14B",
        layers=28, vocabulary=151936, dense_width=18944, attention=AttentionConfig("gqa", 28, 4, 128, bias=True),
        moe=replace(
            _QWEN2, d_model=3584, gating=GatingConfig(top_k=8), experts=ExpertsConfig(64, 2560, shared=8, shared_gate="sigmoid"),
        ),
    ),
    # The attention's output bias and its one sink per head (0.1 million parameters in all) are not counted.
    "gpt-oss-120b": dict(
        source="OpenAI 2025 (gpt-oss model card, arXiv 2508.10925), §2 and Table 1; model card openai/gpt-oss-120b",
        layers=36, vocabulary=201088, dense_width=2880, attention=AttentionConfig("gqa", 64, 8, 64, bias=True), moe=_GPT_OSS,
    ),
    "gpt-oss-20b": dict(
        like="gpt-oss-120b",
        source="OpenAI 2025 (gpt-oss model card, arXiv 2508.10925), §2 and Table 1; model card openai/gpt-oss-20b",
        layers=24, moe=replace(_GPT_OSS, experts=replace(_GPT_OSS.experts, count=32)),
    ),
    # The text model; the vision encoder before it is not counted. Scout normalises queries and keys without parameters.
    "llama4-scout": dict(
        source="Meta 2025, model card meta-llama/Llama-4-Scout-17B-16E",
        layers=48, vocabulary=202048, dense_width=16384, attention=AttentionConfig("gqa", 40, 8, 128), moe=_LLAMA4,
    ),
    "llama4-maverick": dict(
        like="llama4-scout",
        source="Meta 2025, model card meta-llama/Llama-4-Maverick-17B-128E",
        moe_every=2, moe=replace(_LLAMA4, experts=replace(_LLAMA4.experts, count=128)),
    ),
    # The attention's compressors and indexers, the mixing of residual streams and the module that predicts a second token: not counted.
    "deepseek-v4-flash": dict(
        source="DeepSeek-AI 2026 (DeepSeek-V4, arXiv 2606.19348), §4.2: V4-Flash; the rest: model card deepseek-ai/DeepSeek-V4-Flash",
        layers=43, vocabulary=129280, dense_width=2048, moe=_DEEPSEEK_V4,
        attention=AttentionConfig("grouped_output", 64, 1, 512, q_rank=1024, rope_dim=64, o_groups=8, o_rank=1024),
    ),
    "deepseek-v4-flash-hash": dict(
        like="deepseek-v4-flash",
        source="DeepSeek-AI 2026 (DeepSeek-V4, arXiv 2606.19348), §4.2: V4-Flash, layers 1 to 3; model card as above",
        moe=replace(
            _DEEPSEEK_V4,
            gating=GatingConfig(top_k=6, choice="hash", vocabulary=129280, normalize="sum", eps=1e-20, scale=1.5),
            balance=BalanceConfig((("sequence_balance", 1e-4),)),
        ),
    ),
    # One of the report's 28 layers is two here: attention and a dense FFN twice, and one mixture, which runs beside the first FFN. The
    # module that predicts a second token is not counted. The rate is 0 until whoever trains it sets one: no value of μ, which decays in
    # the report, was found. Its device-level loss is left out: neither its groups nor its weight were found.
    "longcat-flash": dict(
        source="LongCat Team 2025 (LongCat-Flash, arXiv 2509.01322), §2; sizes: model card meituan-longcat/LongCat-Flash-Chat; "
        "no published value of μ was found",
        layers=56, moe_every=2, extra_dense=True, vocabulary=131072, dense_width=12288, moe=_LONGCAT,
        attention=AttentionConfig("mla", 64, 64, 128, q_rank=1536, kv_rank=512, rope_dim=64, v_head_dim=128),
    ),
}
