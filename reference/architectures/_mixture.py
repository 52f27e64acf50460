"""The two things that the recipes share: the papers' Σ over all experts, and "i ∈ TopK" as an indicator."""

from __future__ import annotations

import numpy as np

from ..experts import FFN, Params, ffn_forward
from ..gating import top_k


def indicator(value_TE: np.ndarray, count: int) -> np.ndarray:
    """1[i ∈ TopK(value_t, count)]: [T, E] → [T, E] bool, `count` of each row True, ties to the lowest id."""
    chosen_TE = np.zeros(value_TE.shape, bool)
    np.put_along_axis(chosen_TE, top_k(value_TE, count), True, axis=1)
    return chosen_TE


def expert(params: Params, number: int) -> FFN:
    """The SwiGLU network of one expert, without biases."""
    return FFN(params["experts.gate_up_proj"][number], params["experts.down_proj"][number], None, None)


def mixture(x_TD: np.ndarray, gate_TE: np.ndarray, params: Params) -> np.ndarray:
    """y_t = Σ_i g_ti FFN_i(x_t), the sum over all E SwiGLU experts that papers write: [T, D], [T, E] → [T, D].

    An expert with g = 0 is computed and then multiplied by 0, which is what a sparse layer saves.
    Source: Shazeer et al. 2017, eq. 1.
    """
    weighted = (gate_TE[:, [i]] * ffn_forward(x_TD, expert(params, i), "swiglu")[0] for i in range(gate_TE.shape[1]))
    return sum(weighted, start=np.zeros_like(x_TD))


def shared(x_TD: np.ndarray, params: Params) -> np.ndarray:
    """Σ over the shared experts, stored as the one SwiGLU network that they are together: [T, D] → [T, D]."""
    return ffn_forward(x_TD, FFN(params["shared.gate_up_proj"], params["shared.down_proj"], None, None), "swiglu")[0]
