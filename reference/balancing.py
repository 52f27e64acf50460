"""What keeps the load even: auxiliary losses, the correction bias, and the measures of how even it is.

Loads are counted before any drop and without padding. A loss returns its unweighted value; its backward returns cotangents by the
name of the array they belong to, "logits" or "probability" (the scores as a distribution over all experts).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .config import require
from .gating import top_k
from .noise import Noisy, importance_backward, importance_forward, smooth_load_backward, smooth_load_forward
from .penalty import gate_l1_backward, gate_l1_forward
from .scores import softmax_forward
from .tokens import TokenInfo


class LossInputs(NamedTuple):
    """What a balance loss can see.

    picked_TK, gate_TK   the assignments before the drop, and their gates
    noise                that of the logits
    """

    logits_TE: np.ndarray
    scores_TE: np.ndarray
    probability_TE: np.ndarray
    expert_TK: np.ndarray
    picked_TK: np.ndarray
    tokens: TokenInfo
    gate_TK: np.ndarray | None = None
    noise: Noisy | None = None
    top_k: int = 1
    groups: int = 1
    top_groups: int = 1
    networks: int = 0
    network_share: float = 1.0


def count_load(expert_TK: np.ndarray, picked_TK: np.ndarray, experts: int) -> np.ndarray:
    """Assignments per expert, before any drop (load): [E] int64."""
    return np.bincount(expert_TK[picked_TK], minlength=experts)


def mean_probability(probability_TE: np.ndarray, tokens: TokenInfo) -> np.ndarray:
    """Mean score share of each expert over the real tokens (importance): P_e = 1/T Σ_t p_te, [E]; 0 without real tokens."""
    return probability_TE[tokens.real_T].sum(0) / max(int(tokens.real_T.sum()), 1)


class BalanceCache(NamedTuple):
    """weight_TE: ∂loss/∂probability."""

    weight_TE: np.ndarray


def _balance_forward(count_BE: np.ndarray, group_T: np.ndarray, inputs: LossInputs) -> tuple[np.ndarray, BalanceCache]:
    """Mean over the groups that have real tokens of E Σ_e f_e P_e, with f_e = count_e / Σ count, and P_e the group's mean probability."""
    probability_TE, real_T = inputs.probability_TE, inputs.tokens.real_T
    experts, size_B = count_BE.shape[1], np.bincount(group_T[real_T], minlength=len(count_BE))
    full = size_B > 0
    share_BE = count_BE / np.maximum(count_BE.sum(1, keepdims=True), 1)
    per_token_BE = experts * share_BE / (np.maximum(size_B, 1) * max(int(full.sum()), 1))[:, None]
    weight_TE = (per_token_BE[group_T] * real_T[:, None]).astype(probability_TE.dtype)
    return (weight_TE * probability_TE).sum(), BalanceCache(weight_TE)


def balance_backward(dloss: float, cache: BalanceCache) -> dict[str, np.ndarray]:
    """Cotangents of any Σ f P loss: dp_te = E f_e / T; f is a count and has no gradient."""
    return {"probability": dloss * cache.weight_TE}


def _one_group(inputs: LossInputs) -> np.ndarray:
    return np.zeros(len(inputs.expert_TK), np.int64)


def first_choice_balance_forward(inputs: LossInputs) -> tuple[np.ndarray, BalanceCache]:
    """GShard's and Switch's loss (loss-first-choice): L = E Σ_e f_e P_e, f the share of first choices; 1 at even load.

    Gradient: dp_te = E f_e / T.
    Source: Fedus et al. 2021, eq. 4–6; Lepikhin et al. 2020, algorithm 1.
    Deviates: GShard's text has 1/E Σ f P, E² times smaller, so its coefficient does not carry over; mesh-tensorflow averages it over
    groups, here f and P are global.
    """
    first, picked = inputs.expert_TK[:, :1], inputs.picked_TK[:, :1]
    count_E = count_load(first, picked, inputs.probability_TE.shape[1])
    return _balance_forward(count_E[None], _one_group(inputs), inputs)


def expert_balance_forward(inputs: LossInputs) -> tuple[np.ndarray, BalanceCache]:
    """DeepSeekMoE's expert-level loss (loss-expert): L = E Σ_e f_e P_e, f_e = load_e / (K T); 1 at even load for every K.

    Gradient: dp_te = E f_e / T.
    Source: Dai et al. 2024, eq. 12–14 (N′ and K′ count routed experts only; the paper draws the factor E into f).
    Deviates: transformers' `load_balancing_loss_func` does not divide by K (even load gives K) and pools all layers, so that layers
    which collapse on different experts look even.
    """
    count_E = count_load(inputs.expert_TK, inputs.picked_TK, inputs.probability_TE.shape[1])
    return _balance_forward(count_E[None], _one_group(inputs), inputs)


