"""What the recipes share: the papers' Σ over all experts, "i ∈ TopK" as an indicator, and the queue in front of a full expert."""

from __future__ import annotations

from collections import Counter

import numpy as np

from ..experts import FFN, Params, ffn_forward
from ..gating import top_k
from ..tokens import TokenInfo


def indicator(value_TE: np.ndarray, count: int) -> np.ndarray:
    """1[i ∈ TopK(value_t, count)]: [T, E] → [T, E] bool, `count` of each row True, ties to the lowest id."""
    chosen_TE = np.zeros(value_TE.shape, bool)
    np.put_along_axis(chosen_TE, top_k(value_TE, count), True, axis=1)
    return chosen_TE


def expert(params: Params, number: int) -> FFN:
    """The network of one expert, without biases."""
    first = params.get("experts.gate_up_proj", params.get("experts.up_proj"))
    return FFN(first[number], params["experts.down_proj"][number], None, None)  # type: ignore[index]


def first_come(expert_TK: np.ndarray, wanted_TK: np.ndarray, slots_T: np.ndarray, info: TokenInfo) -> np.ndarray:
    """GShard's queue: all first choices by position, then all second ones; who finds fewer than `slots` before him stays: [T, K] bool."""
    keep_TK, served = np.zeros(expert_TK.shape, bool), Counter()
    for k in range(expert_TK.shape[1]):
        for t in np.flatnonzero(wanted_TK[:, k]):
            queue = (info.group_T[t], expert_TK[t, k])
            keep_TK[t, k] = served[queue] < slots_T[t]
            served[queue] += 1
    return keep_TK


def mixture(x_TD: np.ndarray, gate_TE: np.ndarray, params: Params, activation: str = "swiglu") -> np.ndarray:
    """y_t = Σ_i g_ti FFN_i(x_t), the sum over all E experts that papers write: [T, D], [T, E] → [T, D].

    An expert with g = 0 is computed and then multiplied by 0, which is what a sparse layer saves.
    Source: Shazeer et al. 2017, eq. 1.
    """
    weighted = (gate_TE[:, [i]] * ffn_forward(x_TD, expert(params, i), activation)[0] for i in range(gate_TE.shape[1]))
    return sum(weighted, start=np.zeros_like(x_TD))


def shared(x_TD: np.ndarray, params: Params) -> np.ndarray:
    """Σ over the shared experts, stored as the one SwiGLU network that they are together: [T, D] → [T, D]."""
    return ffn_forward(x_TD, FFN(params["shared.gate_up_proj"], params["shared.down_proj"], None, None), "swiglu")[0]
