"""Activations inside a kernel: device functions on fp32 tiles, and the table that launchers choose from.

The equations are those of `reference.experts`. A new activation is two functions and a row of ACTIVATIONS; the kernels that call them
take the functions as compile-time arguments and are not edited.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from reference.experts import CLAMP, STEEPNESS

# tl.math.erf has a meaning in the interpreter; the constants are 1/√2 and 1/√(2π).
INVERSE_ROOT_2 = tl.constexpr(0.7071067811865476)
INVERSE_ROOT_2PI = tl.constexpr(0.3989422804014327)
HIGHEST = tl.constexpr(CLAMP)
STEEPNESS_OF_SIGMOID = tl.constexpr(STEEPNESS)


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(−z)); exp overflows to infinity, whose inverse is the right 0."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def relu_forward(gate_proj, up):
    """(act-relu): h = max(u, 0). A NaN stays a NaN."""
    return tl.where(up < 0, 0.0, up)


@triton.jit
def relu_backward(gate_proj, up, dhidden):
    """(unused, du): du = dh where u > 0."""
    dup = tl.where(up > 0, dhidden, 0.0)
    return dup, dup


@triton.jit
def relu2_forward(gate_proj, up):
    """(act-relu2): h = max(u, 0)²."""
    positive = tl.where(up < 0, 0.0, up)
    return positive * positive


@triton.jit
def relu2_backward(gate_proj, up, dhidden):
    """(unused, du): du = 2 max(u, 0) dh."""
    dup = 2.0 * dhidden * tl.where(up < 0, 0.0, up)
    return dup, dup


@triton.jit
def normal_cdf(u):
    """Φ(u), the exact form."""
    return 0.5 * (1.0 + tl.math.erf(u * INVERSE_ROOT_2))


@triton.jit
def gelu_forward(gate_proj, up):
    """(act-gelu): h = u Φ(u)."""
    return up * normal_cdf(up)


@triton.jit
def gelu_backward(gate_proj, up, dhidden):
    """(unused, du): du = dh (Φ(u) + u φ(u))."""
    dup = dhidden * (normal_cdf(up) + up * tl.exp(-0.5 * up * up) * INVERSE_ROOT_2PI)
    return dup, dup


@triton.jit
def swiglu_forward(gate_proj, up):
    """(act-swiglu): h = a σ(a) ⊙ u."""
    return gate_proj * sigmoid(gate_proj) * up


@triton.jit
def swiglu_backward(gate_proj, up, dhidden):
    """(da, du): da = dh ⊙ u σ(a) (1 + a (1 − σ(a))), du = dh ⊙ a σ(a)."""
    share = sigmoid(gate_proj)
    return dhidden * up * share * (1.0 + gate_proj * (1.0 - share)), dhidden * gate_proj * share


@triton.jit
def geglu_forward(gate_proj, up):
    """(act-geglu): h = a Φ(a) ⊙ u."""
    return gate_proj * normal_cdf(gate_proj) * up


@triton.jit
def geglu_backward(gate_proj, up, dhidden):
    """(da, du): da = dh ⊙ u (Φ(a) + a φ(a)), du = dh ⊙ a Φ(a)."""
    share = normal_cdf(gate_proj)
    slope = share + gate_proj * tl.exp(-0.5 * gate_proj * gate_proj) * INVERSE_ROOT_2PI
    return dhidden * up * slope, dhidden * gate_proj * share


@triton.jit
def clamped(value, low, high):
    """The value inside [low, high]; a NaN stays a NaN."""
    return tl.where(value > high, high, tl.where(value < low, low, value))


@triton.jit
def clamped_swiglu_forward(gate_proj, up):
    """(act-clamped-swiglu): h = a σ(1.702 a) ⊙ (u + 1), a clamped above at 7 and u on both sides."""
    a = tl.where(gate_proj > HIGHEST, HIGHEST, gate_proj)
    return a * sigmoid(a * STEEPNESS_OF_SIGMOID) * (clamped(up, -HIGHEST, HIGHEST) + 1.0)


@triton.jit
def clamped_swiglu_backward(gate_proj, up, dhidden):
    """(da, du): da = dh ⊙ (u + 1) σ (1 + 1.702 a (1 − σ)) where a ≤ 7, du = dh ⊙ a σ where |u| ≤ 7, else 0."""
    a = tl.where(gate_proj > HIGHEST, HIGHEST, gate_proj)
    share = sigmoid(a * STEEPNESS_OF_SIGMOID)
    slope = share * (1.0 + a * STEEPNESS_OF_SIGMOID * (1.0 - share))
    dgate_proj = dhidden * (clamped(up, -HIGHEST, HIGHEST) + 1.0) * slope
    return tl.where(gate_proj > HIGHEST, 0.0, dgate_proj), tl.where(tl.abs(up) > HIGHEST, 0.0, dhidden * a * share)


class Activation(NamedTuple):
    """gated: whether the first matrix has 2F rows, gate rows first. forward: (a, u) → h; backward: (a, u, dh) → (da, du).

    Without a gate a is not read, and both results of backward are du.
    """

    gated: bool
    forward: Any
    backward: Any


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(False, relu_forward, relu_backward),
    "gelu": Activation(False, gelu_forward, gelu_backward),
    "swiglu": Activation(True, swiglu_forward, swiglu_backward),
    "relu2": Activation(False, relu2_forward, relu2_backward),
    "geglu": Activation(True, geglu_forward, geglu_backward),
    "clamped_swiglu": Activation(True, clamped_swiglu_forward, clamped_swiglu_backward),
}
