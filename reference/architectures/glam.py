"""GLaM: GShard's top-2 gating in a decoder, with GELU experts in every other layer.

Source: Du et al. 2021 (GLaM, arXiv 2112.06905); the gating is that of Lepikhin et al. 2020 (GShard), algorithm 1.
Specific: a token's two experts are weighted by their share of the two probabilities; experts are plain FFNs, dense layers gated ones.
Deviates: the paper prints neither capacity factor nor loss weight; those of GShard are taken.
"""

from __future__ import annotations

import numpy as np

from ..capacity import per_assignment
from ..config import MoEConfig
from ..experts import Params
from ..gating import top_k
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo
from ._mixture import first_come, mixture


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """GShard's gating, one sum over the experts: (y [T, D], {"first_choice_balance"})."""
    experts = config.experts.count
    probability_TE, _ = softmax_forward(logits_forward(x_TD, params["router.weight"])[0])
    expert_TK = top_k(probability_TE, 2)
    gate_TK = np.take_along_axis(probability_TE, expert_TK, axis=1)
    gate_TK = gate_TK / gate_TK.sum(1, keepdims=True)
    wanted_TK = np.stack([np.ones(len(x_TD), bool), 2 * gate_TK[:, 1] > draws.uniform("second_choice", (len(x_TD),))], axis=1)
    slots_B = np.array([per_assignment(config.capacity.factor, 2, int(size), experts) for size in info.real_per_group()], int)
    keep_TK = first_come(expert_TK, wanted_TK, slots_B[info.group_T], info)
    gate_TE = np.zeros((len(x_TD), experts))
    np.put_along_axis(gate_TE, expert_TK, np.where(keep_TK, gate_TK, 0), axis=1)
    y_TD = mixture(x_TD, gate_TE, params, "gelu")

    share_E = np.bincount(expert_TK[:, 0], minlength=experts) / max(len(x_TD), 1)
    mean_E = probability_TE.sum(0) / max(len(x_TD), 1)
    return y_TD, {"first_choice_balance": experts * float(share_E @ mean_E)}
