"""Routings that figures show: the running example's, and those that given logits lead to."""

from __future__ import annotations

from typing import Any

import numpy as np

from reference import capacity as capacities
from reference import example, moe_forward, parameter_shapes, route
from reference.config import CapacityConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig

Json = dict[str, Any]

ROUTERS = {
    "plain": ("softmax", "none"),
    "sum": ("softmax", "sum"),
    "softmax": ("identity", "softmax"),
    "sigmoid": ("sigmoid", "sum"),
}
"""Name → (score function, normalizer): the rows of `ROUTERS` in `gates.js`."""


def example_routing() -> Any:
    """The routing of the running example in training."""
    return moe_forward(example.inputs(), example.params(), example.CONFIG, training=True)[0].routing


def routed(logits_TE: np.ndarray, gating: GatingConfig, capacity: CapacityConfig | None = None, **choice: Any) -> Any:
    """The routing that these logits lead to in training: a layer whose router is the identity. choice: its function and its bias."""
    experts = logits_TE.shape[1]
    config = MoEConfig(
        experts, ScoresConfig(choice.get("function", "softmax")), gating, capacity or CapacityConfig(), ExpertsConfig(experts, 1)
    )
    bias = {"router.correction_bias": choice["bias"]} if "bias" in choice else {}
    blank = {name: np.zeros(shape) for name, shape in parameter_shapes(config).items()}
    return route(logits_TE, blank | {"router.weight": np.eye(experts)} | bias, config, training=True)


def slots_per_expert(state: Json, top_k: int, tokens: int, experts: int) -> int:
    """The capacity of a state, ⌈factor · K · S / E⌉."""
    return capacities.per_assignment(state["factor"], top_k, tokens, experts)
