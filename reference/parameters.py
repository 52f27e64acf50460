"""The layer's arrays by name: their shapes, how they start, and whether given ones fit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from .choices import balanced_hash
from .config import MoEConfig, require
from .experts import ACTIVATIONS, Params, first_matrix
from .noise import LOGIT_NOISE
from .shared import shared_gate_shapes
from .zero_computation import zero_computation_shapes

# Saved with the parameters, moved by rules instead of gradients, or not at all.
BUFFERS = frozenset({"router.correction_bias", "router.penalty", "router.hash_table"})


def parameter_shapes(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the layer's arrays, buffers included: the keys of `MoE(config).state_dict()`."""
    width, experts = config.d_model, config.experts
    rows = 2 if ACTIVATIONS[experts.activation].gated else 1
    shapes = _router_shapes(config)
    for prefix, stack, hidden in (("experts", (experts.networks,), experts.width), ("shared", (), experts.total_shared_width)):
        if hidden:
            up, down = f"{prefix}.{first_matrix(experts)}", f"{prefix}.down_proj"
            shapes |= {up: (*stack, rows * hidden, width), down: (*stack, width, hidden)}
            if experts.bias:
                shapes |= {f"{up}_bias": (*stack, rows * hidden), f"{down}_bias": (*stack, width)}
    return shapes | zero_computation_shapes(width, experts) | shared_gate_shapes(width, experts)


def _router_shapes(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    experts, gating = config.experts.count, config.gating
    slots = (gating.slots,) if gating.slots else ()
    wanted = {
        "weight": (True, (experts, *slots, config.d_model)),
        "scale": (gating.choice == "soft", (1,)),
        "bias": (config.scores.bias, (experts,)),
        "noise_weight": (LOGIT_NOISE[config.scores.logit_noise].learned, (experts, config.d_model)),
        "residual_weight": (config.scores.residual, (experts, experts)),
        "expert_scale": (gating.expert_scale, (experts,)),
        "correction_bias": (gating.correction_bias, (experts,)),
        "hash_table": (gating.vocabulary > 0, (gating.vocabulary, gating.top_k)),
        "penalty": ("gate_l1" in dict(config.balance.losses), (1,)),
    }
    return {f"router.{name}": shape for name, (present, shape) in wanted.items() if present}


def _matrix(shape: tuple[int, ...], config: MoEConfig, rng: np.random.Generator) -> np.ndarray:
    return rng.standard_normal(shape) / np.sqrt(shape[-1])


def _zeros(shape: tuple[int, ...], config: MoEConfig, rng: np.random.Generator) -> np.ndarray:
    return np.zeros(shape)


def _ones(shape: tuple[int, ...], config: MoEConfig, rng: np.random.Generator) -> np.ndarray:
    return np.ones(shape)


def _penalty(shape: tuple[int, ...], config: MoEConfig, rng: np.random.Generator) -> np.ndarray:
    return np.full(shape, config.balance.penalty_start)


def _hash_table(shape: tuple[int, ...], config: MoEConfig, rng: np.random.Generator) -> np.ndarray:
    return balanced_hash(shape[0], config.gating, config.experts.count, rng)


class Start(NamedTuple):
    """draw: (shape, config, rng) → the array; dtype: its own, or None for that of the parameters."""

    draw: Callable[[tuple[int, ...], MoEConfig, np.random.Generator], np.ndarray]
    dtype: Any = None


STARTS: dict[str, Start] = {
    "router.noise_weight": Start(_zeros),
    "router.residual_weight": Start(_zeros),  # from N(0, 1/E) the variance of the logits would grow by 1 with every layer
    "router.expert_scale": Start(_ones),
    "router.scale": Start(_ones),
    "router.correction_bias": Start(_zeros, np.float32),
    "router.penalty": Start(_penalty, np.float32),
    "router.hash_table": Start(_hash_table, np.int64),
}
"""How an array starts, by name; others from N(0, 1/fan-in), or at 0 where their name ends in "bias"."""


def start(name: str) -> Start:
    """The row of STARTS, or the rule for a name without one."""
    return STARTS.get(name, Start(_zeros if name.endswith("bias") else _matrix))


def init_params(config: MoEConfig, rng: np.random.Generator, dtype: Any = np.float64) -> Params:
    """Fresh parameters by name: matrices from N(0, 1/fan-in), biases 0, buffers in their own dtypes; exceptions in STARTS.

    Every expert is drawn anew: experts that start as copies of each other receive equal gradients and stay copies.
    """
    shapes = parameter_shapes(config)
    return {name: start(name).draw(shape, config, rng).astype(start(name).dtype or dtype) for name, shape in shapes.items()}


def check_params(params: Mapping[str, np.ndarray], config: MoEConfig) -> None:
    """ValueError where a parameter is missing, has another shape, or holds NaN or infinity."""
    for name, shape in parameter_shapes(config).items():
        require(name in params, f"params has no {name!r}; this config needs {', '.join(parameter_shapes(config))}")
        require(params[name].shape == shape, f"{name} has shape {params[name].shape}; this config needs {shape}")
        require(bool(np.isfinite(params[name]).all()), f"{name} holds NaN or infinity")


def check_input(x_TD: np.ndarray, config: MoEConfig) -> None:
    """ValueError unless x is a finite [T, d_model] array of floats."""
    require(isinstance(x_TD, np.ndarray) and x_TD.dtype.kind == "f", f"x must be a float array, got {getattr(x_TD, 'dtype', type(x_TD))}")
    require(x_TD.ndim == 2 and x_TD.shape[1] == config.d_model, f"x has shape {x_TD.shape}; it must be (T, {config.d_model})")
    broken = np.flatnonzero(~np.isfinite(x_TD).all(1))
    require(len(broken) == 0, f"x holds NaN or infinity, in tokens {broken[:5].tolist()}")


def check_previous(previous_TE: np.ndarray | None, tokens: int, config: MoEConfig) -> None:
    """ValueError unless the logits of the layer before are absent, or a finite [T, E] array of floats that this config reads."""
    if previous_TE is None:
        return
    needed = (tokens, config.experts.count)
    require(config.scores.residual, "previous_logits are given, but scores.residual is False: this router does not read them")
    require(np.shape(previous_TE) == needed, f"previous_logits has shape {np.shape(previous_TE)}; this layer needs {needed}")
    dtype = getattr(previous_TE, "dtype", type(previous_TE))
    require(isinstance(previous_TE, np.ndarray) and previous_TE.dtype.kind == "f", f"previous_logits must be a float array, got {dtype}")
    broken = np.flatnonzero(~np.isfinite(previous_TE).all(1))
    require(len(broken) == 0, f"previous_logits holds NaN or infinity, in tokens {broken[:5].tolist()}")
