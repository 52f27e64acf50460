"""ST-MoE: GShard's gating made stable by the router z-loss, with a second expert that a gate above one fifth always gets.

Source: Zoph et al. 2022 (ST-MoE, arXiv 2202.08906), §3.3, eq. 5, §5 and §C; the gating in mesh-tensorflow.
Specific: the second expert is taken with probability min(1, g₂ / 0.2), g₂ its share of the two; capacity counts tokens, not
assignments, so a factor of 1.25 is half of GShard's; gated GELU experts.
"""

from __future__ import annotations

import numpy as np

from ..capacity import per_token
from ..config import MoEConfig
from ..experts import Params
from ..gating import top_k
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo
from ._mixture import first_come, mixture


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """Thresholded top-2: (y [T, D], {"first_choice_balance", "router_z"})."""
    experts = config.experts.count
    logits_TE, _ = logits_forward(x_TD, params["router.weight"])
    probability_TE, _ = softmax_forward(logits_TE)
    expert_TK = top_k(probability_TE, 2)
    gate_TK = np.take_along_axis(probability_TE, expert_TK, axis=1)
    gate_TK = gate_TK / gate_TK.sum(1, keepdims=True)
    wanted_TK = np.stack([np.ones(len(x_TD), bool), gate_TK[:, 1] / 0.2 > draws.uniform("second_choice", (len(x_TD),))], axis=1)
    slots_B = np.array([max(4, per_token(config.capacity.factor, 2, int(size), experts)) for size in info.real_per_group()], int)
    keep_TK = first_come(expert_TK, wanted_TK, slots_B[info.group_T], info)
    gate_TE = np.zeros((len(x_TD), experts))
    np.put_along_axis(gate_TE, expert_TK, np.where(keep_TK, gate_TK, 0), axis=1)
    y_TD = mixture(x_TD, gate_TE, params, "geglu")

    share_E = np.bincount(expert_TK[:, 0], minlength=experts) / max(len(x_TD), 1)
    mean_E = probability_TE.sum(0) / max(len(x_TD), 1)
    lse_T = np.logaddexp.reduce(logits_TE, axis=1)
    return y_TD, {
        "first_choice_balance": experts * float(share_E @ mean_E),
        "router_z": float((lse_T**2).sum() / max(len(x_TD), 1)),
    }
