"""OLMoE: many small experts, gates as the softmax over all experts left them, no drop.

Source: Muennighoff et al. 2024 (OLMoE, arXiv 2409.02060), §2.
Specific: the gates of the chosen experts are not divided by their sum; two losses, the balance and ST-MoE's router z-loss.
Deviates: the balance loss is 1 at an even load, as in MegaBlocks, with which OLMoE was trained; transformers' version is K there.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo
from ._mixture import indicator, mixture


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = Σ_{i ∈ TopK(r(x_t))} r(x_t)_i E_i(x_t), r = softmax: (y [T, D], {"expert_balance", "router_z"})."""
    logits_TE, _ = logits_forward(x_TD, params["router.weight"])
    probability_TE, _ = softmax_forward(logits_TE)
    chosen_TE = indicator(probability_TE, config.gating.top_k)
    y_TD = mixture(x_TD, chosen_TE * probability_TE, params)

    tokens = max(len(x_TD), 1)
    share_E = chosen_TE.sum(0) / (config.gating.top_k * tokens)
    mean_E = probability_TE.sum(0) / tokens
    lse_T = np.logaddexp.reduce(logits_TE, axis=1)
    return y_TD, {
        "expert_balance": config.experts.count * float(share_E @ mean_E),
        "router_z": float((lse_T**2).sum() / tokens),
    }
