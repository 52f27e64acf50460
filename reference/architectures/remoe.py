"""ReMoE: the gate is a ReLU, so experts come and go continuously and nothing is chosen.

Source: Wang et al. 2024 (ReMoE, arXiv 2412.14711), §3.
Specific: a token has as many experts as have a positive logit; an L1 norm of the gates, dearer for busy experts, keeps their mean
number at K by a penalty that rises while it is above and falls while it is below (`update_penalty`, after each step).
Deviates: the paper averages the norm over all layers and steers one penalty; here both are the layer's own.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params
from ..scores import logits_forward
from ..tokens import Draws, TokenInfo
from ._mixture import mixture


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = Σ_i ReLU(x_t W_r)_i E_i(x_t): (y [T, D], {"gate_l1"})."""
    gate_TE = np.maximum(logits_forward(x_TD, params["router.weight"])[0], 0)
    tokens = max(len(x_TD), 1)
    frequency_E = config.experts.count / (config.gating.top_k * tokens) * (gate_TE > 0).sum(0)
    return mixture(x_TD, gate_TE, params), {"gate_l1": float(frequency_E @ gate_TE.sum(0) / tokens)}
