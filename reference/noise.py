"""Shazeer's noisy top-k: noise on the logits whose size is learned, and the two losses that go with it.

The noise is drawn in training only. The losses see the gates and the noisy logits before any drop, and never padding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .experts import normal_cdf
from .scores import at_least_fp32, sigmoid
from .tokens import Draws, TokenInfo

if TYPE_CHECKING:
    from .balancing import LossInputs

FLOOR = 1e-2  # what the learned deviation cannot fall below, tensor2tensor's noise_epsilon


class Noisy(NamedTuple):
    """Logits with their noise: clean_TE + standard normal ⊙ deviation_TE; deviation_TE is None where nothing was drawn."""

    noisy_TE: np.ndarray
    deviation_TE: Any


class NoiseCache(NamedTuple):
    """x_TD: what the deviation was computed from; weight: its matrix; normal_TE: the noise; slope_TE: ∂deviation/∂(x W)."""

    x_TD: np.ndarray
    weight: np.ndarray
    normal_TE: np.ndarray
    slope_TE: np.ndarray


def standard_normal(draws: Draws, name: str, shape: tuple[int, int]) -> np.ndarray:
    """Numbers from N(0, 1) of a shape [T, E], from two uniform ones each (box-muller): n = √(−2 log(1 − u)) cos 2πv.

    So that every track's generator need draw uniform numbers only, and any track can replay them. Source: Box & Muller 1958.
    """
    pairs = draws.uniform(name, (*shape, 2))
    return np.sqrt(-2 * np.log1p(-pairs[..., 0])) * np.cos(2 * math.pi * pairs[..., 1])


def no_logit_noise_forward(logits_TE: np.ndarray, x_TD: np.ndarray, weight: Any, draws: Draws) -> tuple[Noisy, None]:
    """The logits as they are."""
    return Noisy(logits_TE, None), None


def no_logit_noise_backward(dnoisy_TE: np.ndarray, ddeviation_TE: Any, cache: None) -> tuple[np.ndarray, None, None]:
    """(dlogits, None, None) of `no_logit_noise_forward`."""
    return dnoisy_TE, None, None


def learned_noise_forward(logits_TE: np.ndarray, x_TD: np.ndarray, weight: np.ndarray, draws: Draws) -> tuple[Noisy, NoiseCache]:
    """Noise whose size each token learns per expert (noisy-logits): h = z + n ⊙ σ, σ = softplus(x W_noise) + 0.01, n ~ N(0, 1).

    Shapes: logits [T, E], x [T, D], weight [E, D] → (Noisy, cache).
    Gradient: dz = dh; with g = (dh ⊙ n + dσ) ⊙ sigmoid(x W_noise): dx = g W_noise, dW_noise = gᵀ x.
    Source: Shazeer et al. 2017, eq. 4.
    Deviates: the 0.01 is tensor2tensor's; without it a deviation that has shrunk to 0 makes the smooth load divide by 0.
    """
    x_TD, weight = at_least_fp32(x_TD), at_least_fp32(weight)
    raw_TE = x_TD @ weight.T
    deviation_TE = np.logaddexp(raw_TE, np.zeros((), raw_TE.dtype)) + np.asarray(FLOOR, raw_TE.dtype)
    normal_TE = standard_normal(draws, "logit_noise", logits_TE.shape).astype(logits_TE.dtype)
    return Noisy(logits_TE + normal_TE * deviation_TE, deviation_TE), NoiseCache(x_TD, weight, normal_TE, sigmoid(raw_TE))


def learned_noise_backward(
    dnoisy_TE: np.ndarray, ddeviation_TE: np.ndarray | float, cache: NoiseCache
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dlogits [T, E], dx [T, D], dweight [E, D]) of `learned_noise_forward`."""
    draw_TE = (dnoisy_TE * cache.normal_TE + ddeviation_TE) * cache.slope_TE
    return dnoisy_TE, draw_TE @ cache.weight, draw_TE.T @ cache.x_TD


class LogitNoise(NamedTuple):
    """Noise on the logits.

    forward, backward  (logits, x, weight or None, draws) → (Noisy, cache); (dnoisy, ddeviation, cache) → (dlogits, dx, dweight)
    learned            whether it has a matrix, `router.noise_weight`, which starts at 0
    """

    forward: Callable
    backward: Callable
    learned: bool


LOGIT_NOISE: dict[str, LogitNoise] = {
    "none": LogitNoise(no_logit_noise_forward, no_logit_noise_backward, learned=False),
    "learned": LogitNoise(learned_noise_forward, learned_noise_backward, learned=True),
}
"""What `ScoresConfig.logit_noise` can name."""


