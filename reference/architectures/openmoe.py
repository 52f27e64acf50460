"""OpenMoE: top-2 with plain probabilities, drops by position, and a dense FFN beside every mixture.

Source: Xue et al. 2024 (OpenMoE, arXiv 2402.01739), §2.2.
Specific: who comes late in a sequence is dropped more often, which the paper measures; the dense FFN serves the dropped too.
Deviates: the dense FFN has a norm of its own in OpenMoE; here it is the shared expert and reads what the router reads. The paper's balance
loss counts both choices and is 2 at an even load; this one is 1, and its weight twice the paper's.
"""

from __future__ import annotations

import numpy as np

from ..capacity import per_token
from ..config import MoEConfig
from ..experts import Params
from ..gating import top_k
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo
from ._mixture import first_come, mixture, shared


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = FFN(x_t) + Σ_i p_ti E_i(x_t): (y [T, D], {"expert_balance", "router_z"})."""
    experts = config.experts.count
    logits_TE, _ = logits_forward(x_TD, params["router.weight"])
    probability_TE, _ = softmax_forward(logits_TE)
    expert_TK = top_k(probability_TE, 2)
    gate_TK = np.take_along_axis(probability_TE, expert_TK, axis=1)
    slots_B = np.array([max(4, per_token(config.capacity.factor, 2, int(size), experts)) for size in info.real_per_group()], int)
    keep_TK = first_come(expert_TK, np.ones(expert_TK.shape, bool), slots_B[info.group_T], info)
    gate_TE = np.zeros((len(x_TD), experts))
    np.put_along_axis(gate_TE, expert_TK, np.where(keep_TK, gate_TK, 0), axis=1)
    y_TD = shared(x_TD, params) + mixture(x_TD, gate_TE, params, "swiglu")

    share_E = np.bincount(expert_TK.ravel(), minlength=experts) / max(2 * len(x_TD), 1)
    mean_E = probability_TE.sum(0) / max(len(x_TD), 1)
    lse_T = np.logaddexp.reduce(logits_TE, axis=1)
    return y_TD, {
        "expert_balance": experts * float(share_E @ mean_E),
        "router_z": float((lse_T**2).sum() / max(len(x_TD), 1)),
    }
