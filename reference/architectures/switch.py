"""Switch Transformer: one expert per token, weighted by its plain probability.

Source: Fedus, Zoph & Shazeer 2021 (Switch Transformer, arXiv 2101.03961), §2.1 and §2.2, eq. 1–6; the jitter is in its appendix.
Specific: the gate is not normalized (it would always be 1, and the router would learn nothing); noise reaches the router's copy of the
input only; an expert holds ⌈factor · S/E⌉ tokens of a group, who comes first is served, the others pass by in the residual stream.
"""

from __future__ import annotations

import numpy as np

from ..capacity import per_token
from ..config import MoEConfig
from ..experts import FFN, Params, ffn_forward, first_matrix
from ..scores import jitter, logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = p_i(x_t) E_i(x_t), E_i an FFN with ReLU (XXL: GEGLU), i = argmax p(x_t): (y [T, D], {"first_choice_balance"})."""
    experts, activation, y_TD = config.experts.count, config.experts.activation, np.zeros_like(x_TD)
    up = params[f"experts.{first_matrix(config.experts)}"]
    noisy_TD, _ = jitter(x_TD, config.scores.noise_scale, draws)
    probability_TE, _ = softmax_forward(logits_forward(noisy_TD, params["router.weight"])[0])
    expert_T = probability_TE.argmax(1)

    for group in np.unique(info.group_T):
        capacity = per_token(config.capacity.factor, 1, int((info.group_T == group).sum()), experts)
        for e in range(experts):
            ffn = FFN(up[e], params["experts.down_proj"][e], None, None)
            served = np.flatnonzero((info.group_T == group) & (expert_T == e))[:capacity]
            y_TD[served] = probability_TE[served, e, None] * ffn_forward(x_TD[served], ffn, activation)[0]

    share_E = np.bincount(expert_T, minlength=experts) / max(len(x_TD), 1)
    mean_E = probability_TE.sum(0) / max(len(x_TD), 1)
    return y_TD, {"first_choice_balance": experts * float(share_E @ mean_E)}
