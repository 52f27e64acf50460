"""x_TD → logits_TE → scores_TE: how well each expert suits each token.

Everything here runs in fp32 or better whatever the dtype of x: what is exponentiated must not be rounded first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from .tokens import Draws


def at_least_fp32(array: np.ndarray) -> np.ndarray:
    """The array in its own dtype, or in fp32 where that is wider."""
    return array.astype(np.promote_types(array.dtype, np.float32), copy=False)


class LogitsCache(NamedTuple):
    """x_TD: the router's input; weight: its matrix [E, D]."""

    x_TD: np.ndarray
    weight: np.ndarray


def logits_forward(x_TD: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None) -> tuple[np.ndarray, LogitsCache]:
    """The linear router (router-logits): z_te = Σ_d x_td W_ed + b_e.

    Shapes: x [T, D], weight [E, D], bias [E] or None → logits [T, E] in fp32 or better.
    Gradient: dx = dz W, dW = dzᵀ x, db = Σ_t dz_t.
    Source: Shazeer et al. 2017, §2.1 (no bias); gpt-oss has the bias.
    Deviates: DeepSeek-V3's released inference code multiplies in bf16; fp32 here, as its training and transformers do.
    """
    x_TD, weight = at_least_fp32(x_TD), at_least_fp32(weight)
    logits_TE = x_TD @ weight.T
    if bias is not None:
        logits_TE = logits_TE + bias
    return logits_TE, LogitsCache(x_TD, weight)


