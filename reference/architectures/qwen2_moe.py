"""Qwen2-MoE: fine-grained experts beside shared ones that each token turns up or down.

Source: Yang et al. 2024 (Qwen2, arXiv 2407.10671), §2.2.2; Qwen1.5-MoE is the same layer. The sigmoid is in the released code.
Specific: gates are the plain probabilities of the chosen experts, not divided by their sum; σ(w·x) weighs the shared experts.
Deviates: the loss is 1 at an even load; transformers' version, whose weight is published, is K there.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo
from ._mixture import indicator, mixture, shared


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = Σ_{i ∈ TopK} p_i E_i(x_t) + σ(w·x_t) FFN_shared(x_t), p = softmax: (y [T, D], {"expert_balance"})."""
    probability_TE, _ = softmax_forward(logits_forward(x_TD, params["router.weight"])[0])
    chosen_TE = indicator(probability_TE, config.gating.top_k)
    openness = 1 / (1 + np.exp(-x_TD @ params["shared.gate"].T))
    y_TD = mixture(x_TD, chosen_TE * probability_TE, params) + openness * shared(x_TD, params)

    tokens = max(len(x_TD), 1)
    share_E = chosen_TE.sum(0) / (config.gating.top_k * tokens)
    mean_E = probability_TE.sum(0) / tokens
    return y_TD, {"expert_balance": config.experts.count * float(share_E @ mean_E)}
