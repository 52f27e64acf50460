"""scores_TE → gate_TK in PyTorch; the equations and sources are those of `reference.gating`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..config import GatingConfig
from .scores import softmax_forward
from .tokens import Draws, at_least_fp32


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


def no_normalizer_forward(chosen_TK: Tensor, eps: float) -> Tensor:
    """The chosen scores as they are (gate-plain)."""
    return chosen_TK


def sum_normalizer_forward(chosen_TK: Tensor, eps: float) -> Tensor:
    """Gates that sum to 1 (gate-sum)."""
    return chosen_TK / (chosen_TK.sum(1, keepdim=True) + eps)


def softmax_normalizer_forward(chosen_TK: Tensor, eps: float) -> Tensor:
    """Softmax over the chosen logits (gate-softmax)."""
    return softmax_forward(chosen_TK)


class Normalizer(NamedTuple):
    """(chosen scores [T, K], eps) → gates [T, K]; absent: the score that takes part in nothing."""

    forward: Callable[[Tensor, float], Tensor]
    absent: float = 0.0


NORMALIZERS: dict[str, Normalizer] = {
    "none": Normalizer(no_normalizer_forward),
    "sum": Normalizer(sum_normalizer_forward),
    "softmax": Normalizer(softmax_normalizer_forward, -torch.inf),
}


def survivors(keep_TK: Tensor) -> Tensor:
    """Which slots are normalized over after a drop (survivors): the kept ones, and all of a token that kept none."""
    return keep_TK | ~keep_TK.any(1, keepdim=True)


def gates_forward(scores_TE: Tensor, expert_TK: Tensor, config: GatingConfig, present_TK: Tensor | None = None) -> Tensor:
    """The gates of given choices (gates): scores [T, E] without correction bias, expert [T, K] → gate [T, K], over the slots present."""
    normalizer = NORMALIZERS[config.normalize]
    chosen_TK = scores_TE.gather(1, expert_TK)
    if present_TK is not None:
        chosen_TK = chosen_TK.masked_fill(~present_TK, normalizer.absent)
    return normalizer.forward(chosen_TK, config.eps) * config.scale


def expert_scale_forward(gate_TK: Tensor, expert_TK: Tensor, scale: Tensor) -> Tensor:
    """A learned factor for each expert (expert-scale): gate, expert [T, K], scale [E] → gate [T, K]."""
    return gate_TK * at_least_fp32(scale)[expert_TK]


def always_second(gate_TK: Tensor, config: GatingConfig, draws: Draws) -> Tensor:
    """Every chosen expert is wanted: [T, K] → all True."""
    return torch.ones_like(gate_TK, dtype=torch.bool)


def random_second(gate_TK: Tensor, config: GatingConfig, draws: Draws) -> Tensor:
    """A random second expert, in training (random-second): gate [T, 2], normalized and scaled → wanted [T, 2] bool."""
    second_T = gate_TK[:, 1] / (config.second_threshold * config.scale) > draws.uniform("second_choice", gate_TK.shape[:1], gate_TK)
    return torch.stack([torch.ones_like(second_T), second_T], 1)


SECOND_CHOICES: dict[str, Callable[[Tensor, GatingConfig, Draws], Tensor]] = {"always": always_second, "random": random_second}
