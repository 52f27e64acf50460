"""Rows of `presets` whose routers are not the plain top K: noise, random second choices, experts that choose, thresholds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from .config import BalanceConfig, CapacityConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig
from .model_config import AttentionConfig

# fmt: off
_OPENMOE = MoEConfig(
    2048,
    gating=GatingConfig(top_k=2),
    capacity=CapacityConfig("per_token", factor=1.25, eval_factor=2.0, minimum=4),
    experts=ExpertsConfig(32, 8192, shared=1),
    balance=BalanceConfig((("expert_balance", 0.02), ("router_z", 1e-4))),  # the paper's 0.01 weighs a loss of K = 2 at even load
)

_FASTMOE = MoEConfig(
    512,
    ScoresConfig("identity", bias=True),
    GatingConfig(top_k=2, normalize="softmax"),
    experts=ExpertsConfig(64, 1024, "relu", bias=True),
)
_DEEPSPEED = MoEConfig(
    2048,
    capacity=CapacityConfig("per_assignment", factor=1.0, minimum=4, order="random"),
    experts=ExpertsConfig(128, 8192, "gelu", bias=True),
    balance=BalanceConfig((("first_choice_balance", 0.01),)),
)

ROUTERS: Mapping[str, Mapping[str, Any]] = {
    # MoE-256, the flat model of the loss study: an LSTM before the mixture (counted) and one after it, embeddings aside.
    "shazeer-2017": dict(
        source="Shazeer et al. 2017 (arXiv 1701.06538), §C.1 and Table 7: MoE-256; vocabulary: §5.1",
        layers=1, vocabulary=793471, dense_width=1024, dense_activation="relu", attention=AttentionConfig("lstm"),
        moe=MoEConfig(
            512,
            ScoresConfig("identity", logit_noise="learned"),
            GatingConfig(top_k=4, normalize="softmax"),
            experts=ExpertsConfig(256, 1024, "relu"),
            balance=BalanceConfig((("importance", 0.1), ("smooth_load", 0.1))),
        ),
    ),
    "glam-64b-64e": dict(
        source="Du et al. 2021 (GLaM, arXiv 2112.06905): the table of model sizes, and the text for vocabulary and loss weight",
        layers=64, moe_every=2, vocabulary=256000, tied_embeddings=True, dense_width=32768, dense_activation="geglu",
        attention=AttentionConfig("gqa", 128, 128, 128, relative_buckets=32),
        moe=MoEConfig(
            8192,
            gating=GatingConfig(top_k=2, normalize="sum", second_choice="random"),
            capacity=CapacityConfig("per_assignment", factor=1.0),
            experts=ExpertsConfig(64, 32768, "gelu"),
            balance=BalanceConfig((("first_choice_balance", 0.01),)),
        ),
    ),
    "st-moe-32b": dict(
        source="Zoph et al. 2022 (ST-MoE, arXiv 2202.08906), §6.2, Table 11, §C and §G; layers, vocabulary, head: flaxformer's st_moe_32b",
        layers=24, encoder_layers=24, moe_every=4, extra_dense=True, vocabulary=32128,
        dense_width=20480, dense_activation="geglu", attention=AttentionConfig("gqa", 64, 64, 128, relative_buckets=32),
        moe=MoEConfig(
            5120,
            gating=GatingConfig(top_k=2, normalize="sum", second_choice="random", second_threshold=0.2),
            capacity=CapacityConfig("per_token", factor=1.25, eval_factor=2.0, minimum=4),
            experts=ExpertsConfig(64, 20480, "geglu"),
            balance=BalanceConfig((("first_choice_balance", 0.01), ("router_z", 0.001))),
        ),
    ),
    # The dense FFN beside the experts, which OpenMoE gives a norm of its own, is the shared expert.
    "openmoe-8b": dict(
        source="Xue et al. 2024 (OpenMoE, arXiv 2402.01739), §2.2, Tables 11 and 12; capacity: openmoe_8b_config.json of ColossalAI",
        layers=24, moe_every=6, vocabulary=256384, tied_embeddings=True, dense_width=8192, attention=AttentionConfig("gqa", 24, 24, 128),
        moe=_OPENMOE,
    ),
    # Every size is that of ColossalAI's openmoe_34b_config.json but for the head, which that file does not tie (35.4 billion then): a tied
    # one is what gives openmoe-8b its printed total.
    "openmoe-34b": dict(
        like="openmoe-8b",
        source="Xue et al. 2024 (OpenMoE, arXiv 2402.01739), §2.2 and Table 11; openmoe_34b_config.json of ColossalAI; 34B is its name: "
        "33.8 billion without the vocabulary's table, 34.6 with it",
        layers=32, moe_every=4, dense_width=12288, attention=AttentionConfig("gqa", 24, 24, 128),
        moe=replace(_OPENMOE, d_model=3072, experts=ExpertsConfig(32, 12288, shared=1)),
    ),
    "expert-choice-8b-64e": dict(
        source="Zhou et al. 2022 (Expert Choice, arXiv 2202.09368), §3.2, §3.4 and §4.1: EC-CF2; sizes: Table 1, 8B/64E",
        layers=32, moe_every=2, vocabulary=256000, tied_embeddings=True, dense_width=16384, dense_activation="geglu",
        attention=AttentionConfig("gqa", 32, 32, 128, relative_buckets=32),
        moe=MoEConfig(
            4096,
            gating=GatingConfig(top_k=2, choice="expert_choice"),
            capacity=CapacityConfig("per_assignment", factor=1.0),
            experts=ExpertsConfig(64, 16384, "gelu"),
        ),
    ),
    # A vision model: 196 patches of an image are a group, the head has 29,593 classes, and patches come in through a matrix that is not
    # counted. 128 slots for 196 tokens: `cost` counts each token's active parameters as those of one expert, a third too many.
    "soft-moe-s16-128": dict(
        source="Puigcerver et al. 2023 (Soft MoE, arXiv 2308.00951), §2, §3.4 and Table 8: S/16 128E; widths, classes: vmoe's soft_moe",
        layers=12, first_dense=6, vocabulary=29593, tied_embeddings=True, max_positions=196, dense_width=1536, dense_activation="gelu",
        attention=AttentionConfig("gqa", 6, 6, 64, qk_norm=True),
        moe=MoEConfig(384, gating=GatingConfig(choice="soft", slots=1), experts=ExpertsConfig(128, 1536, "gelu", bias=True)),
    ),
    "soft-moe-b16-128": dict(
        like="soft-moe-s16-128",
        source="Puigcerver et al. 2023 (Soft MoE, arXiv 2308.00951), §2, §3.4 and Table 1: B/16 128E; widths, classes: vmoe's soft_moe",
        dense_width=3072, attention=AttentionConfig("gqa", 12, 12, 64, qk_norm=True),
        moe=MoEConfig(768, gating=GatingConfig(choice="soft", slots=1), experts=ExpertsConfig(128, 3072, "gelu", bias=True)),
    ),
    # An expert is ten residual blocks of width 8192; counted, and computed in the recipe, is one network of the same parameters. The one
    # layer of experts comes on top of a whole block, in the paper of the 12th, here of the last.
    "base-layer-44b": dict(
        source="Lewis et al. 2021 (BASE layers, arXiv 2103.16716), §3 and §4.1, sizes of the standard expert: §4.4",
        layers=24, moe_every=24, extra_dense=True, vocabulary=51200, tied_embeddings=True, dense_width=8096, dense_activation="relu",
        attention=AttentionConfig("gqa", 16, 16, 128),
        moe=MoEConfig(2048, ScoresConfig("sigmoid"), GatingConfig(choice="balanced"), experts=ExpertsConfig(128, 81920, "relu")),
    ),
    # Width 1024: (1.28 − 0.751) billion over 64 more experts of width 4096. Depth: ParlAI's hash layer is its layer 7. No source that was
    # read prints the vocabulary: this is what the total leaves for two tables. A gate of 1 is the softmax over the one expert chosen; the
    # matrix behind it has no effect.
    "hash-layer-1.28b": dict(
        source="Roller et al. 2021 (Hash layers, arXiv 2106.04426), 128 experts; sizes: ParlAI's params_vs_compute",
        layers=8, moe_every=8, vocabulary=55600, dense_width=4096, dense_activation="relu", attention=AttentionConfig("gqa", 16, 16, 64),
        moe=MoEConfig(
            1024,
            ScoresConfig("identity"),
            GatingConfig(choice="hash", vocabulary=55600, normalize="softmax"),
            experts=ExpertsConfig(128, 4096, "relu"),
        ),
    ),
    # Released code drops nothing in evaluation: no expert fills at a factor of E.
    "moe-plus-plus-7b": dict(
        source="Jin et al. 2024 (MoE++, arXiv 2410.07348), §3, §4.1, Tables 2 and 3 and §B.2: MoE++ 7B/(16+4)E; 7B is its name: "
        "7.5 billion without the vocabulary's tables, 7.7 with them",
        layers=24, vocabulary=65536, dense_width=4096, attention=AttentionConfig("gqa", 16, 16, 96),
        moe=MoEConfig(
            1536,
            ScoresConfig(residual=True),
            GatingConfig(top_k=2),
            CapacityConfig("per_assignment", factor=1.1, eval_factor=20.0),
            experts=ExpertsConfig(20, 4096, zero_computation=(("constant", 2), ("copy", 1), ("zero", 1)), network_share=0.75),
            balance=BalanceConfig((("heterogeneous_balance", 0.01),)),
        ),
    ),
    # GPT-3's sizes with GPT-2's vocabulary and learned positions. Tokens are dropped at random, the default of DeepSpeed's MoE.
    "deepspeed-moe-1.3b-128": dict(
        source="Rajbhandari et al. 2022 (DeepSpeed-MoE, arXiv 2201.05596), §3; capacity, loss weight: Megatron-DeepSpeed's examples",
        layers=24, moe_every=2, vocabulary=50257, tied_embeddings=True, max_positions=2048, dense_width=8192, dense_activation="gelu",
        attention=AttentionConfig("gqa", 16, 16, 128, bias=True), moe=_DEEPSPEED,
    ),
    "deepspeed-moe-350m-128": dict(
        like="deepspeed-moe-1.3b-128",
        source="Rajbhandari et al. 2022 (DeepSpeed-MoE, arXiv 2201.05596), §3; capacity, loss weight: Megatron-DeepSpeed's examples",
        dense_width=4096, attention=AttentionConfig("gqa", 16, 16, 64, bias=True),
        moe=replace(_DEEPSPEED, d_model=1024, experts=ExpertsConfig(128, 4096, "gelu", bias=True)),
    ),
    "pr-moe-1.3b-64-128": dict(
        like="deepspeed-moe-1.3b-128",
        source="Rajbhandari et al. 2022 (DeepSpeed-MoE, arXiv 2201.05596), §4.1 and Table 4; counts: Megatron-DeepSpeed's examples",
        expert_counts=(64,) * 10 + (128,) * 2,
        moe=replace(_DEEPSPEED, experts=ExpertsConfig(128, 8192, "gelu", bias=True, shared=1, shared_gate="softmax")),
    ),
    "pr-moe-350m-32-64": dict(
        like="deepspeed-moe-350m-128",
        source="Rajbhandari et al. 2022 (DeepSpeed-MoE, arXiv 2201.05596), §4.1 and Table 4; counts: Megatron-DeepSpeed's examples",
        expert_counts=(32,) * 10 + (64,) * 2,
        moe=replace(_DEEPSPEED, d_model=1024, experts=ExpertsConfig(64, 4096, "gelu", bias=True, shared=1, shared_gate="softmax")),
    ),
    # A system: these are its gates in the model of its example. No paper prints the sizes, and each user sets the losses' weights.
    "fastmoe-naive": dict(
        source="He et al. 2021 (FastMoE, arXiv 2103.13262); gate and sizes: laekov/fastmoe, naive_gate.py and run_enwik8_base_moe.sh",
        layers=12, vocabulary=204, tied_embeddings=True, dense_width=1024, dense_activation="relu",
        attention=AttentionConfig("gqa", 8, 8, 64), moe=_FASTMOE,
    ),
    "fastmoe-noisy": dict(
        like="fastmoe-naive",
        source="He et al. 2021 (FastMoE, arXiv 2103.13262); gate and sizes: laekov/fastmoe, noisy_gate.py and run_enwik8_base_moe.sh",
        moe=replace(
            _FASTMOE, scores=ScoresConfig("identity", logit_noise="learned"),
            balance=BalanceConfig((("importance", 1.0), ("smooth_load", 1.0))),
        ),
    ),
    "fastmoe-gshard": dict(
        like="fastmoe-naive",
        source="He et al. 2021 (FastMoE, arXiv 2103.13262); gate and sizes: laekov/fastmoe, gshard_gate.py and run_enwik8_base_moe.sh",
        moe=replace(
            _FASTMOE, gating=GatingConfig(top_k=2, normalize="softmax", second_choice="random"),
            capacity=CapacityConfig("per_assignment", factor=1.2, eval_factor=2.4, order="token_major"),
            balance=BalanceConfig((("first_choice_balance", 1.0),)),
        ),
    ),
    "fastmoe-switch": dict(
        like="fastmoe-naive",
        source="He et al. 2021 (FastMoE, arXiv 2103.13262); gate and sizes: laekov/fastmoe, switch_gate.py and run_enwik8_base_moe.sh",
        moe=replace(
            _FASTMOE, scores=ScoresConfig(bias=True, noise="jitter", noise_scale=0.1), gating=GatingConfig(),
            capacity=CapacityConfig("per_token", factor=1.2, eval_factor=2.4, order="token_major"),
            balance=BalanceConfig((("first_choice_balance", 1.0),)),
        ),
    ),
    "remoe-182m": dict(
        source="Wang et al. 2024 (ReMoE, arXiv 2412.14711), §3 and Table 1; FFN width and vocabulary: the scripts of thu-ml/ReMoE",
        layers=12, vocabulary=51200, dense_width=3072, attention=AttentionConfig("gqa", 12, 4, 64),
        moe=MoEConfig(
            768,
            ScoresConfig("relu"),
            GatingConfig(top_k=1, choice="positive"),
            experts=ExpertsConfig(8, 3072),
            balance=BalanceConfig((("gate_l1", 1.0),)),
        ),
    ),
}
# fmt: on