def logits_backward(dlogits_TE: np.ndarray, cache: LogitsCache) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(dx [T, D], dweight [E, D], dbias [E]) of `logits_forward`."""
    return dlogits_TE @ cache.weight, dlogits_TE.T @ cache.x_TD, dlogits_TE.sum(0)


def residual_forward(logits_TE: np.ndarray, previous_TE: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, LogitsCache]:
    """Logits that remember those of the layer before (router-residual): z_te = z_te + Σ_j z'_tj V_ej, z' the whole of these.

    Shapes: logits [T, E], previous [T, E], weight V [E, E] → (logits [T, E] in fp32 or better, cache).
    Gradient: that of the logits as it is; dz' = dz V, dV = dzᵀ z'.
    Source: Jin et al. 2024 (MoE++), eq. 6. Deviates: its released code rounds z' to the dtype of V, bf16; fp32 here, as for the router.
    """
    added_TE, cache = logits_forward(previous_TE, weight)
    return logits_TE + added_TE, cache


def residual_backward(dlogits_TE: np.ndarray, cache: LogitsCache) -> tuple[np.ndarray, np.ndarray]:
    """(dprevious [T, E], dweight [E, E]) of `residual_forward`."""
    dprevious_TE, dweight, _ = logits_backward(dlogits_TE, cache)
    return dprevious_TE, dweight


def no_norm_forward(x_TD: np.ndarray) -> tuple[np.ndarray, None]:
    """The input as it is."""
    return x_TD, None


def no_norm_backward(dnormed_TD: np.ndarray, cache: None) -> np.ndarray:
    """dx [T, D] of `no_norm_forward`."""
    return dnormed_TD


class NormCache(NamedTuple):
    """normed_TD: the result; size: what was divided by, [T, 1]."""

    normed_TD: np.ndarray
    size: np.ndarray


def rms_norm_forward(x_TD: np.ndarray) -> tuple[np.ndarray, NormCache]:
    """The router's input with an RMS of 1 (router-norm): n = x / √(mean_d x² + 1e-6), so that its length moves no logit.

    Shapes: [T, D] → (normed [T, D] in fp32 or better, cache). Gradient: dx = (dn − n mean_d(dn ⊙ n)) / √(mean_d x² + 1e-6).
    Source: Zhang & Sennrich 2019 (RMSNorm); as the router's own norm: Gemma 4 in transformers.
    Deviates: Gemma 4 also multiplies n by a learned vector and by D^(−1/2) before its matrix; both can be folded into the matrix.
    """
    x_TD = at_least_fp32(x_TD)
    size = np.sqrt((x_TD**2).mean(1, keepdims=True) + np.asarray(1e-6, x_TD.dtype))
    return x_TD / size, NormCache(x_TD / size, size)


def rms_norm_backward(dnormed_TD: np.ndarray, cache: NormCache) -> np.ndarray:
    """dx [T, D] of `rms_norm_forward`."""
    return (dnormed_TD - cache.normed_TD * (dnormed_TD * cache.normed_TD).mean(1, keepdims=True)) / cache.size


class Stage(NamedTuple):
    """forward: array → (array, cache); backward: (cotangent, cache) → cotangent."""

    forward: Callable
    backward: Callable


INPUT_NORMS: dict[str, Stage] = {
    "none": Stage(no_norm_forward, no_norm_backward),
    "rms": Stage(rms_norm_forward, rms_norm_backward),
}
"""What `ScoresConfig.input_norm` can name."""


def softcap_forward(logits_TE: np.ndarray, cap: float) -> tuple[np.ndarray, np.ndarray]:
    """Logits bent into (−c, c) (softcap): z̃ = c tanh(z / c); c = 0 leaves them alone.

    Shapes: [T, E] → (capped [T, E], ∂z̃/∂z). Gradient: dz = dz̃ (1 − (z̃ / c)²).
    Source: Gemma Team 2024 (Gemma 2, arXiv 2408.00118), §2, there for attention and output; on the router's logits: Grok-1 in SGLang
    (c = 30) and Laguna in transformers.
    """
    if cap == 0:
        return logits_TE, np.ones((), logits_TE.dtype)
    share_TE = np.tanh(logits_TE / np.asarray(cap, logits_TE.dtype))
    return share_TE * np.asarray(cap, logits_TE.dtype), 1 - share_TE**2


def jitter(x_TD: np.ndarray, scale: float, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """Switch's jitter (jitter): x̃ = x ⊙ u, u ~ U(1 − ε, 1 + ε), on the router's copy of the input only.

    Shapes: x [T, D] → (x̃, u), both [T, D]; ε = scale. Gradient: dx = dx̃ ⊙ u.
    Source: Fedus et al. 2021, appendix of Switch Transformer; mesh-tensorflow's `moe.py`.
    Deviates: transformers' Mixtral multiplies the hidden states themselves, so that the experts see the noise.
    """
    x_TD = at_least_fp32(x_TD)
    factor_TD = (1 - scale + 2 * scale * draws.uniform("jitter", x_TD.shape)).astype(x_TD.dtype)
    return x_TD * factor_TD, factor_TD


def no_noise(x_TD: np.ndarray, scale: float, draws: Draws) -> tuple[np.ndarray, np.ndarray]:
    """The input as it is, and the factor 1."""
    return x_TD, np.ones((), x_TD.dtype)


INPUT_NOISE: dict[str, Callable[[np.ndarray, float, Draws], tuple[np.ndarray, np.ndarray]]] = {"none": no_noise, "jitter": jitter}
"""What `ScoresConfig.noise` can name: (x [T, D], scale, draws) → (x with its noise, the factor)."""


def softmax_forward(logits_TE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Softmax over the experts (softmax): s_te = exp(z_te) / Σ_j exp(z_tj); rows sum to 1. −∞ gets exactly 0.

    Shapes: [T, E] → (scores [T, E], cache). Gradient: dz = s ⊙ (ds − Σ_j ds_j s_j).
    """
    peak = logits_TE.max(1, keepdims=True, initial=-np.inf)
    exp_TE = np.exp(logits_TE - peak)
    scores_TE = exp_TE / exp_TE.sum(1, keepdims=True)
    return scores_TE, scores_TE


def softmax_backward(dscores_TE: np.ndarray, cache: np.ndarray) -> np.ndarray:
    """dlogits [T, E] of `softmax_forward`."""
    return cache * (dscores_TE - (dscores_TE * cache).sum(1, keepdims=True))


def sigmoid(z: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(−z)) of an array of any shape, without overflow on either side."""
    return np.exp(-np.logaddexp(np.zeros((), z.dtype), -z))


def sigmoid_forward(logits_TE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Each expert judged on its own (score-sigmoid): s_te = 1 / (1 + exp(−z_te)), in (0, 1); rows need not sum to 1.

    Shapes: [T, E] → (scores [T, E], cache). Gradient: dz = ds ⊙ s ⊙ (1 − s).
    Source: DeepSeek-V3 technical report, §2.1.2.
    """
    scores_TE = sigmoid(logits_TE)
    return scores_TE, scores_TE


def sigmoid_backward(dscores_TE: np.ndarray, cache: np.ndarray) -> np.ndarray:
    """dlogits [T, E] of `sigmoid_forward`."""
    return dscores_TE * cache * (1 - cache)


