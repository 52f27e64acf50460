"""No mixture at all: the feed-forward network that every other recipe replaces.

Source: Shazeer 2020 (GLU variants); Jiang et al. 2023 (Mistral 7B), Table 1.
Specific: one expert, so there is nothing to choose. As a layer with E = K = 1 its gate is softmax of one logit, which is 1.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params, ffn_forward
from ..tokens import Draws, TokenInfo
from ._mixture import expert


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = W_down (silu(W_gate x_t) ⊙ W_up x_t): (y [T, D], no losses)."""
    return ffn_forward(x_TD, expert(params, 0), "swiglu")[0], {}
