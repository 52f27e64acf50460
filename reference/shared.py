"""Experts that every token passes through, and how their output joins that of the routed ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .config import ExpertsConfig
from .experts import FFN, FFNCache, Params, ffn_backward, ffn_forward, ffn_keys
from .scores import sigmoid, softmax_backward, softmax_forward


class Shares(NamedTuple):
    """What the routed and the shared experts' outputs are multiplied by, [T] each."""

    routed_T: np.ndarray
    shared_T: np.ndarray


def plain_forward(x_TD: np.ndarray, params: Params) -> tuple[Shares, None]:
    """Both outputs as they are."""
    ones_T = np.ones(len(x_TD), x_TD.dtype)
    return Shares(ones_T, ones_T), None


def plain_backward(dshares: Shares, cache: None, x_TD: np.ndarray, params: Params) -> tuple[np.ndarray, Params]:
    """Nothing to learn: (dx of zeros, no gradients)."""
    return np.zeros_like(x_TD), {}


def sigmoid_forward(x_TD: np.ndarray, params: Params) -> tuple[Shares, np.ndarray]:
    """Each token weighs the shared experts (shared-sigmoid): y = routed + σ(w·x) · shared.

    Shapes: x [T, D], shared.gate [1, D] → (shares, cache). Gradient: d(w·x) = dshare σ (1 − σ).
    Source: Qwen2 technical report (Yang et al. 2024), §2.2.2; the sigmoid: its released code.
    """
    share_T = sigmoid(x_TD @ params["shared.gate"][0])
    return Shares(np.ones_like(share_T), share_T), share_T


def sigmoid_backward(dshares: Shares, cache: np.ndarray, x_TD: np.ndarray, params: Params) -> tuple[np.ndarray, Params]:
    """(dx [T, D], {"shared.gate"}) of `sigmoid_forward`."""
    dlogit_T = dshares.shared_T * cache * (1 - cache)
    return dlogit_T[:, None] * params["shared.gate"], {"shared.gate": (dlogit_T @ x_TD)[None]}


def softmax_shares_forward(x_TD: np.ndarray, params: Params) -> tuple[Shares, Any]:
    """PR-MoE's two-way softmax (shared-softmax): y = c₀ · routed + c₁ · shared, c = softmax(W x + b).

    Shapes: x [T, D], shared.gate [2, D], shared.gate_bias [2] → (shares, cache). Gradient: that of softmax.
    Source: Rajbhandari et al. 2022 (DeepSpeed-MoE), §4.1.2, the residual; the softmax: DeepSpeed's code.
    """
    shares, cache = softmax_forward(x_TD @ params["shared.gate"].T + params["shared.gate_bias"])
    return Shares(*shares.T), cache


def softmax_shares_backward(dshares: Shares, cache: Any, x_TD: np.ndarray, params: Params) -> tuple[np.ndarray, Params]:
    """(dx [T, D], {"shared.gate", "shared.gate_bias"}) of `softmax_shares_forward`."""
    dlogits = softmax_backward(np.stack(dshares, axis=1), cache)
    return dlogits @ params["shared.gate"], {"shared.gate": dlogits.T @ x_TD, "shared.gate_bias": dlogits.sum(0)}


class SharedGate(NamedTuple):
    """rows: of shared.gate; bias: whether it has one; forward: (x, params) → (shares, cache); backward → (dx, gradients by name)."""

    rows: int
    bias: bool
    forward: Callable[[np.ndarray, Params], tuple[Shares, Any]]
    backward: Callable[[Shares, Any, np.ndarray, Params], tuple[np.ndarray, Params]]


SHARED_GATES: dict[str, SharedGate] = {
    "none": SharedGate(0, False, plain_forward, plain_backward),
    "sigmoid": SharedGate(1, False, sigmoid_forward, sigmoid_backward),
    "softmax": SharedGate(2, True, softmax_shares_forward, softmax_shares_backward),
}
"""What `ExpertsConfig.shared_gate` can name."""


def shared_gate_shapes(d_model: int, config: ExpertsConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of what weighs the shared experts."""
    gate = SHARED_GATES[config.shared_gate]
    wanted = {"shared.gate": (gate.rows > 0, (gate.rows, d_model)), "shared.gate_bias": (gate.bias, (gate.rows,))}
    return {name: shape for name, (present, shape) in wanted.items() if present}


def _network(params: Params, config: ExpertsConfig) -> FFN:
    return FFN(*(params.get(key) for key in ffn_keys("shared", config)))  # type: ignore[arg-type]


def shared_forward(x_TD: np.ndarray, params: Params, config: ExpertsConfig) -> tuple[np.ndarray, FFNCache]:
    """The shared experts, which every token passes through (shared): a sum of FFNs is one FFN of their total width.

    Shapes: x [T, D] → (out [T, D], cache). Source: DeepSeekMoE (Dai et al. 2024), §3.2.
    """
    return ffn_forward(x_TD, _network(params, config), config.activation)


class SharedCache(NamedTuple):
    """What `add_shared_backward` needs; real_T: False for padding."""

    x_TD: np.ndarray
    routed_TD: np.ndarray
    shared_TD: np.ndarray
    shares: Shares
    real_T: np.ndarray
    gate: Any
    ffn: FFNCache


def add_shared_forward(
    x_TD: np.ndarray, routed_TD: np.ndarray, real_T: np.ndarray, params: Params, config: ExpertsConfig
) -> tuple[np.ndarray, SharedCache]:
    """y [T, D] = share · routed + share · shared, by the rule of config.shared_gate; padding stays 0."""
    shared_TD, ffn = shared_forward(x_TD, params, config)
    shares, gate = SHARED_GATES[config.shared_gate].forward(x_TD, params)
    y_TD = shares.routed_T[:, None] * routed_TD + (shares.shared_T * real_T)[:, None] * shared_TD
    return y_TD, SharedCache(x_TD, routed_TD, shared_TD, shares, real_T, gate, ffn)


def add_shared_backward(
    dy_TD: np.ndarray, cache: SharedCache, params: Params, config: ExpertsConfig
) -> tuple[np.ndarray, np.ndarray, Params]:
    """(dx [T, D], drouted [T, D], gradients by name) of `add_shared_forward`."""
    x_TD, routed_TD, shared_TD, shares, real_T, gate, ffn = cache
    dreal_TD = dy_TD * real_T[:, None]
    dx_TD, dffn = ffn_backward(dreal_TD * shares.shared_T[:, None], _network(params, config), ffn, config.activation)
    dshares = Shares((dreal_TD * routed_TD).sum(1), (dreal_TD * shared_TD).sum(1))
    dgate_TD, dgate = SHARED_GATES[config.shared_gate].backward(dshares, gate, x_TD, params)
    dparams = {key: value for key, value in zip(ffn_keys("shared", config), dffn, strict=True) if value is not None}
    return dx_TD + dgate_TD, dy_TD * shares.routed_T[:, None], dparams | dgate
