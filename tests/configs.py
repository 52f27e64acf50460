"""Tiny layers that together use every row of every table of the reference; `random_params` and `random_tokens` fill them."""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import BalanceConfig, CapacityConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig, init_params
from reference.choices import CHOICES
from reference.layer import Params

VOCABULARY = 11

CONFIGS: dict[str, MoEConfig] = {
    "switch": MoEConfig(
        6,
        ScoresConfig(noise="jitter", noise_scale=0.01),
        GatingConfig(top_k=1),
        CapacityConfig("per_token", factor=1.25, eval_factor=2.0),
        ExpertsConfig(4, 5, "relu"),
        BalanceConfig((("first_choice_balance", 0.01),)),
    ),
    "gshard": MoEConfig(
        6,
        gating=GatingConfig(top_k=2, normalize="sum", second_choice="random"),
        capacity=CapacityConfig("per_assignment", factor=0.8, minimum=1),
        experts=ExpertsConfig(4, 5, "relu"),
        balance=BalanceConfig((("first_choice_balance", 0.01), ("router_z", 0.001))),
    ),
    "mixtral": MoEConfig(
        6,
        ScoresConfig("identity"),
        GatingConfig(top_k=2, normalize="softmax"),
        experts=ExpertsConfig(8, 4),
        balance=BalanceConfig((("expert_balance", 0.02),)),
    ),
    "token-major": MoEConfig(
        6,
        gating=GatingConfig(top_k=3),
        capacity=CapacityConfig("per_assignment", factor=1.0, order="token_major"),
        experts=ExpertsConfig(8, 4),
        balance=BalanceConfig((("expert_balance", 0.01), ("router_z", 0.001))),
    ),
    "shared": MoEConfig(
        6,
        gating=GatingConfig(top_k=3),
        experts=ExpertsConfig(7, 3, shared=2),
        balance=BalanceConfig((("expert_balance", 0.001), ("sequence_balance", 0.01))),
    ),
    "deepseek-v2": MoEConfig(
        6,
        gating=GatingConfig(top_k=3, groups=4, top_groups=2, group_score="max", scale=16.0),
        experts=ExpertsConfig(8, 4, shared=1),
        balance=BalanceConfig((("sequence_balance", 0.003), ("device_balance", 0.05), ("communication_balance", 0.02))),
    ),
    "deepseek-v3": MoEConfig(
        6,
        ScoresConfig("sigmoid"),
        GatingConfig(top_k=2, correction_bias=True, groups=4, top_groups=2, group_score="top2_sum", normalize="sum", eps=1e-20, scale=2.5),
        experts=ExpertsConfig(8, 4, shared=1),
        balance=BalanceConfig((("sequence_balance", 0.0001),), bias_rule="sign", bias_rate=0.001),
    ),
    "biases": MoEConfig(
        5,
        ScoresConfig(bias=True),
        GatingConfig(top_k=2, correction_bias=True),
        CapacityConfig("per_token", factor=2.5),
        ExpertsConfig(5, 3, "gelu", bias=True, shared=1, shared_width=4),
        BalanceConfig((("first_choice_balance", 1.0), ("expert_balance", 1.0), ("sequence_balance", 1.0), ("router_z", 1.0))),
    ),
    "swiglu-biases": MoEConfig(
        6,
        ScoresConfig("identity", bias=True),
        GatingConfig(top_k=2, normalize="softmax"),
        experts=ExpertsConfig(4, 3, bias=True, shared=1),
        balance=BalanceConfig((("sequence_balance", 0.1), ("router_z", 0.1))),
    ),
    "noisy": MoEConfig(
        6,
        ScoresConfig("identity", logit_noise="learned"),
        GatingConfig(top_k=2, normalize="softmax"),
        experts=ExpertsConfig(5, 4, "relu"),
        balance=BalanceConfig((("importance", 0.1), ("smooth_load", 0.2))),
    ),
    "normed": MoEConfig(
        6,
        ScoresConfig(input_norm="rms", softcap=2.0),
        GatingConfig(top_k=2, normalize="sum", expert_scale=True),
        experts=ExpertsConfig(5, 4),
        balance=BalanceConfig((("importance", 0.1), ("router_z", 0.1))),
    ),
    "sampled": MoEConfig(6, gating=GatingConfig(top_k=3, choice="gumbel", groups=4, top_groups=2), experts=ExpertsConfig(8, 4)),
    "st-moe": MoEConfig(
        6,
        gating=GatingConfig(top_k=2, normalize="sum", second_choice="random", second_threshold=0.2, after_drop=True),
        capacity=CapacityConfig("per_token", factor=0.8, order="batch_prioritized"),
        experts=ExpertsConfig(4, 5, "relu"),
        balance=BalanceConfig((("first_choice_balance", 0.01), ("router_z", 0.001))),
    ),
    "by-probability": MoEConfig(
        6,
        ScoresConfig("identity"),
        GatingConfig(top_k=3, normalize="softmax", after_drop=True),
        CapacityConfig("per_assignment", factor=0.7, order="probability"),
        ExpertsConfig(5, 4),
    ),
    "random-order": MoEConfig(
        6, gating=GatingConfig(top_k=2), capacity=CapacityConfig("per_assignment", factor=0.7, order="random"), experts=ExpertsConfig(4, 3)
    ),
    "recycled": MoEConfig(
        6,
        capacity=CapacityConfig("per_token", factor=1.0, recycle="random"),
        experts=ExpertsConfig(4, 3, shared=1),
        balance=BalanceConfig((("first_choice_balance", 0.1),)),
    ),
    "expert-choice": MoEConfig(
        6,
        gating=GatingConfig(top_k=2, choice="expert_choice"),
        capacity=CapacityConfig("per_assignment", factor=1.0),
        experts=ExpertsConfig(5, 4, "gelu"),
    ),
    "hash": MoEConfig(
        6,
        ScoresConfig("sqrt_softplus"),
        GatingConfig(top_k=2, choice="hash", vocabulary=VOCABULARY, normalize="sum", eps=1e-20, scale=1.5),
        experts=ExpertsConfig(5, 4, shared=1),
    ),
    "soft": MoEConfig(6, gating=GatingConfig(choice="soft", slots=2), experts=ExpertsConfig(5, 4, "gelu", bias=True)),
    "balanced": MoEConfig(6, ScoresConfig("sigmoid"), GatingConfig(choice="balanced"), experts=ExpertsConfig(4, 3, "relu")),
    "sinkhorn": MoEConfig(6, gating=GatingConfig(top_k=2, choice="sinkhorn", iterations=5), experts=ExpertsConfig(4, 3)),
    "relu": MoEConfig(
        6,
        ScoresConfig("relu"),
        GatingConfig(top_k=2, choice="positive"),
        experts=ExpertsConfig(5, 4),
        balance=BalanceConfig((("gate_l1", 0.1),)),
    ),
    "gpt-oss": MoEConfig(
        6,
        ScoresConfig("identity", bias=True),
        GatingConfig(top_k=2, normalize="softmax"),
        experts=ExpertsConfig(4, 3, "clamped_swiglu", bias=True),
    ),
    "relu2": MoEConfig(
        6,
        gating=GatingConfig(top_k=2, correction_bias=True),
        experts=ExpertsConfig(5, 4, "relu2", shared=1),
        balance=BalanceConfig(bias_rule="centered_sign", bias_rate=0.001),
    ),
    "geglu": MoEConfig(
        6,
        gating=GatingConfig(top_k=2, correction_bias=True),
        experts=ExpertsConfig(4, 3, "geglu", bias=True),
        balance=BalanceConfig(bias_rule="proportional", bias_rate=0.01),
    ),
    "shared-sigmoid": MoEConfig(
        6,
        gating=GatingConfig(top_k=3),
        experts=ExpertsConfig(7, 3, shared=1, shared_width=5, shared_gate="sigmoid"),
        balance=BalanceConfig((("expert_balance", 0.001),)),
    ),
    "shared-softmax": MoEConfig(
        6,
        capacity=CapacityConfig("per_token", factor=1.0),
        experts=ExpertsConfig(4, 5, "gelu", bias=True, shared=1, shared_gate="softmax"),
    ),
    "llama4": MoEConfig(6, ScoresConfig("sigmoid"), experts=ExpertsConfig(4, 5, gate_inputs=True, shared=1)),
    "gated-inputs": MoEConfig(
        6,
        gating=GatingConfig(top_k=3),
        capacity=CapacityConfig("per_assignment", factor=0.8),
        experts=ExpertsConfig(5, 3, bias=True, gate_inputs=True),
        balance=BalanceConfig((("expert_balance", 0.01),)),
    ),
    "moe++": MoEConfig(
        6,
        gating=GatingConfig(top_k=2),
        capacity=CapacityConfig("per_assignment", factor=0.9),
        experts=ExpertsConfig(8, 3, zero_computation=(("zero", 1), ("copy", 1), ("constant", 2)), network_share=0.6),
        balance=BalanceConfig((("heterogeneous_balance", 0.1),)),
    ),
    "residual": MoEConfig(
        6,
        ScoresConfig(residual=True, bias=True, softcap=3.0),
        GatingConfig(top_k=2),
        CapacityConfig("per_assignment", factor=0.9),
        ExpertsConfig(5, 3),
        BalanceConfig((("expert_balance", 0.1), ("router_z", 0.01))),
    ),
    "longcat": MoEConfig(
        6,
        gating=GatingConfig(top_k=3, correction_bias=True, scale=6.0),
        experts=ExpertsConfig(7, 4, zero_computation=(("copy", 3),)),
        balance=BalanceConfig((("heterogeneous_balance", 0.1),), bias_rule="proportional", bias_rate=0.01),
    ),
    "expert-dropout": MoEConfig(
        6,
        gating=GatingConfig(top_k=2),
        capacity=CapacityConfig("per_assignment", factor=0.9),
        experts=ExpertsConfig(4, 5, bias=True, shared=1, dropout=0.4),
    ),
    "all-chosen": MoEConfig(6, gating=GatingConfig(top_k=3, normalize="sum"), experts=ExpertsConfig(3, 4)),
    "one-expert": MoEConfig(4, gating=GatingConfig(top_k=1), experts=ExpertsConfig(1, 3, "gelu")),
}
"""Name → config. Every width and count is small, and no two letters of a shape agree everywhere."""

