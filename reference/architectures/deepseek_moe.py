"""DeepSeekMoE: finely segmented experts beside shared ones.

Source: Dai et al. 2024 (DeepSeekMoE, arXiv 2401.06066), §3.2 and §3.3, eq. 9–17. DeepSeek-V2-Lite routes in the same way.
Specific: the scores are a softmax over the routed experts alone, and are not divided by the sum of the chosen; shared experts have no
gate; N′ and K′ count routed experts only.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo
from ._mixture import indicator, mixture, shared


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = Σ shared FFN_i(u_t) + Σ routed g_it FFN_i(u_t): (y [T, D], {"expert_balance"})."""
    affinity_TE, _ = softmax_forward(logits_forward(x_TD, params["router.weight"])[0])
    chosen_TE = indicator(affinity_TE, config.gating.top_k)
    gate_TE = np.where(chosen_TE, affinity_TE, 0)
    y_TD = shared(x_TD, params) + mixture(x_TD, gate_TE, params)

    tokens = max(len(x_TD), 1)
    frequency_E = config.experts.count / (config.gating.top_k * tokens) * chosen_TE.sum(0)
    mean_E = affinity_TE.sum(0) / tokens
    return y_TD, {"expert_balance": float(frequency_E @ mean_E)}


def forward_on_devices(
    x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws
) -> tuple[np.ndarray, dict[str, float]]:
    """The same layer at 145B, whose experts lie on devices (the groups): (y [T, D], {"expert_balance", "device_balance"})."""
    y_TD, losses = forward(x_TD, params, config, info, draws)
    affinity_TE, _ = softmax_forward(logits_forward(x_TD, params["router.weight"])[0])
    tokens, on_device = max(len(x_TD), 1), (config.gating.groups, -1)
    frequency_E = config.experts.count / (config.gating.top_k * tokens) * indicator(affinity_TE, config.gating.top_k).sum(0)
    mean_E = affinity_TE.sum(0) / tokens
    return y_TD, losses | {"device_balance": float(frequency_E.reshape(on_device).mean(1) @ mean_E.reshape(on_device).sum(1))}
