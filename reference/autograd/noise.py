"""Shazeer's noisy top-k and its losses in PyTorch; the equations and sources are those of `reference.noise`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from ..noise import FLOOR
from .tokens import Draws, TokenInfo, at_least_fp32

if TYPE_CHECKING:
    from .balancing import LossInputs


class Noisy(NamedTuple):
    """Logits with their noise: clean_TE + standard normal ⊙ deviation_TE; deviation_TE is None where nothing was drawn."""

    noisy_TE: Tensor
    deviation_TE: Any


def standard_normal(draws: Draws, name: str, like_TE: Tensor) -> Tensor:
    """Numbers from N(0, 1) of the shape and dtype of `like`, from two uniform ones each (box-muller)."""
    pairs = draws.uniform(name, torch.Size((*like_TE.shape, 2)), like_TE)
    return (torch.sqrt(-2 * torch.log1p(-pairs[..., 0])) * torch.cos(2 * math.pi * pairs[..., 1])).to(like_TE.dtype)


def no_logit_noise_forward(logits_TE: Tensor, x_TD: Tensor, weight: Tensor | None, draws: Draws) -> Noisy:
    """The logits as they are."""
    return Noisy(logits_TE, None)


def learned_noise_forward(logits_TE: Tensor, x_TD: Tensor, weight: Tensor, draws: Draws) -> Noisy:
    """Noise whose size each token learns per expert (noisy-logits): logits [T, E], x [T, D], weight [E, D]."""
    raw_TE = nn.functional.linear(at_least_fp32(x_TD), at_least_fp32(weight))
    deviation_TE = torch.logaddexp(raw_TE, raw_TE.new_zeros(())) + FLOOR
    return Noisy(logits_TE + standard_normal(draws, "logit_noise", logits_TE) * deviation_TE, deviation_TE)


LOGIT_NOISE: dict[str, Callable[..., Noisy]] = {"none": no_logit_noise_forward, "learned": learned_noise_forward}


def squared_variation(amount_E: Tensor) -> Tensor:
    """CV² of an amount per expert (cv-squared): population variance / (mean² + 1e-10)."""
    return amount_E.var(correction=0) / (amount_E.mean() ** 2 + 1e-10)


def importance_forward(inputs: LossInputs) -> Tensor:
    """Shazeer's importance loss (loss-importance): CV² of each expert's sum of gates before any drop."""
    gate_TK, experts = inputs.gate_TK.masked_fill(~inputs.picked_TK, 0), inputs.probability_TE.shape[1]
    total_E = gate_TK.new_zeros(experts).index_add(0, inputs.expert_TK.flatten(), gate_TK.flatten())
    return squared_variation(inputs.tokens.total(total_E))


def smooth_load(clean_TE: Tensor, noise: Noisy, top_k: int, tokens: TokenInfo) -> Tensor:
    """How many tokens each expert would get if its noise alone were drawn anew (smooth-load): [T, E] → [E], of this rank's tokens."""
    best_TE = torch.sort(noise.noisy_TE, dim=1, descending=True, stable=True).values
    kth, following = best_TE[:, [top_k - 1]], best_TE[:, [top_k]]
    distance_TE = (clean_TE - torch.where(noise.noisy_TE > following, following, kth)) / noise.deviation_TE
    return (0.5 * (1 + torch.erf(distance_TE / math.sqrt(2)))).masked_fill(~tokens.real_T[:, None], 0).sum(0)


def smooth_load_forward(inputs: LossInputs) -> Tensor:
    """Shazeer's load loss (loss-smooth-load): CV² of the smooth load; of the load itself where nothing was drawn or K = E."""
    noise, experts = inputs.noise, inputs.probability_TE.shape[1]
    if noise is None or noise.deviation_TE is None or inputs.top_k == experts:
        picked_N = inputs.picked_TK.flatten().to(inputs.probability_TE.dtype)
        load_E = picked_N.new_zeros(experts).index_add(0, inputs.expert_TK.flatten(), picked_N)
    else:
        load_E = smooth_load(inputs.logits_TE, noise, inputs.top_k, inputs.tokens)
    return squared_variation(inputs.tokens.total(load_E))


def gate_l1_forward(inputs: LossInputs) -> Tensor:
    """ReMoE's L1 norm of the gates, dearer for busy experts (loss-gate-l1)."""
    scores_TE, tokens = inputs.scores_TE, inputs.tokens
    experts, picked_N = scores_TE.shape[1], inputs.picked_TK.flatten().to(scores_TE.dtype)
    load_E = tokens.total(picked_N.new_zeros(experts).index_add(0, inputs.expert_TK.flatten(), picked_N))
    real = tokens.total(tokens.real_T.sum()).clamp(min=1)
    total_E = tokens.total(scores_TE.masked_fill(~tokens.real_T[:, None], 0).sum(0))
    return (experts * load_E / (inputs.top_k * real**2) * total_E).sum()
