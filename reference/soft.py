"""Soft MoE: nothing is chosen. Every slot of every expert takes a mean of the tokens, every token a mean of the slots' outputs.

GShard's two einsums (`dispatch.py`) with weights in the place of 0 and 1, so that all of it has a gradient. Weights run in fp32 or better.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import numpy as np

from .config import BalanceConfig, CapacityConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig, require
from .experts import Params, experts_backward, experts_forward
from .scores import at_least_fp32, softmax_backward, softmax_forward
from .tokens import TokenInfo

EPS = 1e-6  # under the root of a length


class SoftMix(NamedTuple):
    """How tokens and slots mix.

    dispatch  [T, E, C], each token's share in each slot of its group; a slot's shares sum to 1
    combine   [T, E, C], each slot's share in each token; a token's shares sum to 1
    group     [T], the token's group, whose slots are its own; padding has only shares of 0
    groups    how many groups there are
    """

    dispatch: np.ndarray
    combine: np.ndarray
    group: np.ndarray
    groups: int


def check_soft(config: MoEConfig) -> None:
    """ValueError where a field asks for what Soft MoE has not: a score function, a choice of gates, drops, losses, shared experts."""
    gating, experts = config.gating, config.experts
    for part, given, plain in (
        ("scores", config.scores, ScoresConfig()),
        ("gating", gating, GatingConfig(choice="soft", slots=gating.slots)),
        ("capacity", config.capacity, CapacityConfig()),
        ("experts", experts, ExpertsConfig(experts.count, experts.width, experts.activation, experts.bias)),
        ("balance", config.balance, BalanceConfig()),
    ):
        for name, value in dataclasses.asdict(plain).items():
            found = getattr(given, name)
            require(found == value, f"gating.choice is 'soft', for which {part}.{name} must be {value!r}; it is {found!r}")


class UnitCache(NamedTuple):
    """unit: the result; factor: what the array was multiplied by."""

    unit: np.ndarray
    factor: np.ndarray


def unit_forward(array: np.ndarray) -> tuple[np.ndarray, UnitCache]:
    """Vectors of length 1, along the last axis (unit): x̂ = x / √(Σ_d x_d² + 1e-6), in fp32 or better.

    Gradient: dx = (dx̂ − x̂ ⟨x̂, dx̂⟩) / √(Σ x² + 1e-6).
    Source: Puigcerver et al. 2023, §2.3; the 1e-6: vmoe's code.
    """
    array = at_least_fp32(array)
    factor = 1 / np.sqrt((array**2).sum(-1, keepdims=True) + EPS)
    return array * factor, UnitCache(array * factor, factor)


def unit_backward(dunit: np.ndarray, cache: UnitCache) -> np.ndarray:
    """The gradient of `unit_forward`'s array."""
    return cache.factor * (dunit - cache.unit * (cache.unit * dunit).sum(-1, keepdims=True))


class SlotLogitsCache(NamedTuple):
    """Caches of both unit vectors, the scale, and the cosines [T, E, C]."""

    x: UnitCache
    weight: UnitCache
    scale: np.ndarray
    cosine: np.ndarray


def slot_logits_forward(x_TD: np.ndarray, params: Params) -> tuple[np.ndarray, SlotLogitsCache]:
    """How well a token suits a slot (soft-logits): z_tec = s Σ_d x̂_td Ŵ_ecd, a cosine times one learned number.

    Shapes: x [T, D], router.weight [E, C, D], router.scale [1] → logits [T, E, C] in fp32 or better.
    Gradient: dx̂ = s dz Ŵ, dŴ = s dzᵀ x̂, ds = ⟨dz, cosine⟩.
    Source: Puigcerver et al. 2023, §2.3: without the lengths, wide models' softmaxes become choices of one.
    """
    unit_TD, x_cache = unit_forward(x_TD)
    unit_ECD, weight_cache = unit_forward(params["router.weight"])
    scale = at_least_fp32(params["router.scale"])
    cosine_TEC = np.einsum("td,ecd->tec", unit_TD, unit_ECD)
    return scale * cosine_TEC, SlotLogitsCache(x_cache, weight_cache, scale, cosine_TEC)


def slot_logits_backward(dlogits_TEC: np.ndarray, cache: SlotLogitsCache) -> tuple[np.ndarray, Params]:
    """(dx [T, D], gradients by name) of `slot_logits_forward`."""
    dcosine_TEC = cache.scale * dlogits_TEC
    dx_TD = unit_backward(np.einsum("tec,ecd->td", dcosine_TEC, cache.weight.unit), cache.x)
    dweight = unit_backward(np.einsum("tec,td->ecd", dcosine_TEC, cache.x.unit), cache.weight)
    return dx_TD, {"router.weight": dweight, "router.scale": (dlogits_TEC * cache.cosine).sum().reshape(1)}


