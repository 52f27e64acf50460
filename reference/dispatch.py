"""x_TD → rows_ND → y_TD: moving tokens to their experts and back, seen in two ways that are proven equal.

The sort view copies each kept assignment's token into expert order: no padding, any load. The one-hot view is GShard's: two einsums
with a [T, E, C] tensor, easy to differentiate and wasteful. `layer.py` uses the sort.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class DispatchCache(NamedTuple):
    """Where each row came from.

    token_N   the token whose copy row n is;  slot_N: which of its K choices
    bounds_P  expert e owns rows bounds_P[e] … bounds_P[e + 1] − 1;  P = E + 1
    tokens    T
    """

    token_N: np.ndarray
    slot_N: np.ndarray
    bounds_P: np.ndarray
    tokens: int


def dispatch_forward(x_TD: np.ndarray, expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> tuple[np.ndarray, DispatchCache]:
    """Kept assignments in expert order (dispatch): rows = x[token], a stable sort, so that inside an expert tokens keep their order.

    Shapes: x [T, D], expert and keep [T, K] → (rows [N, D], cache), N = number of kept assignments.
    Gradient: dx_t = Σ of drows over the token's rows.
    Source: MegaBlocks (Gale et al. 2022), §5.
    """
    token_N, slot_N = np.nonzero(keep_TK)
    by_expert = np.argsort(expert_TK[token_N, slot_N], kind="stable")
    token_N, slot_N = token_N[by_expert], slot_N[by_expert]
    bounds_P = np.searchsorted(expert_TK[token_N, slot_N], np.arange(experts + 1))
    return x_TD[token_N], DispatchCache(token_N, slot_N, bounds_P, len(x_TD))


def dispatch_backward(drows_ND: np.ndarray, cache: DispatchCache) -> np.ndarray:
    """dx [T, D] of `dispatch_forward`."""
    dx_TD = np.zeros((cache.tokens, drows_ND.shape[1]), drows_ND.dtype)
    np.add.at(dx_TD, cache.token_N, drows_ND)
    return dx_TD


class GateCache(NamedTuple):
    """rows_ND: before the gates; gate_TK: the gates; dispatch: where each row came from."""

    rows_ND: np.ndarray
    gate_TK: np.ndarray
    dispatch: DispatchCache


def gate_rows_forward(rows_ND: np.ndarray, gate_TK: np.ndarray, dispatch: DispatchCache) -> tuple[np.ndarray, GateCache]:
    """Gates on the experts' inputs instead of their outputs (gate-input): y_t = Σ_k FFN_e(g_tk · x_t); another function, as FFNs bend.

    Shapes: rows [N, D], gate [T, K] → (rows [N, D] in their dtype, cache). Gradient: dr_n = g · d(g r)_n, dg_tk = ⟨r_n, d(g r)_n⟩.
    Source: Meta 2025 (Llama 4), its released code.
    """
    gated_ND = gate_TK[dispatch.token_N, dispatch.slot_N][:, None] * rows_ND
    return gated_ND.astype(rows_ND.dtype, copy=False), GateCache(rows_ND, gate_TK, dispatch)


def gate_rows_backward(dgated_ND: np.ndarray, cache: GateCache) -> tuple[np.ndarray, np.ndarray]:
    """(drows [N, D], dgate [T, K]) of `gate_rows_forward`."""
    rows_ND, gate_TK, dispatch = cache
    own = dispatch.token_N, dispatch.slot_N
    dgate_TK = np.zeros_like(gate_TK)
    dgate_TK[own] = (rows_ND * dgated_ND).sum(1)
    return (gate_TK[own][:, None] * dgated_ND).astype(rows_ND.dtype, copy=False), dgate_TK


class CombineCache(NamedTuple):
    """out_ND: the experts' outputs; gate_TK: their weights; dispatch: where each row came from."""

    out_ND: np.ndarray
    gate_TK: np.ndarray
    dispatch: DispatchCache


def combine_forward(out_ND: np.ndarray, gate_TK: np.ndarray, dispatch: DispatchCache) -> tuple[np.ndarray, CombineCache]:
    """The weighted sum of a token's experts (combine): y_t = Σ_k g_tk · out_(row of t, k); a token without rows gets 0.

    Shapes: out [N, D], gate [T, K] → (y [T, D], cache). The sum runs in fp32 or better.
    Gradient: dout_n = g · dy_t, dg_tk = ⟨dy_t, out_n⟩.
    Source: Shazeer et al. 2017, eq. 1.
    """
    weighted_ND = gate_TK[dispatch.token_N, dispatch.slot_N][:, None] * out_ND
    y_TD = np.zeros((dispatch.tokens, out_ND.shape[1]), weighted_ND.dtype)
    np.add.at(y_TD, dispatch.token_N, weighted_ND)
    return y_TD, CombineCache(out_ND, gate_TK, dispatch)


def combine_backward(dy_TD: np.ndarray, cache: CombineCache) -> tuple[np.ndarray, np.ndarray]:
    """(dout [N, D], dgate [T, K]) of `combine_forward`; the gate of a dropped assignment gets 0."""
    token_N, slot_N = cache.dispatch.token_N, cache.dispatch.slot_N
    dout_ND = cache.gate_TK[token_N, slot_N][:, None] * dy_TD[token_N]
    dgate_TK = np.zeros_like(cache.gate_TK)
    dgate_TK[token_N, slot_N] = (dy_TD[token_N] * cache.out_ND).sum(1)
    return dout_ND, dgate_TK


def one_hot_slots(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    """Which token's which choice fills which slot (one-hot-slots): [T, K, E, C] of 0 and 1, slots filled in the sort view's order.

    Source: GShard, algorithm 2 (its dispatch_mask, there summed over the choices).
    """
    tokens, slots = expert_TK.shape
    slot_TKEC = np.zeros((tokens, slots, experts, capacity))
    taken = np.zeros(experts, int)
    for token, slot in zip(*np.nonzero(keep_TK), strict=True):
        expert = expert_TK[token, slot]
        slot_TKEC[token, slot, expert, taken[expert]] = 1
        taken[expert] += 1
    return slot_TKEC


def one_hot_dispatch(x_TD: np.ndarray, slot_TKEC: np.ndarray) -> np.ndarray:
    """GShard's dispatch einsum (one-hot-dispatch): rows_ecd = Σ_tk slot_tkec x_td; empty slots are 0. [E, C, D]."""
    return np.einsum("tkec,td->ecd", slot_TKEC, x_TD)


def one_hot_combine(out_ECD: np.ndarray, gate_TK: np.ndarray, slot_TKEC: np.ndarray) -> np.ndarray:
    """GShard's combine einsum (one-hot-combine): y_td = Σ_kec g_tk slot_tkec out_ecd. [T, D]."""
    return np.einsum("tk,tkec,ecd->td", gate_TK, slot_TKEC, out_ECD)
