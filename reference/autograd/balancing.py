"""What keeps the load even, in PyTorch: auxiliary losses and the correction bias.

Equations and sources are those of `reference.balancing`. Counts are sums of integers and have no gradient; only the mean
probabilities and the logits have one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .gating import top_k
from .tokens import TokenInfo, count_per_group


class LossInputs(NamedTuple):
    """What a balance loss can see; picked_TK are the assignments before the drop."""

    logits_TE: Tensor
    scores_TE: Tensor
    probability_TE: Tensor
    expert_TK: Tensor
    picked_TK: Tensor
    tokens: TokenInfo


def count_load(expert_TK: Tensor, picked_TK: Tensor, experts: int) -> Tensor:
    """Assignments per expert, before any drop (load): [E] int64."""
    load_E = torch.zeros(experts, dtype=torch.int64, device=expert_TK.device)
    return load_E.index_add(0, expert_TK.flatten(), picked_TK.flatten().long())


def mean_probability(probability_TE: Tensor, tokens: TokenInfo) -> Tensor:
    """Mean score share of each expert over the real tokens (importance): [E]; 0 without real tokens."""
    real_TE = probability_TE.masked_fill(~tokens.real_T[:, None], 0)
    return real_TE.sum(0) / tokens.real_T.sum().clamp(min=1)


def _balance(count_BE: Tensor, group_T: Tensor, inputs: LossInputs) -> Tensor:
    """Mean over the groups that have real tokens of E Σ_e f_e P_e, with f_e = count_e / Σ count, and P_e the group's mean probability."""
    probability_TE, real_T = inputs.probability_TE, inputs.tokens.real_T
    groups, experts = count_BE.shape
    size_B = count_per_group(group_T, real_T, groups)
    share_BE = count_BE.to(probability_TE.dtype) / count_BE.sum(1, keepdim=True).clamp(min=1)
    per_token_BE = experts * share_BE / (size_B.clamp(min=1) * (size_B > 0).sum().clamp(min=1))[:, None]
    return (per_token_BE[group_T] * probability_TE).masked_fill(~real_T[:, None], 0).sum()


def _balance_of_all(expert_TK: Tensor, picked_TK: Tensor, inputs: LossInputs) -> Tensor:
    count_E = count_load(expert_TK, picked_TK, inputs.probability_TE.shape[1])
    return _balance(count_E[None], torch.zeros_like(inputs.tokens.group_T), inputs)


def first_choice_balance_forward(inputs: LossInputs) -> Tensor:
    """GShard's and Switch's loss (loss-first-choice) over all tokens; 1 at even load."""
    return _balance_of_all(inputs.expert_TK[:, :1], inputs.picked_TK[:, :1], inputs)


def expert_balance_forward(inputs: LossInputs) -> Tensor:
    """DeepSeekMoE's expert-level loss (loss-expert) over all tokens; 1 at even load for every K."""
    return _balance_of_all(inputs.expert_TK, inputs.picked_TK, inputs)


def sequence_balance_forward(inputs: LossInputs) -> Tensor:
    """DeepSeek-V3's complementary loss (loss-sequence): the mean over groups; f counts the top-K of the scores without correction bias."""
    tokens, slots, experts = inputs.tokens, inputs.expert_TK.shape[1], inputs.scores_TE.shape[1]
    bucket_TK = tokens.group_T[:, None] * experts + top_k(inputs.scores_TE.detach(), slots)
    count = count_load(bucket_TK, tokens.real_T[:, None].expand(bucket_TK.shape), tokens.groups * experts)
    return _balance(count.reshape(tokens.groups, experts), tokens.group_T, inputs)


def router_z_forward(inputs: LossInputs) -> Tensor:
    """ST-MoE's z-loss (loss-router-z): the mean over the real tokens of the squared logsumexp of the logits before correction bias."""
    real_T = inputs.tokens.real_T
    square_T = torch.logsumexp(inputs.logits_TE, 1).square()
    return square_T.masked_fill(~real_T, 0).sum() / real_T.sum().clamp(min=1)


LOSSES: dict[str, Callable[[LossInputs], Tensor]] = {
    "first_choice_balance": first_choice_balance_forward,
    "expert_balance": expert_balance_forward,
    "sequence_balance": sequence_balance_forward,
    "router_z": router_z_forward,
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


BIAS_RULES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {"none": no_bias_update, "sign": sign_bias_update}
