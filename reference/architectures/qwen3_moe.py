"""Qwen3-MoE: fine-grained experts without a shared one, gates that sum to 1.

Source: Yang et al. 2025 (Qwen3, arXiv 2505.09388), §2; the loss: Qiu et al. 2025 (arXiv 2501.11873).
Specific: softmax over all experts, top-8, divided by their sum; the frequencies of the loss are counted over the global batch.
Deviates: transformers' configuration class does not normalize unless `norm_topk_prob` is set; the published configurations set it.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo
from ._mixture import indicator, mixture


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = Σ_{i ∈ TopK} p_i / (Σ_{j ∈ TopK} p_j) E_i(x_t), p = softmax: (y [T, D], {"expert_balance"})."""
    probability_TE, _ = softmax_forward(logits_forward(x_TD, params["router.weight"])[0])
    chosen_TE = indicator(probability_TE, config.gating.top_k)
    kept_TE = chosen_TE * probability_TE
    y_TD = mixture(x_TD, kept_TE / kept_TE.sum(1, keepdims=True), params)

    tokens = max(len(x_TD), 1)
    share_E = chosen_TE.sum(0) / (config.gating.top_k * tokens)
    mean_E = probability_TE.sum(0) / tokens
    return y_TD, {"expert_balance": config.experts.count * float(share_E @ mean_E)}