def _over_slots(array_TEC: np.ndarray) -> np.ndarray:
    tokens, experts, slots = array_TEC.shape
    return array_TEC.reshape(tokens, experts * slots)


def soft_mix(logits_TEC: np.ndarray, tokens: TokenInfo) -> SoftMix:
    """Two softmaxes of the same logits: over the tokens of the group (soft-dispatch), and over all its E · C slots (soft-combine):

    d_tec = exp z_tec / Σ_t' exp z_t'ec,   c_tec = exp z_tec / Σ_e'c' exp z_te'c'

    Padding is in neither. Gradient: that of softmax, for both.
    Source: Puigcerver et al. 2023, §2.1. Deviates: the paper has no padding; a sequence is a group there too.
    """
    flat = _over_slots(logits_TEC)
    combine, dispatch = np.zeros_like(flat), np.zeros_like(flat)
    combine[tokens.real_T] = softmax_forward(flat[tokens.real_T])[0]
    for group in range(tokens.groups):
        own = (tokens.group_T == group) & tokens.real_T
        dispatch[own] = softmax_forward(flat[own].T)[0].T
    return SoftMix(dispatch.reshape(logits_TEC.shape), combine.reshape(logits_TEC.shape), tokens.group_T, tokens.groups)


def soft_mix_backward(dmix: SoftMix, mix: SoftMix) -> np.ndarray:
    """dlogits [T, E, C] of `soft_mix` from the cotangents of dispatch and combine."""
    dlogits = softmax_backward(_over_slots(dmix.combine), _over_slots(mix.combine))
    dispatch, ddispatch = _over_slots(mix.dispatch), _over_slots(dmix.dispatch)
    for group in range(mix.groups):
        own = mix.group == group
        dlogits[own] += softmax_backward(ddispatch[own].T, dispatch[own].T).T
    return dlogits.reshape(mix.combine.shape)


class SoftCache(NamedTuple):
    """x_TD: the tokens; mix: their shares; out: the slots' outputs, [E, B, C, D]; experts: the experts' cache."""

    x_TD: np.ndarray
    mix: SoftMix
    out: np.ndarray
    experts: Any


def mix_forward(x_TD: np.ndarray, mix: SoftMix, params: Params, config: MoEConfig) -> tuple[np.ndarray, SoftCache]:
    """Tokens into slots, slots through their experts, slots into tokens (soft-moe): y_t = Σ_ec c_tec FFN_e(Σ_t' d_t'ec x_t').

    Shapes: x [T, D] → (y [T, D], cache). Each expert sees its C slots of each group: B · C rows, whatever the tokens are.
    Gradient: do_ec = Σ_t c_tec dy_t, dc_tec = ⟨dy_t, o_ec⟩; for the slots' inputs likewise, with d in the place of c.
    Source: Puigcerver et al. 2023, §2.1. Not causal: a slot holds later tokens too, and hands them to earlier ones.
    """
    experts, slots = mix.dispatch.shape[1:]
    rows = np.zeros((experts, mix.groups, slots, x_TD.shape[1]), x_TD.dtype)
    for group in range(mix.groups):
        own = mix.group == group
        rows[:, group] = np.einsum("tec,td->ecd", mix.dispatch[own], x_TD[own])
    bounds_P = np.arange(experts + 1) * mix.groups * slots
    out_ND, cache = experts_forward(rows.reshape(-1, x_TD.shape[1]), bounds_P, params, config.experts)
    out, y_TD = out_ND.reshape(rows.shape), np.zeros_like(x_TD)
    for group in range(mix.groups):
        own = mix.group == group
        y_TD[own] = np.einsum("tec,ecd->td", mix.combine[own], out[:, group])
    return y_TD, SoftCache(x_TD, mix, out, cache)


def mix_backward(dy_TD: np.ndarray, cache: SoftCache) -> tuple[np.ndarray, SoftMix, Params]:
    """(dx [T, D], cotangents of dispatch and combine, gradients by name) of `mix_forward`."""
    x_TD, mix, out, experts = cache
    dispatch, combine = np.zeros_like(mix.dispatch), np.zeros_like(mix.combine)
    dout, dx_TD = np.zeros_like(out), np.zeros_like(x_TD)
    for group in range(mix.groups):
        own = mix.group == group
        combine[own] = np.einsum("td,ecd->tec", dy_TD[own], out[:, group])
        dout[:, group] = np.einsum("tec,td->ecd", mix.combine[own], dy_TD[own])
    drows_ND, dparams = experts_backward(dout.reshape(-1, x_TD.shape[1]), experts)
    drows = drows_ND.reshape(out.shape)
    for group in range(mix.groups):
        own = mix.group == group
        dispatch[own] = np.einsum("ecd,td->tec", drows[:, group], x_TD[own])
        dx_TD[own] = np.einsum("tec,ecd->td", mix.dispatch[own], drows[:, group])
    return dx_TD, mix._replace(dispatch=dispatch, combine=combine), dparams
