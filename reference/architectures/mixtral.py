"""Mixtral: two of eight large experts, their gates a softmax over the two logits.

Source: Jiang et al. 2024 (Mixtral of Experts, arXiv 2401.04088), §2.1.
Specific: TopK keeps two logits and sets the others to −∞ before the softmax, which equals softmax, top-2, divided by their sum.
Deviates: the paper states no balance loss; the released configuration carries a weight for one over all K choices, here normalized
to be 1 at an even load (transformers' version of it is K at an even load).
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo
from ._mixture import indicator, mixture


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = Σ_i Softmax(TopK(x_t W_g))_i SwiGLU_i(x_t): (y [T, D], {"expert_balance"})."""
    logits_TE, _ = logits_forward(x_TD, params["router.weight"])
    chosen_TE = indicator(logits_TE, config.gating.top_k)
    gate_TE, _ = softmax_forward(np.where(chosen_TE, logits_TE, -np.inf))
    y_TD = mixture(x_TD, gate_TE, params)

    tokens = max(len(x_TD), 1)
    frequency_E = config.experts.count / (config.gating.top_k * tokens) * chosen_TE.sum(0)
    mean_E = softmax_forward(logits_TE)[0].sum(0) / tokens
    return y_TD, {"expert_balance": float(frequency_E @ mean_E)}
