"""The published architectures as data: one row per model, its sizes and its router, each with its source.

A row holds the fields of `ModelConfig`; `like` names the row whose fields it starts from. `tiny` derives a small version of any
row by one rule, so no row writes it down. A loss weight is the published number, applied to losses that are 1 at exact balance.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import open_weights
from .config import BalanceConfig, CapacityConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig
from .model_config import AttentionConfig, ModelConfig
from .preset_rows import ROUTERS

_TINY_D_MODEL, _TINY_WIDTH, _TINY_HEADS = 16, 8, 4

# fmt: off
_SWITCH = MoEConfig(
    768,
    ScoresConfig(noise="jitter", noise_scale=0.01),
    GatingConfig(top_k=1),
    CapacityConfig("per_token", factor=1.25, eval_factor=2.0),
    ExpertsConfig(128, 3072, "relu"),
    BalanceConfig((("first_choice_balance", 0.01),)),
)
_MIXTRAL = MoEConfig(
    4096,
    ScoresConfig("identity"),
    GatingConfig(top_k=2, normalize="softmax"),
    experts=ExpertsConfig(8, 14336),
    balance=BalanceConfig((("expert_balance", 0.02),)),
)
_QWEN3 = MoEConfig(
    2048,
    gating=GatingConfig(top_k=8, normalize="sum"),
    experts=ExpertsConfig(128, 768),
    balance=BalanceConfig((("expert_balance", 0.001),)),
)
_DEEPSEEK_MOE = MoEConfig(
    2048,
    gating=GatingConfig(top_k=6),
    experts=ExpertsConfig(64, 1408, shared=2),
    balance=BalanceConfig((("expert_balance", 0.001),)),
)
_MLA = AttentionConfig("mla", heads=128, kv_heads=128, head_dim=128, q_rank=1536, kv_rank=512, rope_dim=64, v_head_dim=128)

ROWS: Mapping[str, Mapping[str, Any]] = {
    "dense": dict(
        source="Jiang et al. 2023 (Mistral 7B, arXiv 2310.06825), Table 1: the model that Mixtral 8x7B is compared with",
        layers=32, moe_every=0, vocabulary=32000, dense_width=14336, attention=AttentionConfig("gqa", 32, 8, 128),
        moe=MoEConfig(4096, experts=ExpertsConfig(1, 14336)),
    ),
    # 64000 source and 32000 target words are published: with the head as many rows as the two tables of 64000 counted here.
    "gshard-600b": dict(
        source="Lepikhin et al. 2020 (GShard, arXiv 2006.16668), Table 1: MoE(2048E, 36L), and §A.2; loss weight: mesh-tensorflow",
        layers=18, encoder_layers=18, moe_every=2, vocabulary=64000, dense_width=8192, dense_activation="relu",
        attention=AttentionConfig("gqa", 16, 16, 128),
        moe=MoEConfig(
            1024,
            gating=GatingConfig(top_k=2, normalize="sum", second_choice="random"),
            capacity=CapacityConfig("per_assignment", factor=1.0),
            experts=ExpertsConfig(2048, 8192, "relu"),
            balance=BalanceConfig((("first_choice_balance", 0.01),)),
        ),
    ),
    "switch-base-128": dict(
        source="Fedus et al. 2021 (Switch Transformer, arXiv 2101.03961), §2; card google/switch-base-128; capacity: flaxformer",
        layers=12, encoder_layers=12, moe_every=2, vocabulary=32128, tied_embeddings=True, dense_width=3072, dense_activation="relu",
        attention=AttentionConfig("gqa", 12, 12, 64, relative_buckets=32), moe=_SWITCH,
    ),
    # Table 9 has 32 heads; the released configuration and flaxformer have 30.
    "switch-c-2048": dict(
        like="switch-base-128",
        source="Fedus et al. 2021 (Switch Transformer, arXiv 2101.03961), Table 9; capacity, separate head: flaxformer",
        layers=15, encoder_layers=15, moe_every=1, tied_embeddings=False, dense_width=6144,
        attention=AttentionConfig("gqa", 32, 32, 64, relative_buckets=32),
        moe=replace(
            _SWITCH, d_model=2080, experts=ExpertsConfig(2048, 6144, "relu"),
            capacity=CapacityConfig("per_token", factor=1.0, eval_factor=2.0),
        ),
    ),
    # Table 9 prints 64 experts, but its 395 billion parameters are those of 128, and 128 are released.
    "switch-xxl-128": dict(
        like="switch-base-128",
        source="Fedus et al. 2021 (Switch Transformer, arXiv 2101.03961), Table 9; card google/switch-xxl-128; capacity, head: flaxformer",
        layers=24, encoder_layers=24, tied_embeddings=False, dense_width=10240, dense_activation="geglu",
        attention=AttentionConfig("gqa", 64, 64, 64, relative_buckets=32),
        moe=replace(
            _SWITCH, d_model=4096, experts=ExpertsConfig(128, 10240, "geglu"),
            capacity=CapacityConfig("per_token", factor=1.25, eval_factor=4.0),
        ),
    ),
    "mixtral-8x7b": dict(
        source="Jiang et al. 2024 (Mixtral, arXiv 2401.04088), §2 and Table 1; loss weight: model card mistralai/Mixtral-8x7B-v0.1",
        layers=32, vocabulary=32000, dense_width=14336, attention=AttentionConfig("gqa", 32, 8, 128), moe=_MIXTRAL,
    ),
    "mixtral-8x22b": dict(
        like="mixtral-8x7b",
        source="Model card mistral-community/Mixtral-8x22B-v0.1",
        layers=56, dense_width=16384, attention=AttentionConfig("gqa", 48, 8, 128),
        moe=replace(_MIXTRAL, d_model=6144, experts=ExpertsConfig(8, 16384)),
    ),
    "olmoe-1b-7b": dict(
        source="Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060), §2; sizes: model card allenai/OLMoE-1B-7B-0924",
        layers=16, vocabulary=50304, dense_width=1024, attention=AttentionConfig("gqa", 16, 16, 128, qk_norm=True, qk_norm_joint=True),
        moe=MoEConfig(
            2048,
            gating=GatingConfig(top_k=8),
            experts=ExpertsConfig(64, 1024),
            balance=BalanceConfig((("expert_balance", 0.01), ("router_z", 0.001))),
        ),
    ),
    "qwen3-30b-a3b": dict(
        source="Yang et al. 2025 (Qwen3, arXiv 2505.09388), §2; sizes and loss weight: model card Qwen/Qwen3-30B-A3B",
        layers=48, vocabulary=151936, dense_width=6144, attention=AttentionConfig("gqa", 32, 4, 128, qk_norm=True), moe=_QWEN3,
    ),
    "qwen3-235b-a22b": dict(
        like="qwen3-30b-a3b",
        source="Yang et al. 2025 (Qwen3, arXiv 2505.09388), §2; sizes and loss weight: model card Qwen/Qwen3-235B-A22B",
        layers=94, dense_width=12288, attention=AttentionConfig("gqa", 64, 4, 128, qk_norm=True),
        moe=replace(_QWEN3, d_model=4096, experts=ExpertsConfig(128, 1536)),
    ),
    # An expert is published as a quarter of a standard FFN and 1.89B expert parameters in all; a standard SwiGLU FFN is 8/3 · D wide.
    "deepseek-moe-2b": dict(
        source="Dai et al. 2024 (DeepSeekMoE, arXiv 2401.06066), §4.1.3 and Table 7",
        layers=9, vocabulary=8192, dense_width=3413, attention=AttentionConfig("gqa", 10, 10, 128),
        moe=replace(
            _DEEPSEEK_MOE, d_model=1280, gating=GatingConfig(top_k=7), experts=ExpertsConfig(63, 853, shared=1),
            balance=BalanceConfig((("expert_balance", 0.01),)),
        ),
    ),
    "deepseek-moe-16b": dict(
        source="Dai et al. 2024 (DeepSeekMoE, arXiv 2401.06066), §5.1.2 and Table 7; widths: model card deepseek-ai/deepseek-moe-16b-base",
        layers=28, first_dense=1, vocabulary=102400, dense_width=10944, attention=AttentionConfig("gqa", 16, 16, 128), moe=_DEEPSEEK_MOE,
    ),
    # Widths are published as an eighth of a standard FFN, up to a multiple of 64; the dense FFN follows the 16B: two standard FFNs.
    "deepseek-moe-145b": dict(
        like="deepseek-moe-16b",
        source="Dai et al. 2024 (DeepSeekMoE, arXiv 2401.06066), §7 and Table 7",
        layers=62, dense_width=21888, attention=AttentionConfig("gqa", 32, 32, 128),
        moe=replace(
            _DEEPSEEK_MOE, d_model=4096, gating=GatingConfig(top_k=12, groups=4, top_groups=4),
            experts=ExpertsConfig(128, 1408, shared=4), balance=BalanceConfig((("expert_balance", 0.003), ("device_balance", 0.05))),
        ),
    ),
    "deepseek-v2": dict(
        source="DeepSeek-AI 2024 (DeepSeek-V2, arXiv 2405.04434), §2.2 and §3.1.2; model card deepseek-ai/DeepSeek-V2",
        layers=60, first_dense=1, vocabulary=102400, dense_width=12288, attention=_MLA,
        moe=MoEConfig(
            5120,
            gating=GatingConfig(top_k=6, groups=8, top_groups=3, group_score="max", scale=16.0),
            experts=ExpertsConfig(160, 1536, shared=2),
            balance=BalanceConfig((("expert_balance", 0.003), ("device_balance", 0.05), ("communication_balance", 0.02))),
        ),
    ),
    "deepseek-v2-lite": dict(
        like="deepseek-moe-16b",
        source="DeepSeek-AI 2024 (DeepSeek-V2, arXiv 2405.04434), §B.1; model card deepseek-ai/DeepSeek-V2-Lite",
        layers=27, attention=replace(_MLA, heads=16, kv_heads=16, q_rank=0),
    ),
    "deepseek-v3": dict(
        source="DeepSeek-AI 2024 (DeepSeek-V3, arXiv 2412.19437), §2.1.2 and §4.2; model card deepseek-ai/DeepSeek-V3",
        layers=61, first_dense=3, vocabulary=129280, dense_width=18432, attention=_MLA,
        moe=MoEConfig(
            7168,
            ScoresConfig("sigmoid"),
            GatingConfig(
                top_k=8, correction_bias=True, groups=8, top_groups=4, group_score="top2_sum", normalize="sum", eps=1e-20, scale=2.5
            ),
            experts=ExpertsConfig(256, 2048, shared=1),
            balance=BalanceConfig((("sequence_balance", 1e-4),), bias_rule="sign", bias_rate=0.001),
        ),
    ),
    "deepseek-r1": dict(
        like="deepseek-v3",
        source="DeepSeek-AI 2025 (DeepSeek-R1, arXiv 2501.12948): trained from DeepSeek-V3-Base, the same architecture",
    ),
    **ROUTERS,
    **open_weights.ROWS,
}
# fmt: on


def names() -> tuple[str, ...]:
    """Every preset, one per published model."""
    return tuple(ROWS)


def source(name: str) -> str:
    """Where the sizes and the router of a preset are published. Raises ValueError for an unknown name."""
    return _fields(name)["source"]


def get(name: str) -> MoEConfig:
    """One MoE layer of a published model, at its published size. Raises ValueError for an unknown name."""
    return model(name).moe


def tiny(name: str) -> MoEConfig:
    """The same router on a layer small enough for a test: D = 16, F = 8, at most 8 experts. Raises ValueError for an unknown name.

    At most 4 groups, about half of them open where groups are limited, and fewer chosen than there are open experts, so that every
    rule of the full router still decides something; rules, capacity factors, noise and loss weights are those of the full router.
    """
    full = get(name)
    groups = min(full.gating.groups, 4)
    count = min(full.experts.count, 8 // groups * groups)
    top_groups = groups if full.gating.top_groups == full.gating.groups else max(1, groups // 2)
    top_k = min(full.gating.top_k, max(1, top_groups * count // groups - 1), 3)
    free = tuple((kind, max(1, round(number * count / full.experts.count))) for kind, number in full.experts.zero_computation)
    shared_width = full.experts.shared_width
    shared_width = None if shared_width is None else _scaled(shared_width, full)
    return replace(
        full,
        d_model=_TINY_D_MODEL,
        gating=replace(full.gating, groups=groups, top_groups=top_groups, top_k=top_k, vocabulary=min(full.gating.vocabulary, 256)),
        experts=replace(full.experts, count=count, width=_TINY_WIDTH, shared_width=shared_width, zero_computation=free),
    )


def model(name: str, *, tiny: bool = False) -> ModelConfig:
    """The whole model of a preset, or a tiny decoder with the same pattern of layers. Raises ValueError for an unknown name.

    Tiny: the layer `presets.tiny(name)`, bytes as vocabulary, 2 to 4 layers. It keeps which layers are dense, how far key/value heads
    are shared and whether queries and keys are normalised. What training does not build becomes its plain form: multi-head latent
    attention and LSTMs become multi-head, an encoder and second FFNs are left out, learned positions and relative biases give way to the
    rotary ones.
    """
    fields = {key: value for key, value in _fields(name).items() if key != "like"}
    full = ModelConfig(name=name, **fields)
    return _tiny_model(full) if tiny else full


def _fields(name: str) -> Mapping[str, Any]:
    if name not in ROWS:
        close = difflib.get_close_matches(str(name), ROWS, n=1, cutoff=0.5)
        hint = f"; did you mean {close[0]!r}?" if close else "."
        raise ValueError(f"there is no preset {name!r}{hint} Known: {', '.join(ROWS)}")
    row = ROWS[name]
    return {**_fields(row["like"]), **row} if "like" in row else row


def _scaled(width: int, full: MoEConfig) -> int:
    return max(1, round(width * _TINY_WIDTH / full.experts.width))


def _tiny_model(full: ModelConfig) -> ModelConfig:
    first_dense = min(full.first_dense, 1)
    every = min(full.moe_every, 4 - first_dense)
    periods = 2 if every <= 2 else 1
    attention = AttentionConfig(
        heads=_TINY_HEADS,
        kv_heads=max(1, _TINY_HEADS * full.attention.kv_heads // full.attention.heads),
        head_dim=_TINY_D_MODEL // _TINY_HEADS,
        bias=full.attention.bias,
        qk_norm=full.attention.qk_norm,
    )
    counts, moe_layers = full.expert_counts, periods if every else 0
    ends = [counts[number * (len(counts) - 1) // max(moe_layers - 1, 1)] for number in range(moe_layers)] if counts else []
    most = tiny(full.name).experts.count
    return replace(
        full,
        name=f"{full.name}-tiny",
        moe=tiny(full.name),
        expert_counts=tuple(max(2, round(count * most / full.moe.experts.count)) for count in ends),
        layers=first_dense + max(every, 1) * periods,
        attention=attention,
        vocabulary=256,
        dense_width=_scaled(full.dense_width, full.moe),
        extra_dense=False,
        first_dense=first_dense,
        moe_every=every,
        encoder_layers=0,
        max_positions=0,
        source=f"derived by rule from {full.name}: {full.source}",
    )
