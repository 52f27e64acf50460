"""Dropout inside the experts, in PyTorch; the equation and its source are those of `reference.expert_dropout`."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import ExpertsConfig
from ..expert_dropout import NAME
from .dispatch import Dispatch
from .tokens import Draws


def draw_dropout(expert_TK: Tensor, gate_TK: Tensor, config: ExpertsConfig, draws: Draws, *, training: bool) -> dict[str, Tensor]:
    """All draws of the pass; in training those of config.dropout among them: [T, K, F], in the gates' dtype."""
    if training and config.dropout:
        draws.uniform(NAME, torch.Size((*expert_TK.shape, config.width)), gate_TK)
    return draws.taken


def dropout_factors(drawn: Mapping[str, Tensor], dispatch: Dispatch, config: ExpertsConfig, dtype: torch.dtype) -> Tensor | None:
    """What the hidden layer of each row is multiplied by (expert-dropout): [N, F], or None where nothing was drawn."""
    if NAME not in drawn:
        return None
    return (drawn[NAME][dispatch.token_N, dispatch.slot_N] >= config.dropout).to(dtype) / (1 - config.dropout)
