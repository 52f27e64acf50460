"""DeepSeek-V3 and R1: sigmoid scores, and a bias that steers the choice without entering a gate.

Source: DeepSeek-AI 2024 (DeepSeek-V3, arXiv 2412.19437), §2.1.2, eq. 12–20; R1 is trained from it and has the same layer.
Specific: experts judged one by one instead of against each other; the bias evens the load (`update_bias`, after each step), so that
only a faint loss per sequence remains; a group is as good as its two best experts; gates are the chosen scores without their bias, times
the scale over their sum.
Deviates: the 1e-20 under the gates is transformers'; the released inference code has none, and computes logits in bf16.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params
from ..scores import logits_forward, sigmoid_forward
from ..tokens import Draws, TokenInfo
from ._mixture import indicator, mixture, shared


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = Σ shared FFN_i(u_t) + Σ routed g_it FFN_i(u_t): (y [T, D], {"sequence_balance"})."""
    experts, groups, top_k = config.experts.count, config.gating.groups, config.gating.top_k
    affinity_TE, _ = sigmoid_forward(logits_forward(x_TD, params["router.weight"])[0])
    biased_TE = affinity_TE + params["router.correction_bias"]

    best_TG = np.sort(biased_TE.reshape(-1, groups, experts // groups), axis=2)[:, :, -2:].sum(2)
    open_TE = np.repeat(indicator(best_TG, config.gating.top_groups), experts // groups, axis=1)
    chosen_TE = indicator(np.where(open_TE, biased_TE, -np.inf), top_k)
    kept_TE = np.where(chosen_TE, affinity_TE, 0)
    gate_TE = config.gating.scale * kept_TE / (kept_TE.sum(1, keepdims=True) + config.gating.eps)
    y_TD = shared(x_TD, params) + mixture(x_TD, gate_TE, params)

    losses = []
    for sequence in np.unique(info.group_T):
        affinity_SE = affinity_TE[info.group_T == sequence]
        frequency_E = experts / top_k * indicator(affinity_SE, top_k).mean(0)
        mean_E = (affinity_SE / affinity_SE.sum(1, keepdims=True)).mean(0)
        losses.append(float(frequency_E @ mean_E))
    return y_TD, {"sequence_balance": sum(losses) / max(len(losses), 1)}
