"""scores_TE → expert_TK, gate_TK in PyTorch; the equations and sources are those of `reference.gating`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..config import GatingConfig
from .scores import softmax_forward
from .tokens import Draws, TokenInfo


def top_k(value_TE: Tensor, count: int) -> Tensor:
    """Ids of the `count` highest values of each row, best first, ties to the lowest id (top-k): [T, E] → [T, count] int64.

    A stable sort, since `torch.topk` promises no order among ties.
    """
    return torch.sort(value_TE, dim=1, descending=True, stable=True).indices[:, :count]


def group_max(choice_TGI: Tensor) -> Tensor:
    """A group is as good as its best expert (group-max): [T, G, E/G] → [T, G]."""
    return choice_TGI.amax(2)


def group_top2_sum(choice_TGI: Tensor) -> Tensor:
    """A group is as good as its two best experts together (group-top2-sum): [T, G, E/G] → [T, G]."""
    return choice_TGI.topk(min(2, choice_TGI.shape[2]), dim=2).values.sum(2)


GROUP_SCORES: dict[str, Callable[[Tensor], Tensor]] = {"max": group_max, "top2_sum": group_top2_sum}


def limit_to_groups(choice_TE: Tensor, config: GatingConfig) -> Tensor:
    """−∞ outside each token's best `top_groups` groups (group-limit): [T, E] → [T, E]."""
    if config.top_groups == config.groups:
        return choice_TE
    tokens, experts = choice_TE.shape
    choice_TGI = choice_TE.reshape(tokens, config.groups, experts // config.groups)
    score_TG = GROUP_SCORES[config.group_score](choice_TGI)
    closed_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter(1, top_k(score_TG, config.top_groups), False)
    return choice_TGI.masked_fill(closed_TG[:, :, None], -torch.inf).reshape(tokens, experts)


def choose_top_k(choice_TE: Tensor, config: GatingConfig, tokens: TokenInfo) -> tuple[Tensor, Tensor]:
    """Every real token takes its K best experts: [T, E] → (expert [T, K], picked [T, K] bool, False for padding)."""
    expert_TK = top_k(choice_TE, config.top_k)
    return expert_TK, tokens.real_T[:, None].expand(expert_TK.shape)


CHOICES: dict[str, Callable[[Tensor, GatingConfig, TokenInfo], tuple[Tensor, Tensor]]] = {"top_k": choose_top_k}


def choose(scores_TE: Tensor, correction_bias: Tensor | None, config: GatingConfig, tokens: TokenInfo) -> tuple[Tensor, Tensor]:
    """The discrete half of a router (choice): top-k of scores + correction bias inside the best groups.

    Shapes: scores [T, E], correction_bias [E] or None → expert [T, K] int64, picked [T, K] bool. Gradient: none.
    """
    choice_TE = scores_TE if correction_bias is None else scores_TE + correction_bias
    return CHOICES[config.choice](limit_to_groups(choice_TE, config), config, tokens)


def no_normalizer_forward(chosen_TK: Tensor, eps: float) -> Tensor:
    """The chosen scores as they are (gate-plain)."""
    return chosen_TK


def sum_normalizer_forward(chosen_TK: Tensor, eps: float) -> Tensor:
    """Gates that sum to 1 (gate-sum)."""
    return chosen_TK / (chosen_TK.sum(1, keepdim=True) + eps)


def softmax_normalizer_forward(chosen_TK: Tensor, eps: float) -> Tensor:
    """Softmax over the chosen logits (gate-softmax)."""
    return softmax_forward(chosen_TK)


NORMALIZERS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "none": no_normalizer_forward,
    "sum": sum_normalizer_forward,
    "softmax": softmax_normalizer_forward,
}


def gates_forward(scores_TE: Tensor, expert_TK: Tensor, config: GatingConfig) -> Tensor:
    """The gates of given choices (gates): scores [T, E] without correction bias, expert [T, K] → gate [T, K]."""
    return NORMALIZERS[config.normalize](scores_TE.gather(1, expert_TK), config.eps) * config.scale


def always_second(gate_TK: Tensor, draws: Draws) -> Tensor:
    """Every chosen expert is wanted: [T, K] → all True."""
    return torch.ones_like(gate_TK, dtype=torch.bool)


def random_second(gate_TK: Tensor, draws: Draws) -> Tensor:
    """GShard's random second expert, in training (random-second): gate [T, 2], normalized → wanted [T, 2] bool."""
    second_T = 2 * gate_TK[:, 1] > draws.uniform("second_choice", gate_TK.shape[:1], gate_TK)
    return torch.stack([torch.ones_like(second_T), second_T], 1)


SECOND_CHOICES: dict[str, Callable[[Tensor, Draws], Tensor]] = {"always": always_second, "random": random_second}
