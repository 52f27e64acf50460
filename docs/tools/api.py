"""Which modules have a page of the API."""

from __future__ import annotations

API = {
    "reference": [
        "layer", "config", "routing", "scores", "noise", "gating", "choices", "capacity", "dispatch", "experts", "expert_dropout",
        "zero_computation", "shared", "soft",
        "balancing", "penalty", "model_config", "cost", "presets", "specialization", "overlap", "redundancy", "churn", "beginnings", "text",
    ],
    "reference.proof": ["equal", "teeth", "cases"],
    "reference.autograd": ["layer", "transformer", "training", "checkpoints", "sampling"],
    "optimized": ["layer", "backends", "contracts", "comparison", "tracks", "planning", "huggingface", "expert_parallel"],
}  # fmt: skip
"""Package → modules with a page of their own, in this order."""


def has_page(module: str) -> bool:
    """Whether a module, by its dotted name, has a page."""
    package, _, name = module.rpartition(".")
    return name in API.get(package, ())