def squared_variation(amount_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How unevenly an amount is spread over the experts, as CV² (cv-squared): variance / (mean² + 1e-10); 0 for a single expert.

    Shapes: the amount [E] → (CV² [], its gradient [E]).
    Gradient: 2 (a_e − m) / (E q) − 2 v m / (E q²), with mean m, population variance v and q = m² + 1e-10.
    Source: Shazeer et al. 2017, §4; tensor2tensor, which takes the population variance.
    Deviates: FastMoE divides by E − 1, which is NaN for one expert.
    """
    mean, variance = amount_E.mean(), amount_E.var()
    square = mean**2 + np.asarray(1e-10, amount_E.dtype)
    return variance / square, 2 * ((amount_E - mean) / square - variance * mean / square**2) / len(amount_E)


class ImportanceCache(NamedTuple):
    """weight_TK: ∂loss/∂gate."""

    weight_TK: np.ndarray


def importance_forward(inputs: LossInputs) -> tuple[np.ndarray, ImportanceCache]:
    """Shazeer's importance loss (loss-importance): CV² over the experts of I_e = Σ_t g_te, the gates before any drop.

    Gradient: dg_tk = ∂CV²/∂I of its expert.
    Source: Shazeer et al. 2017, eq. 6 and 7.
    """
    total_E = np.zeros(inputs.probability_TE.shape[1], inputs.gate_TK.dtype)
    np.add.at(total_E, inputs.expert_TK[inputs.picked_TK], inputs.gate_TK[inputs.picked_TK])
    value, slope_E = squared_variation(total_E)
    return value, ImportanceCache(np.where(inputs.picked_TK, slope_E[inputs.expert_TK], 0))


def importance_backward(dloss: float, cache: ImportanceCache) -> dict[str, np.ndarray]:
    """Cotangents of `importance_forward`."""
    return {"gate": dloss * cache.weight_TK}


class SmoothLoad(NamedTuple):
    """load_E: the estimate; distance_TE: how many deviations an expert's clean logit lies above its threshold; rival_TE: whose it is."""

    load_E: np.ndarray
    distance_TE: np.ndarray
    rival_TE: np.ndarray


def smooth_load(clean_TE: np.ndarray, noise: Noisy, top_k: int, tokens: TokenInfo) -> SmoothLoad:
    """How many tokens each expert would get if its noise alone were drawn anew (smooth-load): Σ_t Φ((z_te − θ_te) / σ_te).

    θ_te is the K-th highest noisy logit among the *other* experts: the one of rank K + 1 for an expert inside the top K, else of rank K.
    Shapes: clean, noisy, deviation [T, E], K < E → load [E], which need not sum to T·K. Gradient: see `smooth_load_forward`.
    Source: Shazeer et al. 2017, eq. 8–10; tensor2tensor's `_prob_in_top_k`.
    """
    order_TE = np.argsort(-noise.noisy_TE, axis=1, kind="stable")
    kth, following = order_TE[:, [top_k - 1]], order_TE[:, [top_k]]
    inside_TE = noise.noisy_TE > np.take_along_axis(noise.noisy_TE, following, axis=1)
    rival_TE = np.where(inside_TE, following, kth)
    distance_TE = (clean_TE - np.take_along_axis(noise.noisy_TE, rival_TE, axis=1)) / noise.deviation_TE
    return SmoothLoad(normal_cdf(distance_TE)[tokens.real_T].sum(0), distance_TE, rival_TE)


class SmoothLoadCache(NamedTuple):
    """∂loss/∂ of the three arrays that the estimate reads; None where nothing was drawn."""

    clean_TE: np.ndarray | None
    noisy_TE: np.ndarray | None
    deviation_TE: Any


def smooth_load_forward(inputs: LossInputs) -> tuple[np.ndarray, SmoothLoadCache]:
    """Shazeer's load loss (loss-smooth-load): CV² over the experts of the smooth load; of the load itself where nothing was drawn or K = E.

    Gradient: with a = ∂CV²/∂load ⊙ φ(d) / σ: dz += a, dh of the rival −= a, dσ −= a ⊙ d; a count has none.
    Source: Shazeer et al. 2017, eq. 11.
    """
    noise, experts = inputs.noise, inputs.probability_TE.shape[1]
    if noise is None or noise.deviation_TE is None or inputs.top_k == experts:
        count_E = np.bincount(inputs.expert_TK[inputs.picked_TK], minlength=experts).astype(inputs.probability_TE.dtype)
        return squared_variation(count_E)[0], SmoothLoadCache(None, None, None)
    estimate = smooth_load(inputs.logits_TE, noise, inputs.top_k, inputs.tokens)
    value, slope_E = squared_variation(estimate.load_E)
    density_TE = np.exp(-0.5 * estimate.distance_TE**2) / math.sqrt(2 * math.pi)
    clean_TE = slope_E * density_TE / noise.deviation_TE * inputs.tokens.real_T[:, None]
    noisy_TE = np.zeros_like(clean_TE)
    np.add.at(noisy_TE, (np.arange(len(clean_TE))[:, None], estimate.rival_TE), -clean_TE)
    return value, SmoothLoadCache(clean_TE, noisy_TE, -clean_TE * estimate.distance_TE)


def smooth_load_backward(dloss: float, cache: SmoothLoadCache) -> dict[str, np.ndarray]:
    """Cotangents of `smooth_load_forward`."""
    named = {"logits": cache.clean_TE, "noisy": cache.noisy_TE, "deviation": cache.deviation_TE}
    return {name: dloss * weight for name, weight in named.items() if weight is not None}
