"""What keeps the load even, in PyTorch: auxiliary losses and the correction bias.

Equations and sources are those of `reference.balancing`. Counts are sums of integers and have no gradient; only the mean
probabilities and the logits have one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import require
from .gating import top_k
from .noise import Noisy, gate_l1_forward, importance_forward, smooth_load_forward
from .tokens import TokenInfo, count_per_group


class LossInputs(NamedTuple):
    """What a balance loss can see; picked_TK are the assignments before the drop, gate_TK their gates; noise: that of the logits."""

    logits_TE: Tensor
    scores_TE: Tensor
    probability_TE: Tensor
    expert_TK: Tensor
    picked_TK: Tensor
    tokens: TokenInfo
    gate_TK: Tensor | None = None
    noise: Noisy | None = None
    top_k: int = 1
    groups: int = 1
    top_groups: int = 1
    networks: int = 0
    network_share: float = 1.0


def count_load(expert_TK: Tensor, picked_TK: Tensor, experts: int) -> Tensor:
    """Assignments per expert, before any drop (load): [E] int64."""
    load_E = torch.zeros(experts, dtype=torch.int64, device=expert_TK.device)
    return load_E.index_add(0, expert_TK.flatten(), picked_TK.flatten().long())


def mean_probability(probability_TE: Tensor, tokens: TokenInfo) -> Tensor:
    """Mean score share of each expert over the real tokens (importance): [E]; 0 without real tokens."""
    real_TE = probability_TE.masked_fill(~tokens.real_T[:, None], 0)
    return tokens.total(real_TE.sum(0)) / tokens.total(tokens.real_T.sum()).clamp(min=1)


def _balance(count_BE: Tensor, size_B: Tensor, groups: Tensor | int, group_T: Tensor, inputs: LossInputs) -> Tensor:
    """Mean over `groups` groups with real tokens of E Σ_e f_e P_e, with f_e = count_e / Σ count, and P_e the group's mean probability."""
    probability_TE, experts = inputs.probability_TE, count_BE.shape[1]
    share_BE = count_BE.to(probability_TE.dtype) / count_BE.sum(1, keepdim=True).clamp(min=1)
    per_token_BE = experts * share_BE / (size_B.clamp(min=1) * groups)[:, None]
    return inputs.tokens.total((per_token_BE[group_T] * probability_TE).masked_fill(~inputs.tokens.real_T[:, None], 0).sum())


def _balance_of_all(expert_TK: Tensor, picked_TK: Tensor, inputs: LossInputs) -> Tensor:
    tokens = inputs.tokens
    count_E = tokens.total(count_load(expert_TK, picked_TK, inputs.probability_TE.shape[1]))
    return _balance(count_E[None], tokens.total(tokens.real_T.sum())[None], 1, torch.zeros_like(tokens.group_T), inputs)


def first_choice_balance_forward(inputs: LossInputs) -> Tensor:
    """GShard's and Switch's loss (loss-first-choice) over all tokens; 1 at even load."""
    return _balance_of_all(inputs.expert_TK[:, :1], inputs.picked_TK[:, :1], inputs)


def expert_balance_forward(inputs: LossInputs) -> Tensor:
    """DeepSeekMoE's expert-level loss (loss-expert) over all tokens; 1 at even load for every K."""
    return _balance_of_all(inputs.expert_TK, inputs.picked_TK, inputs)


def sequence_balance_forward(inputs: LossInputs) -> Tensor:
    """DeepSeek-V3's complementary loss (loss-sequence): the mean over groups; f counts the top-K of the scores without correction bias."""
    tokens, experts = inputs.tokens, inputs.scores_TE.shape[1]
    bucket_TK = tokens.group_T[:, None] * experts + top_k(inputs.scores_TE.detach(), inputs.top_k)
    count = count_load(bucket_TK, tokens.real_T[:, None].expand(bucket_TK.shape), tokens.groups * experts)
    size_B = count_per_group(tokens.group_T, tokens.real_T, tokens.groups)
    groups = tokens.total((size_B > 0).sum()).clamp(min=1)
    return _balance(count.reshape(tokens.groups, experts), size_B, groups, tokens.group_T, inputs)


def _weighted(frequency_E: Tensor, inputs: LossInputs) -> Tensor:
    """Σ_e f_e P_e over all real tokens, for given f."""
    return frequency_E.to(inputs.probability_TE.dtype) @ mean_probability(inputs.probability_TE, inputs.tokens)


