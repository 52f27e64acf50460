"""LongCat-Flash: a third of its experts hand the token back, so that tokens differ in how much is computed for them.

Source: LongCat Team 2025 (LongCat-Flash, arXiv 2509.01322), §2.1; the plain gates and their scale of 6: its released code.
Specific: a token's 12 choices fall on 8 networks on average, and anywhere between none and 12; a bias that moves in proportion to the
missing load, for the networks alone, holds that average (`update_bias`); gates are not divided by their sum.
Deviates: the report adds a faint loss per sequence over groups of experts, whose number and weight it does not print. Around the layer,
its mixture runs beside the dense FFN and the next attention, which hides the traffic of tokens.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo
from ._mixture import indicator, mixture


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = 6 Σ_{i ∈ TopK(p + b)} p_i E_i(x_t), E_i a network or the identity: (y [T, D], no losses)."""
    networks, scale = config.experts.networks, config.gating.scale
    probability_TE, _ = softmax_forward(logits_forward(x_TD, params["router.weight"])[0])
    chosen_TE = indicator(probability_TE + params["router.correction_bias"], config.gating.top_k)
    gate_TE = scale * chosen_TE * probability_TE
    return mixture(x_TD, gate_TE[:, :networks], params) + gate_TE[:, networks:].sum(1, keepdims=True) * x_TD, {}