def sequence_balance_forward(inputs: LossInputs) -> tuple[np.ndarray, BalanceCache]:
    """DeepSeek-V3's complementary loss (loss-sequence): the mean over sequences of E Σ_e f_e P_e inside one sequence.

    f counts the top-K of the scores *without* correction bias and group limit; P is the mean of the normalized scores.
    Gradient: dp_te = E f_e / (T_s · number of sequences).
    Source: DeepSeek-V3 technical report, eq. 17–20.
    """
    tokens, experts = inputs.tokens, inputs.scores_TE.shape[1]
    unbiased_TK = top_k(inputs.scores_TE, inputs.top_k)
    count_BE = np.zeros((tokens.groups, experts), np.int64)
    np.add.at(count_BE, (tokens.group_T[tokens.real_T][:, None], unbiased_TK[tokens.real_T]), 1)
    return _balance_forward(count_BE, tokens.group_T, inputs)


def _weighted_forward(frequency_E: np.ndarray, inputs: LossInputs) -> tuple[np.ndarray, BalanceCache]:
    """Σ_e f_e P_e over all real tokens, for given f."""
    real_T, probability_TE = inputs.tokens.real_T, inputs.probability_TE
    weight_TE = (frequency_E * real_T[:, None] / max(int(real_T.sum()), 1)).astype(probability_TE.dtype)
    return (weight_TE * probability_TE).sum(), BalanceCache(weight_TE)


