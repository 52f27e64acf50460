"""Dropout inside the experts: more of it than elsewhere, because an expert sees only its share of a small data set and overfits it.

The numbers are drawn with the routing, so that a replay drops the same ones and evaluation, which draws nothing, drops none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .config import ExpertsConfig
from .dispatch import DispatchCache
from .tokens import Draws

NAME = "expert_dropout"  # of its numbers among a routing's draws


def draw_dropout(expert_TK: np.ndarray, config: ExpertsConfig, draws: Draws, *, training: bool) -> dict[str, np.ndarray]:
    """All draws of the pass; in training those of config.dropout among them, one for each assignment and hidden unit: [T, K, F]."""
    if training and config.dropout:
        draws.uniform(NAME, (*expert_TK.shape, config.width))
    return draws.taken


def dropout_factors(drawn: Mapping[str, np.ndarray], dispatch: DispatchCache, config: ExpertsConfig, dtype: Any) -> np.ndarray | None:
    """What the hidden layer of each row is multiplied by (expert-dropout): 0 where u < p, else 1/(1 − p); None where nothing was drawn.

    Shapes: the draws u [T, K, F] → [N, F]. Gradient: the hidden layer's is multiplied by the same.
    Source: Fedus et al. 2021 (Switch Transformer), §2.4: p = 0.4 inside experts and 0.1 elsewhere, in fine-tuning.
    """
    if NAME not in drawn:
        return None
    kept_NF = np.asarray(drawn[NAME])[dispatch.token_N, dispatch.slot_N] >= config.dropout
    return (kept_NF / (1 - config.dropout)).astype(dtype)
