"""Rows of `presets` whose routers are not the plain top K: noise, random second choices, experts that choose, thresholds.

FastMoE is a system and has no row. Its gates are settings: naive is Mixtral's router (a softmax over the K chosen logits), noisy is
Shazeer's, gshard and switch are those of their papers with capacity factors of 1.2 in training and 2.4 in evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .config import BalanceConfig, CapacityConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig
from .model_config import AttentionConfig

# fmt: off
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
        moe=MoEConfig(
            2048,
            gating=GatingConfig(top_k=2),
            capacity=CapacityConfig("per_token", factor=1.25, eval_factor=2.0, minimum=4),
            experts=ExpertsConfig(32, 8192, shared=1),
            balance=BalanceConfig((("expert_balance", 0.02), ("router_z", 1e-4))),  # the paper's 0.01 weighs a loss of K = 2 at even load
        ),
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
