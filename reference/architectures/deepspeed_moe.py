"""DeepSpeed-MoE: GPT with one expert per token in every other layer, and PR-MoE, the same quality from fewer parameters.

Source: Rajbhandari et al. 2022 (DeepSpeed-MoE, arXiv 2201.05596), §3 and §4.1; DeepSpeed's code.
Specific: a full expert keeps a random choice of its tokens, so that late positions lose no more than early ones. PR-MoE: late layers have
twice the experts of early ones (the pyramid), and each token also passes a dense network (the residual), to be corrected by one expert
instead of choosing two.
Deviates: DeepSpeed draws in evaluation too. The paper adds both branches; the code weighs them by a softmax of the token, as here.
"""

from __future__ import annotations

import numpy as np

from ..capacity import per_assignment
from ..config import MoEConfig
from ..experts import FFN, Params, ffn_forward
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = p_ti E_i(x_t), i = argmax p_t, where E_i has room: (y [T, D], {"first_choice_balance"})."""
    experts, tokens = config.experts.count, len(x_TD)
    probability_TE, _ = softmax_forward(logits_forward(x_TD, params["router.weight"])[0])
    best_T = probability_TE.argmax(1)

    room = (per_assignment(config.capacity.factor, 1, int(size), experts) for size in info.real_per_group())
    slots_B = np.array([max(config.capacity.minimum, slots) for slots in room], int)
    lot_T = draws.uniform("order", (tokens,))
    rivals_TT = (best_T[:, None] == best_T) & (info.group_T[:, None] == info.group_T)
    served_T = (rivals_TT & (lot_T < lot_T[:, None])).sum(1)
    keep_T = served_T < slots_B[info.group_T]

    y_TD = np.zeros_like(x_TD)
    for e in range(experts):
        network = FFN(*(params[f"experts.{name}"][e] for name in ("up_proj", "down_proj", "up_proj_bias", "down_proj_bias")))
        gate_T = np.where((best_T == e) & keep_T, probability_TE[:, e], 0)
        y_TD += gate_T[:, None] * ffn_forward(x_TD, network, "gelu")[0]

    share_E = np.bincount(best_T, minlength=experts) / max(tokens, 1)
    mean_E = probability_TE.sum(0) / max(tokens, 1)
    return y_TD, {"first_choice_balance": experts * float(share_E @ mean_E)}


def forward_residual(
    x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws
) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = c_0 p_ti E_i(x_t) + c_1 MLP(x_t), c = softmax(W x_t + b): (y [T, D], {"first_choice_balance"})."""
    routed_TD, losses = forward(x_TD, params, config, info, draws)
    fixed = FFN(*(params[f"shared.{name}"] for name in ("up_proj", "down_proj", "up_proj_bias", "down_proj_bias")))
    share_T2, _ = softmax_forward(x_TD @ params["shared.gate"].T + params["shared.gate_bias"])
    return share_T2[:, :1] * routed_TD + share_T2[:, 1:] * ffn_forward(x_TD, fixed, "gelu")[0], losses
