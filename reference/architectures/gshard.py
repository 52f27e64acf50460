"""GShard: top-2 with a random second expert, a capacity per group, and dispatch as an einsum.

Source: Lepikhin et al. 2020 (GShard, arXiv 2006.16668), algorithms 1 and 2.
Specific: gates are normalized before anything is dropped; all first choices find their slots before the first second choice does; the
second expert is taken with probability min(1, 2·g₂); overflow goes to the residual stream.
Deviates: in algorithm 1 a second choice that the draw rejects still uses up a slot; lingvo and mesh-tensorflow free it, and so does
this. The loss is E Σ f P, as in code, but over all groups at once where code has one per group; the paper's is E² times smaller.
"""

from __future__ import annotations

import numpy as np

from ..capacity import per_assignment
from ..config import MoEConfig
from ..dispatch import one_hot_combine, one_hot_dispatch, one_hot_slots
from ..experts import FFN, Params, ffn_forward
from ..gating import top_k
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """Algorithms 1 and 2 in their order: (y [T, D], {"first_choice_balance"})."""
    experts, y_TD = config.experts.count, np.zeros_like(x_TD)
    gates_TE, _ = softmax_forward(logits_forward(x_TD, params["router.weight"])[0])
    expert_TK = top_k(gates_TE, 2)
    gate_TK = np.take_along_axis(gates_TE, expert_TK, axis=1)
    gate_TK = gate_TK / gate_TK.sum(1, keepdims=True)
    random_T = draws.uniform("second_choice", (len(x_TD),))
    keep_TK = np.zeros(expert_TK.shape, bool)

    for group in np.unique(info.group_T):
        members = np.flatnonzero(info.group_T == group)
        capacity = per_assignment(config.capacity.factor, 2, len(members), experts)
        count_E = np.zeros(experts, int)
        for t in members:
            first = expert_TK[t, 0]
            keep_TK[t, 0] = count_E[first] < capacity
            count_E[first] += 1
        for t in members:
            second, wanted = expert_TK[t, 1], 2 * gate_TK[t, 1] > random_T[t]
            keep_TK[t, 1] = wanted and count_E[second] < capacity
            count_E[second] += wanted

        slot_SKEC = one_hot_slots(expert_TK[members], keep_TK[members], experts, capacity)
        rows_ECD = one_hot_dispatch(x_TD[members], slot_SKEC)
        ffns = [FFN(up, down, None, None) for up, down in zip(params["experts.up_proj"], params["experts.down_proj"], strict=True)]
        out_ECD = np.stack([ffn_forward(rows_ECD[e], ffns[e], "relu")[0] for e in range(experts)])
        y_TD[members] = one_hot_combine(out_ECD, gate_TK[members], slot_SKEC)

    share_E = np.bincount(expert_TK[:, 0], minlength=experts) / max(len(x_TD), 1)
    mean_E = gates_TE.sum(0) / max(len(x_TD), 1)
    return y_TD, {"first_choice_balance": experts * float(share_E @ mean_E)}
