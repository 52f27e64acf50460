"""The reference track: what a Mixture-of-Experts layer does, in NumPy, forward and hand-derived backward.

Reading order: notation, example, config, then one file for each arrow of the data flow: scores, gating, capacity, dispatch, experts,
balancing; `layer` composes them. `architectures/` writes each paper out as a straight line over the same functions.
`reference.autograd` is the same in PyTorch; this level imports NumPy and the standard library only.
"""

from . import presets
from .config import (
    BalanceConfig,
    CapacityConfig,
    ExpertsConfig,
    GatingConfig,
    MoEConfig,
    ScoresConfig,
)
from .layer import (
    MoEOutput,
    Routing,
    apply_experts,
    chained_backward,
    init_params,
    moe_backward,
    moe_forward,
    parameter_shapes,
    route,
    update_bias,
    update_penalty,
)
from .model_config import AttentionConfig, ModelConfig

__all__ = [
    "AttentionConfig", "BalanceConfig", "CapacityConfig", "ExpertsConfig", "GatingConfig", "MoEConfig", "MoEOutput", "ModelConfig",
    "Routing", "ScoresConfig", "apply_experts", "chained_backward", "init_params", "moe_backward", "moe_forward", "parameter_shapes",
    "presets", "route", "update_bias", "update_penalty",
]  # fmt: skip
