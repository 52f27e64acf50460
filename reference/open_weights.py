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
}