class SoftplusCache(NamedTuple):
    """logits_TE: z; scores_TE: the result."""

    logits_TE: np.ndarray
    scores_TE: np.ndarray


def sqrt_softplus_forward(logits_TE: np.ndarray) -> tuple[np.ndarray, SoftplusCache]:
    """Unbounded and never negative (score-sqrt-softplus): s_te = √log(1 + exp z_te), which grows like √z.

    Shapes: [T, E] → (scores [T, E], cache). Gradient: dz = ds σ(z) / (2 s), and 0 where s has underflowed to 0.
    Source: DeepSeek-V4 in transformers. Deviates: there the gradient of an underflowed score is NaN.
    """
    scores_TE = np.sqrt(np.logaddexp(logits_TE, np.zeros((), logits_TE.dtype)))
    return scores_TE, SoftplusCache(logits_TE, scores_TE)


def sqrt_softplus_backward(dscores_TE: np.ndarray, cache: SoftplusCache) -> np.ndarray:
    """dlogits [T, E] of `sqrt_softplus_forward`."""
    slope_TE = sigmoid(cache.logits_TE)
    return dscores_TE * np.divide(slope_TE, 2 * cache.scores_TE, out=np.zeros_like(slope_TE), where=cache.scores_TE > 0)


def relu_score_forward(logits_TE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A score that is itself the decision (score-relu): s_te = max(z_te, 0); experts with s = 0 are off.

    Shapes: [T, E] → (scores [T, E], cache). Gradient: dz = ds where z > 0; continuous in value when an expert comes or goes.
    Source: Wang et al. 2024 (ReMoE), §3.
    """
    return np.maximum(logits_TE, 0), logits_TE


def relu_score_backward(dscores_TE: np.ndarray, cache: np.ndarray) -> np.ndarray:
    """dlogits [T, E] of `relu_score_forward`."""
    return dscores_TE * (cache > 0)


def identity_forward(logits_TE: np.ndarray) -> tuple[np.ndarray, None]:
    """The logits themselves (score-identity): s = z, for routers that take the softmax over the chosen experts only."""
    return logits_TE, None


def identity_backward(dscores_TE: np.ndarray, cache: None) -> np.ndarray:
    """dlogits [T, E] of `identity_forward`."""
    return dscores_TE


class ShareCache(NamedTuple):
    """share_TE: the result; total: what was divided by, [T, 1]."""

    share_TE: np.ndarray
    total: np.ndarray


def share_forward(scores_TE: np.ndarray) -> tuple[np.ndarray, ShareCache]:
    """Scores as a distribution over the experts (score-share): p_te = s_te / (Σ_j s_tj + 1e-20), for scores ≥ 0.

    Shapes: [T, E] → (probability [T, E], cache). Gradient: ds = (dp − Σ_j dp_j p_j) / Σ_j s_j.
    Source: DeepSeek-V3 technical report, eq. 19 (its sequence-wise loss); the 1e-20 keeps underflown rows finite.
    """
    total = scores_TE.sum(1, keepdims=True) + 1e-20
    share_TE = scores_TE / total
    return share_TE, ShareCache(share_TE, total)


def share_backward(dshare_TE: np.ndarray, cache: ShareCache) -> np.ndarray:
    """dscores [T, E] of `share_forward`."""
    return (dshare_TE - (dshare_TE * cache.share_TE).sum(1, keepdims=True)) / cache.total


class ScoreFunction(NamedTuple):
    """logits → scores, and scores → the distribution over all experts that the balance losses average."""

    forward: Callable
    backward: Callable
    probability_forward: Callable
    probability_backward: Callable


SCORE_FUNCTIONS: dict[str, ScoreFunction] = {
    "softmax": ScoreFunction(softmax_forward, softmax_backward, identity_forward, identity_backward),
    "sigmoid": ScoreFunction(sigmoid_forward, sigmoid_backward, share_forward, share_backward),
    "sqrt_softplus": ScoreFunction(sqrt_softplus_forward, sqrt_softplus_backward, share_forward, share_backward),
    "relu": ScoreFunction(relu_score_forward, relu_score_backward, share_forward, share_backward),
    "identity": ScoreFunction(identity_forward, identity_backward, softmax_forward, softmax_backward),
}
"""What `ScoresConfig.function` can name."""