def device_balance_forward(inputs: LossInputs) -> tuple[np.ndarray, BalanceCache]:
    """DeepSeekMoE's device-level loss (loss-device): L = E Σ_g f'_g P'_g over groups of experts that share a device; 1 at even load.

    f'_g is the mean of the group's f_e, P'_g the sum of its P_e: experts of one device may differ as long as the devices do not.
    Gradient: dp_te = E f'_g(e) / T. With one group it is constant and teaches nothing.
    Source: Dai et al. 2024, eq. 15–17; DeepSeek-V2, eq. 26–28. The groups are those of gating.groups.
    Deviates: DeepSeek-V2 computes it for each sequence, here over all tokens.
    """
    experts = inputs.probability_TE.shape[1]
    count_E = count_load(inputs.expert_TK, inputs.picked_TK, experts)
    mean_G = experts * count_E.reshape(inputs.groups, -1).mean(1) / max(count_E.sum(), 1)
    return _weighted_forward(np.repeat(mean_G, experts // inputs.groups), inputs)


def communication_balance_forward(inputs: LossInputs) -> tuple[np.ndarray, BalanceCache]:
    """DeepSeek-V2's communication loss (loss-communication): L = Σ_g f''_g P'_g, f''_g = G/(M T) · tokens that are sent to group g.

    A token sent to a device crosses once, however many of its experts live there. 1 where every token reaches M devices evenly.
    Gradient: dp_te = f''_g(e) / T.
    Source: DeepSeek-V2, eq. 29–31; M is gating.top_groups.
    Deviates: the paper computes it for each sequence, here over all tokens.
    """
    experts, groups, tokens = inputs.probability_TE.shape[1], inputs.groups, max(int(inputs.tokens.real_T.sum()), 1)
    members = experts // groups
    group_TK = np.where(inputs.picked_TK, inputs.expert_TK // members, groups)
    sent_G = np.array([(group_TK == g).any(1).sum() for g in range(groups)])
    return _weighted_forward(np.repeat(groups * sent_G / (inputs.top_groups * tokens), members), inputs)


def heterogeneous_balance_forward(inputs: LossInputs) -> tuple[np.ndarray, BalanceCache]:
    """MoE++'s loss (loss-heterogeneous): L = (N + Z/τ) Σ_e η_e f_e P_e, η = 1 for the N networks and τ for the Z other experts.

    f_e is the expert's share of the load. 1 where each network has τ times the load and the score of each other expert; with
    τ = 1 it is `expert_balance_forward`. Gradient: dp_te = (N + Z/τ) η_e f_e / T.
    Source: Jin et al. 2024 (MoE++), eq. 7.
    Deviates: the paper has neither N + Z/τ nor 1/K in f, so that its loss is K / (N + Z/τ) where this one is 1.
    """
    experts, share = inputs.probability_TE.shape[1], inputs.network_share
    count_E = count_load(inputs.expert_TK, inputs.picked_TK, experts)
    eta_E = np.where(np.arange(experts) < inputs.networks, 1.0, share)
    even = inputs.networks + (experts - inputs.networks) / share
    return _weighted_forward(even * eta_E * count_E / max(count_E.sum(), 1), inputs)


class GlobalCache(NamedTuple):
    """share_E: E times the share of each expert in the load."""

    share_E: np.ndarray


def global_balance_forward(importance_E: np.ndarray, load_E: np.ndarray) -> tuple[float, GlobalCache]:
    """The balance loss of one micro-batch against the load of the whole batch (loss-global): L = E Σ_e load_e / Σ load · P_e.

    The mean of it over equally large micro-batches is `expert_balance_forward` of the whole batch, while the mean of their own losses
    asks every micro-batch, and so every domain of the data, to be even by itself.
    Shapes: importance [E], `routing.importance` of the micro-batch; load [E], summed over micro-batches and ranks → (value, cache).
    Gradient: dP_e = E load_e / Σ load; the load is a count and has none.
    Source: Qiu et al. 2025 (Demons in the Detail).
    Raises: ValueError for shapes that differ.
    """
    require(load_E.shape == importance_E.shape, f"load has shape {load_E.shape}, importance {importance_E.shape}")
    share_E = len(load_E) * load_E / max(load_E.sum(), 1)
    return float(share_E @ importance_E), GlobalCache(share_E)


def global_balance_backward(dloss: float, cache: GlobalCache) -> np.ndarray:
    """dimportance [E] of `global_balance_forward`."""
    return dloss * cache.share_E


class RouterZCache(NamedTuple):
    """weight_TE: ∂loss/∂logits."""

    weight_TE: np.ndarray


def router_z_forward(inputs: LossInputs) -> tuple[np.ndarray, RouterZCache]:
    """ST-MoE's z-loss (loss-router-z): L = 1/T Σ_t (log Σ_e exp z_te)², which keeps logits small.

    Gradient: dz_te = 2/T · logsumexp(z_t) · softmax(z_t)_e.
    Source: Zoph et al. 2022, eq. 5. The logits are those before correction bias; padding does not count.
    """
    logits_TE, real_T = inputs.logits_TE, inputs.tokens.real_T
    peak = logits_TE.max(1, initial=-np.inf)
    lse_T = peak + np.log(np.exp(logits_TE - peak[:, None]).sum(1))
    real = max(int(real_T.sum()), 1)
    weight_TE = (2 / real * lse_T * real_T)[:, None] * softmax_forward(logits_TE)[0]
    return (lse_T**2 * real_T).sum() / real, RouterZCache(weight_TE.astype(logits_TE.dtype))


def router_z_backward(dloss: float, cache: RouterZCache) -> dict[str, np.ndarray]:
    """Cotangents of `router_z_forward`."""
    return {"logits": dloss * cache.weight_TE}


class Loss(NamedTuple):
    """forward: LossInputs → (value, cache); backward: (dloss, cache) → cotangents by name."""

    forward: Callable[[LossInputs], tuple[np.ndarray, Any]]
    backward: Callable[[float, Any], dict[str, np.ndarray]]


LOSSES: dict[str, Loss] = {
    "first_choice_balance": Loss(first_choice_balance_forward, balance_backward),
    "expert_balance": Loss(expert_balance_forward, balance_backward),
    "sequence_balance": Loss(sequence_balance_forward, balance_backward),
    "device_balance": Loss(device_balance_forward, balance_backward),
    "communication_balance": Loss(communication_balance_forward, balance_backward),
    "heterogeneous_balance": Loss(heterogeneous_balance_forward, balance_backward),
    "router_z": Loss(router_z_forward, router_z_backward),
    "importance": Loss(importance_forward, importance_backward),
    "smooth_load": Loss(smooth_load_forward, smooth_load_backward),
    "gate_l1": Loss(gate_l1_forward, gate_l1_backward),
}
"""What `BalanceConfig.losses` can name."""


def no_bias_update(correction_bias: np.ndarray, load_E: np.ndarray, rate: float) -> np.ndarray:
    """The bias as it is."""
    return correction_bias


def sign_bias_update(correction_bias: np.ndarray, load_E: np.ndarray, rate: float) -> np.ndarray:
    """DeepSeek-V3's controller (bias-sign): b_e ← b_e + γ sign(mean load − load_e), once per optimizer step.

    Shapes: bias [E] (fp32), load [E] over the whole batch, all ranks and all micro-batches → new bias [E], in the bias's dtype.
    Source: Wang et al. 2024, algorithm 1; DeepSeek-V3, §2.1.2.
    Deviates: torchtitan's is `centered_sign_bias_update`.
    """
    step_E = np.sign(load_E.mean() - load_E)
    return (correction_bias + rate * step_E).astype(correction_bias.dtype)


def centered_sign_bias_update(correction_bias: np.ndarray, load_E: np.ndarray, rate: float) -> np.ndarray:
    """torchtitan's controller (bias-centered-sign): b_e ← b_e + γ (sign_e − mean of the signs), so that Σ b stays what it was.

    A constant added to all biases changes no choice, but a bias that only grows loses digits. Shapes and dtype as `sign_bias_update`.
    Source: torchtitan, `components/optimizer`.
    """
    step_E = np.sign(load_E.mean() - load_E)
    return (correction_bias + rate * (step_E - step_E.mean())).astype(correction_bias.dtype)


def proportional_bias_update(correction_bias: np.ndarray, load_E: np.ndarray, rate: float) -> np.ndarray:
    """LongCat-Flash's controller (bias-proportional): b_e ← b_e + μ (1/E − load_e / Σ load); its steps shrink as the load evens out.

    Without any load the bias stays. Shapes and dtype as `sign_bias_update`.
    Source: LongCat-Flash technical report (Meituan 2025), §2.1.1, with K_e = K N / E, as published: 8 of 12 choices for 512 of 768 experts.
    Deviates: the report calls it a PID controller; the bias sums proportional steps, so it is the integral term of one.
    """
    step_E = 1 / len(load_E) - load_E / max(load_E.sum(), 1)
    return (correction_bias + rate * step_E * (load_E.sum() > 0)).astype(correction_bias.dtype)


BIAS_RULES: dict[str, Callable[[np.ndarray, np.ndarray, float], np.ndarray]] = {
    "none": no_bias_update,
    "sign": sign_bias_update,
    "centered_sign": centered_sign_bias_update,
    "proportional": proportional_bias_update,
}
"""What `BalanceConfig.bias_rule` can name: (correction bias [E], load [E], rate) → new bias [E]."""


def max_violation(load_E: np.ndarray) -> float:
    """How much the busiest expert exceeds the mean (max-violation): max_e load_e / mean − 1, at most E/K − 1; 0 even or without any load.

    Source: Wang et al. 2024, §4.1, eq. 4.
    """
    mean = load_E.mean()
    return float(load_E.max() / mean - 1) if mean > 0 else 0.0


def coefficient_of_variation(load_E: np.ndarray) -> float:
    """Population standard deviation over mean of the load (load-cv); 0 without any load. Source: Shazeer et al. 2017, §4."""
    mean = load_E.mean()
    return float(load_E.std() / mean) if mean > 0 else 0.0


def dead_experts(load_E: np.ndarray) -> int:
    """How many experts received no assignment at all."""
    return int((load_E == 0).sum())


def load_entropy(load_E: np.ndarray) -> float:
    """Entropy of the load as a share of its maximum log E (load-entropy), in [0, 1]; 1 at even load, where E = 1 and without any load."""
    share = load_E[load_E > 0] / max(load_E.sum(), 1)
    return float(-(share * np.log(share)).sum() / np.log(len(load_E))) if len(load_E) > 1 and len(share) else 1.0


def drop_rate_by_position(picked_TK: np.ndarray, keep_TK: np.ndarray, position_T: np.ndarray, bins: int) -> np.ndarray:
    """Share of assignments dropped, by the token's position in its sequence (drop-by-position): [bins], NaN where a bin is empty.

    Positions 0 … max are cut into `bins` equal ranges. Source: OpenMoE (Xue et al. 2024), §4.3, drop towards the end.
    """
    bin_T = position_T * bins // (position_T.max(initial=0) + 1)
    picked = np.bincount(bin_T, picked_TK.sum(1), bins)
    kept = np.bincount(bin_T, (keep_TK & picked_TK).sum(1), bins)
    return np.divide(picked - kept, picked, out=np.full(bins, np.nan), where=picked > 0)