def device_balance_forward(inputs: LossInputs) -> Tensor:
    """DeepSeekMoE's device-level loss (loss-device) over all tokens; 1 at even load."""
    experts = inputs.probability_TE.shape[1]
    count_E = inputs.tokens.total(count_load(inputs.expert_TK, inputs.picked_TK, experts)).double()
    mean_G = experts * count_E.view(inputs.groups, -1).mean(1) / count_E.sum().clamp(min=1)
    return _weighted(mean_G.repeat_interleave(experts // inputs.groups), inputs)


def communication_balance_forward(inputs: LossInputs) -> Tensor:
    """DeepSeek-V2's communication loss (loss-communication) over all tokens; 1 where every token reaches M groups evenly."""
    tokens, groups = inputs.tokens, inputs.groups
    members = inputs.probability_TE.shape[1] // groups
    sent_TG = torch.zeros(len(inputs.expert_TK), groups, dtype=torch.int64, device=inputs.expert_TK.device)
    sent_TG = sent_TG.scatter_reduce(1, inputs.expert_TK // members, inputs.picked_TK.long(), "amax")
    frequency_G = groups * tokens.total(sent_TG.sum(0)).double() / (inputs.top_groups * tokens.total(tokens.real_T.sum()).clamp(min=1))
    return _weighted(frequency_G.repeat_interleave(members), inputs)


def heterogeneous_balance_forward(inputs: LossInputs) -> Tensor:
    """MoE++'s loss (loss-heterogeneous) over all tokens; 1 where each network has τ times the load and score of each other expert."""
    experts, share = inputs.probability_TE.shape[1], inputs.network_share
    count_E = inputs.tokens.total(count_load(inputs.expert_TK, inputs.picked_TK, experts)).double()
    eta_E = torch.ones_like(count_E)
    eta_E[inputs.networks :] = share
    even = inputs.networks + (experts - inputs.networks) / share
    return _weighted(even * eta_E * count_E / count_E.sum().clamp(min=1), inputs)


def global_balance_forward(importance_E: Tensor, load_E: Tensor) -> Tensor:
    """The balance loss of one micro-batch against the load of the whole batch (loss-global).

    importance [E]: `aux.routing.importance` of the micro-batch, which carries the gradient; load [E]: summed over micro-batches and ranks.
    """
    require(load_E.shape == importance_E.shape, f"load has shape {tuple(load_E.shape)}, importance {tuple(importance_E.shape)}")
    return len(load_E) * (load_E.to(importance_E.dtype) @ importance_E) / load_E.sum().clamp(min=1)


def router_z_forward(inputs: LossInputs) -> Tensor:
    """ST-MoE's z-loss (loss-router-z): the mean over the real tokens of the squared logsumexp of the logits before correction bias."""
    real_T, total = inputs.tokens.real_T, inputs.tokens.total
    square_T = torch.logsumexp(inputs.logits_TE, 1).square()
    return total(square_T.masked_fill(~real_T, 0).sum()) / total(real_T.sum()).clamp(min=1)


LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {
    "first_choice_balance": first_choice_balance_forward,
    "expert_balance": expert_balance_forward,
    "sequence_balance": sequence_balance_forward,
    "device_balance": device_balance_forward,
    "communication_balance": communication_balance_forward,
    "heterogeneous_balance": heterogeneous_balance_forward,
    "router_z": router_z_forward,
    "importance": importance_forward,
    "smooth_load": smooth_load_forward,
    "gate_l1": gate_l1_forward,
}


def no_bias_update(correction_bias: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """The bias as it is."""
    return correction_bias


def sign_bias_update(correction_bias: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """DeepSeek-V3's controller (bias-sign): bias [E] fp32, load [E] over the whole batch → new bias [E], in the bias's dtype.

    Added in fp64 like the reference, so that both tracks hold the same bits after any number of steps.
    """
    step_E = torch.sign(load_E.sum() - len(load_E) * load_E).double()
    return (correction_bias + rate * step_E).to(correction_bias.dtype)


def centered_sign_bias_update(correction_bias: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """torchtitan's controller (bias-centered-sign), whose steps sum to 0. Shapes and dtypes as `sign_bias_update`."""
    step_E = torch.sign(load_E.sum() - len(load_E) * load_E).double()
    return (correction_bias + rate * (step_E - step_E.mean())).to(correction_bias.dtype)


def proportional_bias_update(correction_bias: Tensor, load_E: Tensor, rate: float) -> Tensor:
    """LongCat-Flash's controller (bias-proportional). Shapes and dtypes as `sign_bias_update`."""
    step_E = 1 / len(load_E) - load_E.double() / load_E.sum().clamp(min=1)
    return (correction_bias + rate * step_E * (load_E.sum() > 0)).to(correction_bias.dtype)


BIAS_RULES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    "none": no_bias_update,
    "sign": sign_bias_update,
    "centered_sign": centered_sign_bias_update,
    "proportional": proportional_bias_update,
}
