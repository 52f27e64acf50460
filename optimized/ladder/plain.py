"""What the rungs share: which layers they take, the experts' tensors, the terms of their contracts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from reference.autograd.experts import FFN
from reference.config import MoEConfig, require
from reference.experts import ffn_keys

TERMS: dict[str, Any] = {
    "equals": "reference.layer.apply_experts", "grads": ("x", "gate", "params"), "dtypes": ("float32", "bfloat16"),
}  # fmt: skip
LIMITS = "parameters in the dtype of x; every expert is a network, gated at its output"


def check(config: MoEConfig) -> None:
    """Raises ValueError for a layer whose experts are more than networks with a gate at the output."""
    require(not config.experts.gate_inputs, "gate_inputs is True; the ladder has gates at the output only")
    require(not config.experts.zero_computation, f"zero_computation is {config.experts.zero_computation!r}; the ladder has networks only")


def stacks(params: Mapping[str, Tensor], config: MoEConfig) -> FFN:
    """All experts at once: up [E, M, D], down [E, D, F], and their biases or None."""
    up, down, up_bias, down_bias = ffn_keys("experts", config.experts)
    return FFN(params[up], params[down], params.get(up_bias), params.get(down_bias))
