"""The model of the tour: DeepSeek-V3's layer at a size that two CPU cores train in a minute, and the same model trained for longer."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

from torch import nn

from ..config import BalanceConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig, require
from ..model_config import AttentionConfig, ModelConfig
from ..text import Corpus
from .layer import MoE
from .training import TrainConfig, train

TOUR_MODEL = ModelConfig(
    "tour",
    MoEConfig(
        128,
        ScoresConfig("sigmoid"),
        GatingConfig(top_k=4, correction_bias=True, groups=4, top_groups=2, group_score="top2_sum", normalize="sum", eps=1e-20, scale=2.5),
        experts=ExpertsConfig(16, 32, shared=1),
        balance=BalanceConfig((("sequence_balance", 1e-4),), bias_rule="sign", bias_rate=1e-3),
    ),
    layers=4,
    attention=AttentionConfig(heads=4, kv_heads=2, head_dim=32),
    dense_width=256,
    first_dense=1,
    source="the router of DeepSeek-V3 (technical report, §2.1.2) with its loss weight and bias rate; sizes chosen for two CPU cores",
)
"""A byte model: 16 experts in 4 groups, 4 chosen from the 2 best groups, and 1 shared; the first of its layers is dense."""

TOUR_TRAIN = TrainConfig(
    steps=480,
    batch=16,
    length=128,
    lr=4e-3,
    warmup=40,
    domain_weights=(("code", 0.5), ("prose", 0.25), ("arithmetic", 0.25)),
    log_every=10,
    evaluate_every=120,
    heldout=32,
    checkpoint_every=0,
)
"""About a minute. `steps_in` fits the steps to another machine, or to another time."""

MODEL_TRAIN = replace(
    TOUR_TRAIN,
    steps=4000,
    length=256,
    warmup=200,
    domain_weights=(("code", 0.6), ("prose", 0.15), ("arithmetic", 0.25)),  # there is least prose, and it comes round most often
    log_every=20,
    evaluate_every=600,
    checkpoint_every=300,
)
"""The committed model."""


def steps_in(
    seconds: float, model_config: ModelConfig, train_config: TrainConfig, corpus: Corpus, *, moe_class: Callable[..., nn.Module] = MoE
) -> int:
    """How many steps of `train_config` fit into this many seconds on this machine, at least 1: measured on five steps after three."""
    require(seconds > 0, f"seconds is {seconds}; it must be > 0")
    times: list[float] = []
    probe = replace(train_config, steps=8, log_every=1, evaluate_every=0, checkpoint_every=0, warmup=0)
    train(model_config, probe, corpus, moe_class=moe_class, progress=False, callback=lambda row, model: times.append(time.perf_counter()))
    return max(1, int(seconds * 5 / (times[-1] - times[2])))
