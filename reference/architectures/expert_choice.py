"""Expert choice: each expert takes its best tokens, so the load is even and a token has as many experts as want it.

Source: Zhou et al. 2022 (Expert Choice, arXiv 2202.09368), §3.2.
Specific: S = softmax over the experts; each row of its transpose keeps its C = S·c/E largest tokens, c the mean number of experts per
token; no balance loss. Not causal: whether a token is chosen depends on the later ones of its group.
"""

from __future__ import annotations

import numpy as np

from ..capacity import per_assignment
from ..config import MoEConfig
from ..experts import Params
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo
from ._mixture import mixture


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = Σ over the experts that took t of p_ti E_i(x_t): (y [T, D], no losses)."""
    experts = config.experts.count
    probability_TE, _ = softmax_forward(logits_forward(x_TD, params["router.weight"])[0])
    gate_TE = np.zeros_like(probability_TE)
    for group in np.unique(info.group_T):
        members = np.flatnonzero(info.group_T == group)
        capacity = per_assignment(config.capacity.factor, config.gating.top_k, len(members), experts)
        for e in range(experts):
            taken = members[np.argsort(-probability_TE[members, e], kind="stable")[:capacity]]
            gate_TE[taken, e] = probability_TE[taken, e]
    return mixture(x_TD, gate_TE, params, "gelu"), {}
