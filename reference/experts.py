"""rows_ND → out_ND: every expert is a small feed-forward network that sees only its own rows."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .config import ExpertsConfig
from .scores import sigmoid
from .zero_computation import ZeroComputationCache, zero_computation_backward, zero_computation_forward

Params = dict[str, np.ndarray]
"""Arrays by name: parameters and buffers, or gradients."""


def relu_forward(pre_NM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ReLU (act-relu): h = max(u, 0), [N, F] → [N, F]. Gradient: du = dh where u > 0. Source: GShard; Switch Transformer."""
    return np.maximum(pre_NM, 0), pre_NM


def relu_backward(dhidden_NF: np.ndarray, cache: np.ndarray) -> np.ndarray:
    """dpre of `relu_forward`."""
    return dhidden_NF * (cache > 0)


def relu2_forward(pre_NM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """ReLU squared (act-relu2): h = max(u, 0)², [N, F] → [N, F]. Gradient: du = 2 max(u, 0) dh. Source: So et al. 2021 (Primer)."""
    return np.maximum(pre_NM, 0) ** 2, pre_NM


def relu2_backward(dhidden_NF: np.ndarray, cache: np.ndarray) -> np.ndarray:
    """dpre of `relu2_forward`."""
    return 2 * dhidden_NF * np.maximum(cache, 0)


# NumPy has no erf; math.erf is the C library's, correct to the last bits.
_erf = np.vectorize(math.erf, otypes=[np.float64])


def normal_cdf(u: np.ndarray) -> np.ndarray:
    """Φ(u), the normal distribution's cumulative function, of an array of any shape."""
    return (0.5 * (1 + _erf(u.astype(np.float64) / math.sqrt(2)))).astype(u.dtype)


def gelu_forward(pre_NM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """GELU in its exact form (act-gelu): h = u · Φ(u), [N, F] → [N, F]. Gradient: du = dh (Φ(u) + u φ(u)).

    Source: Hendrycks & Gimpel 2016. Deviates: GPT-2's tanh form is an approximation of it.
    """
    return pre_NM * normal_cdf(pre_NM), pre_NM


def gelu_backward(dhidden_NF: np.ndarray, cache: np.ndarray) -> np.ndarray:
    """dpre of `gelu_forward`."""
    density = np.exp(-0.5 * cache * cache) / np.asarray(math.sqrt(2 * math.pi), cache.dtype)
    return dhidden_NF * (normal_cdf(cache) + cache * density)


class GatedCache(NamedTuple):
    """gate_proj_NF, up_NF: the two halves before the activation."""

    gate_proj_NF: np.ndarray
    up_NF: np.ndarray


def swiglu_forward(pre_NM: np.ndarray) -> tuple[np.ndarray, GatedCache]:
    """SwiGLU (act-swiglu): h = a σ(a) ⊙ u, a and u the first and the second half of the row; [N, 2F] → [N, F].

    Gradient: da = dh ⊙ u σ(a) (1 + a (1 − σ(a))), du = dh ⊙ a σ(a).
    Source: Shazeer 2020 (GLU variants).
    """
    gate_proj_NF, up_NF = np.split(pre_NM, 2, axis=1)
    return gate_proj_NF * sigmoid(gate_proj_NF) * up_NF, GatedCache(gate_proj_NF, up_NF)


def swiglu_backward(dhidden_NF: np.ndarray, cache: GatedCache) -> np.ndarray:
    """dpre [N, 2F] of `swiglu_forward`."""
    a_NF, up_NF = cache
    s_NF = sigmoid(a_NF)
    return np.concatenate([dhidden_NF * up_NF * s_NF * (1 + a_NF * (1 - s_NF)), dhidden_NF * a_NF * s_NF], axis=1)


def geglu_forward(pre_NM: np.ndarray) -> tuple[np.ndarray, GatedCache]:
    """GEGLU (act-geglu): h = a Φ(a) ⊙ u, [N, 2F] → [N, F].

    Gradient: da = dh ⊙ u (Φ(a) + a φ(a)), du = dh ⊙ a Φ(a).
    Source: Shazeer 2020 (GLU variants). Deviates: T5 1.1 and the models after it compute Φ by GPT-2's tanh form.
    """
    gate_proj_NF, up_NF = np.split(pre_NM, 2, axis=1)
    return gelu_forward(gate_proj_NF)[0] * up_NF, GatedCache(gate_proj_NF, up_NF)


def geglu_backward(dhidden_NF: np.ndarray, cache: GatedCache) -> np.ndarray:
    """dpre [N, 2F] of `geglu_forward`."""
    a_NF, up_NF = cache
    return np.concatenate([gelu_backward(dhidden_NF * up_NF, a_NF), dhidden_NF * gelu_forward(a_NF)[0]], axis=1)


CLAMP, STEEPNESS = 7.0, 1.702  # of gpt-oss


def clamped_swiglu_forward(pre_NM: np.ndarray) -> tuple[np.ndarray, GatedCache]:
    """gpt-oss's SwiGLU (act-clamped-swiglu): h = a σ(1.702 a) ⊙ (u + 1), a clamped above at 7 and u on both sides; [N, 2F] → [N, F].

    Gradient: da = dh ⊙ (u + 1) σ (1 + 1.702 a (1 − σ)) where a ≤ 7, du = dh ⊙ a σ where |u| ≤ 7, else 0. A row of zeros gives 0.
    Source: OpenAI 2025 (gpt-oss model card), §2; the constants: its released code.
    Deviates: that code's rows alternate, gate and up; see `concatenate_gate_up`.
    """
    gate_proj_NF, up_NF = np.split(pre_NM, 2, axis=1)
    a_NF, u_NF = np.minimum(gate_proj_NF, CLAMP), np.clip(up_NF, -CLAMP, CLAMP)
    return a_NF * sigmoid(STEEPNESS * a_NF) * (u_NF + 1), GatedCache(gate_proj_NF, up_NF)


def clamped_swiglu_backward(dhidden_NF: np.ndarray, cache: GatedCache) -> np.ndarray:
    """dpre [N, 2F] of `clamped_swiglu_forward`."""
    a_NF, u_NF = np.minimum(cache.gate_proj_NF, CLAMP), np.clip(cache.up_NF, -CLAMP, CLAMP)
    s_NF = sigmoid(STEEPNESS * a_NF)
    slope_NF = s_NF * (1 + STEEPNESS * a_NF * (1 - s_NF)) * (cache.gate_proj_NF <= CLAMP)
    return np.concatenate([dhidden_NF * (u_NF + 1) * slope_NF, dhidden_NF * a_NF * s_NF * (np.abs(cache.up_NF) <= CLAMP)], axis=1)


def concatenate_gate_up(weight: np.ndarray) -> np.ndarray:
    """Rows gate, up, gate, up, … → all gate rows, then all up rows: [E, 2F, …] of gpt-oss as it is kept here."""
    return np.concatenate([weight[:, ::2], weight[:, 1::2]], axis=1)


def interleave_gate_up(weight: np.ndarray) -> np.ndarray:
    """The inverse of `concatenate_gate_up`."""
    gate_rows, up_rows = np.split(weight, 2, axis=1)
    return np.stack([gate_rows, up_rows], axis=2).reshape(weight.shape)


class Activation(NamedTuple):
    """gated: whether the first matrix has 2F rows (gate rows first), named `gate_up_proj`, or F, named `up_proj`."""

    gated: bool
    forward: Callable[[np.ndarray], tuple[np.ndarray, Any]]
    backward: Callable[[np.ndarray, Any], np.ndarray]


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(False, relu_forward, relu_backward),
    "gelu": Activation(False, gelu_forward, gelu_backward),
    "swiglu": Activation(True, swiglu_forward, swiglu_backward),
    "relu2": Activation(False, relu2_forward, relu2_backward),
    "geglu": Activation(True, geglu_forward, geglu_backward),
    "clamped_swiglu": Activation(True, clamped_swiglu_forward, clamped_swiglu_backward),
}
"""What `ExpertsConfig.activation` can name."""


def first_matrix(config: ExpertsConfig) -> str:
    """Name of an expert's first matrix: "gate_up_proj" where its activation is gated, else "up_proj"."""
    return "gate_up_proj" if ACTIVATIONS[config.activation].gated else "up_proj"


class FFN(NamedTuple):
    """The arrays of one feed-forward network: up [M, D] and down [D, F], with biases [M] and [D] or None; M = 2F where gated."""

    up: np.ndarray
    down: np.ndarray
    up_bias: np.ndarray | None
    down_bias: np.ndarray | None


class FFNCache(NamedTuple):
    """x_ND: its input; hidden_NF: after the activation and its factors; inner: the activation's own cache; factor: that of dropout."""

    x_ND: np.ndarray
    hidden_NF: np.ndarray
    inner: Any
    factor: np.ndarray | None = None


def ffn_forward(x_ND: np.ndarray, ffn: FFN, activation: str, factor: np.ndarray | None = None) -> tuple[np.ndarray, FFNCache]:
    """One expert (ffn): out = W_down act(W_up x + b_up) + b_down.

    Shapes: x [N, D], factor [N, F] of the hidden layer, or None → (out [N, D], cache).
    Gradient: dh = dout W_down, du = act'(dh), dx = du W_up, dW_up = duᵀ x, dW_down = doutᵀ h.
    """
    pre_NM = x_ND @ ffn.up.T
    if ffn.up_bias is not None:
        pre_NM = pre_NM + ffn.up_bias
    hidden_NF, inner = ACTIVATIONS[activation].forward(pre_NM)
    hidden_NF = hidden_NF if factor is None else hidden_NF * factor
    out_ND = hidden_NF @ ffn.down.T
    if ffn.down_bias is not None:
        out_ND = out_ND + ffn.down_bias
    return out_ND, FFNCache(x_ND, hidden_NF, inner, factor)


def ffn_backward(dout_ND: np.ndarray, ffn: FFN, cache: FFNCache, activation: str) -> tuple[np.ndarray, FFN]:
    """(dx [N, D], the gradients of the four arrays) of `ffn_forward`."""
    dhidden_NF = dout_ND @ ffn.down
    dpre_NM = ACTIVATIONS[activation].backward(dhidden_NF if cache.factor is None else dhidden_NF * cache.factor, cache.inner)
    dup_bias = None if ffn.up_bias is None else dpre_NM.sum(0)
    ddown_bias = None if ffn.down_bias is None else dout_ND.sum(0)
    return dpre_NM @ ffn.up, FFN(dpre_NM.T @ cache.x_ND, dout_ND.T @ cache.hidden_NF, dup_bias, ddown_bias)


def ffn_keys(prefix: str, config: ExpertsConfig) -> tuple[str, str, str, str]:
    """Names of the four arrays of `prefix` ("experts" or "shared"), in the order of `FFN`."""
    up, down = f"{prefix}.{first_matrix(config)}", f"{prefix}.down_proj"
    return up, down, f"{up}_bias", f"{down}_bias"


class ExpertsCache(NamedTuple):
    """bounds_P: whose rows are whose; params, config: as given; inner: one FFNCache per network; others: of the experts without one."""

    bounds_P: np.ndarray
    params: Params
    config: ExpertsConfig
    inner: list[FFNCache]
    others: ZeroComputationCache


def _expert(params: Params, config: ExpertsConfig, number: int) -> FFN:
    up, down, up_bias, down_bias = ffn_keys("experts", config)
    biases = (params[up_bias][number], params[down_bias][number]) if config.bias else (None, None)
    return FFN(params[up][number], params[down][number], *biases)


def experts_forward(
    rows_ND: np.ndarray, bounds_P: np.ndarray, params: Params, config: ExpertsConfig, factor: np.ndarray | None = None
) -> tuple[np.ndarray, ExpertsCache]:
    """Every expert on its own rows (experts): out[b_e : b_{e+1}] = FFN_e(rows[b_e : b_{e+1}]).

    Shapes: rows [N, D] sorted by expert, bounds [E + 1], factor [N, F] of dropout → (out [N, D], cache). An expert without rows computes
    nothing.
    """
    out_ND, inner, free = np.empty_like(rows_ND), [], bounds_P[config.networks]
    for number in range(config.networks):
        own = slice(bounds_P[number], bounds_P[number + 1])
        own_factor = None if factor is None else factor[own]
        out_ND[own], cache = ffn_forward(rows_ND[own], _expert(params, config, number), config.activation, own_factor)
        inner.append(cache)
    out_ND[free:], others = zero_computation_forward(rows_ND[free:], bounds_P[config.networks :] - free, params, config)
    return out_ND, ExpertsCache(bounds_P, params, config, inner, others)


def experts_backward(dout_ND: np.ndarray, cache: ExpertsCache) -> tuple[np.ndarray, Params]:
    """(drows [N, D], gradients by name) of `experts_forward`; an expert without rows gets gradients of exactly 0."""
    bounds_P, params, config, inner, others = cache
    keys = ffn_keys("experts", config)[: 4 if config.bias else 2]
    drows_ND, dparams = np.empty_like(dout_ND), {key: np.zeros_like(params[key]) for key in keys}
    for number in range(config.networks):
        own = slice(bounds_P[number], bounds_P[number + 1])
        drows_ND[own], dffn = ffn_backward(dout_ND[own], _expert(params, config, number), inner[number], config.activation)
        for key, gradient in zip(keys, dffn, strict=False):
            dparams[key][number] = gradient
    free = bounds_P[config.networks]
    drows_ND[free:], dothers = zero_computation_backward(dout_ND[free:], others)
    return drows_ND, dparams | dothers
