"""MoE++: beside its networks stand experts that discard a token, copy it, or mix it with a learned vector.

Source: Jin et al. 2024 (MoE++, arXiv 2410.07348), §3, eq. 1 and 3 to 8.
Specific: easy tokens can choose what costs nothing, so K = 2 means at most two networks; τ sets how much less load and capacity a network
gets than one of the others, and so the cost; the others are small enough to live on every device. A router also reads the logits of the
layer before it, its gating residual (eq. 6).
Deviates: eq. 8 counts tokens where K choices of each need a slot; its T is read as K S. The loss is 1 at its balance. The released code,
which can only evaluate, sets a zero expert's gate to 0 before it divides both gates by their sum, and doubles what experts read; its router
has two layers with a tanh between them unless its configuration forbids it. None of this is in the paper.
"""

from __future__ import annotations

from fractions import Fraction

import numpy as np

from ..capacity import per_assignment
from ..config import MoEConfig
from ..experts import Params
from ..gating import top_k
from ..scores import softmax_forward
from ..tokens import Draws, TokenInfo
from ._mixture import first_come, mixture


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = Σ_i g_ti E_i(x_t), g the softmax of the best two: (y [T, D], {"heterogeneous_balance"})."""
    experts, networks, share = config.experts.count, config.experts.networks, config.experts.network_share
    logits_TE = x_TD @ params["router.weight"].T + info.previous_TE @ params["router.residual_weight"].T
    probability_TE, _ = softmax_forward(logits_TE)
    expert_TK = top_k(probability_TE, 2)

    parts, wanted_TK = Fraction(str(share)) * networks + experts - networks, np.ones(expert_TK.shape, bool)
    sizes, factor = info.real_per_group(), config.capacity.factor
    network_B = np.array([per_assignment(factor, 2, int(size), parts / Fraction(str(share))) for size in sizes], int)
    other_B = np.array([per_assignment(factor, 2, int(size), parts) for size in sizes], int)
    in_networks_TK = first_come(expert_TK, wanted_TK, network_B[info.group_T], info)
    in_others_TK = first_come(expert_TK, wanted_TK, other_B[info.group_T], info)
    keep_TK = np.where(expert_TK < networks, in_networks_TK, in_others_TK)

    gate_TE = np.zeros((len(x_TD), experts))
    np.put_along_axis(gate_TE, expert_TK, np.where(keep_TK, np.take_along_axis(probability_TE, expert_TK, axis=1), 0), axis=1)
    y_TD = mixture(x_TD, gate_TE[:, :networks], params)
    for number, constant in enumerate(params["experts.constant"]):
        share_T2, _ = softmax_forward(x_TD @ params["experts.constant_gate"][number].T)
        y_TD = y_TD + gate_TE[:, [networks + number]] * (share_T2[:, :1] * x_TD + share_T2[:, 1:] * constant)
    y_TD = y_TD + gate_TE[:, [-2]] * x_TD + gate_TE[:, [-1]] * np.zeros_like(x_TD)

    eta_E = np.where(np.arange(experts) < networks, 1.0, share)
    share_E = np.bincount(expert_TK.ravel(), minlength=experts) / max(2 * len(x_TD), 1)
    mean_E = probability_TE.sum(0) / max(len(x_TD), 1)
    return y_TD, {"heterogeneous_balance": (networks + (experts - networks) / share) * float(eta_E * share_E @ mean_E)}