SENT: dict[str, MoEConfig] = {name: config for name, config in CONFIGS.items() if not CHOICES[config.gating.choice].mixes}
"""Those whose tokens are sent to experts, not mixed."""


def random_params(config: MoEConfig, rng: np.random.Generator, dtype: Any = np.float64) -> Params:
    """`init_params`, but nothing that starts at 0 or 1 has that value, so that a forgotten one is seen."""
    params = init_params(config, rng, dtype)
    given = ("bias", "noise_weight", "residual_weight", "scale")
    changed = {
        name: array + (0.3 * rng.standard_normal(array.shape)).astype(array.dtype) for name, array in params.items() if name.endswith(given)
    }
    penalty = {name: np.full_like(array, 0.7) for name, array in params.items() if name == "router.penalty"}
    return params | changed | penalty


def random_tokens(config: MoEConfig, rng: np.random.Generator, tokens: int, *, groups: int = 1, pads: int = 0) -> dict[str, Any]:
    """Keyword arguments of `moe_forward`: x_TD, group_ids in mixed order, a pad_mask with `pads` pads at random places, token_ids.

    Where the router reads them, also previous_logits.
    """
    given = {
        "x_TD": rng.standard_normal((tokens, config.d_model)),
        "group_ids": rng.permutation(np.arange(tokens) % groups),
        "pad_mask": rng.permutation(np.arange(tokens) < pads),
        "token_ids": rng.integers(0, VOCABULARY, tokens),
    }
    return given | ({"previous_logits": rng.standard_normal((tokens, config.experts.count))} if config.scores.residual else {})
