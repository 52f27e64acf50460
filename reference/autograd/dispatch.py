"""x_TD → rows_ND → y_TD in PyTorch, in the sort view of `reference.dispatch`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Dispatch(NamedTuple):
    """Where each row came from: its token and slot, [N] int64; expert e owns rows bounds[e] … bounds[e + 1] − 1; tokens: T."""

    token_N: Tensor
    slot_N: Tensor
    bounds_P: Tensor
    tokens: int


def dispatch_forward(x_TD: Tensor, expert_TK: Tensor, keep_TK: Tensor, experts: int) -> tuple[Tensor, Dispatch]:
    """Kept assignments in expert order (dispatch): x [T, D], expert and keep [T, K] → (rows [N, D], Dispatch).

    N depends on the values of keep, so this waits for the device.
    """
    token_N, slot_N = torch.nonzero(keep_TK, as_tuple=True)
    expert_N, by_expert_N = torch.sort(expert_TK[token_N, slot_N], stable=True)
    token_N, slot_N = token_N[by_expert_N], slot_N[by_expert_N]
    bounds_P = torch.searchsorted(expert_N, torch.arange(experts + 1, device=expert_N.device))
    return x_TD[token_N], Dispatch(token_N, slot_N, bounds_P, len(x_TD))


def gate_rows_forward(rows_ND: Tensor, gate_TK: Tensor, dispatch: Dispatch) -> Tensor:
    """Gates on the experts' inputs (gate-input): rows [N, D], gate [T, K] → rows [N, D] in their dtype."""
    return (gate_TK[dispatch.token_N, dispatch.slot_N][:, None] * rows_ND).to(rows_ND.dtype)


def combine_forward(out_ND: Tensor, gate_TK: Tensor, dispatch: Dispatch) -> Tensor:
    """The weighted sum of a token's experts (combine): out [N, D], gate [T, K] → y [T, D], summed in the gates' fp32 or better."""
    weighted_ND = gate_TK[dispatch.token_N, dispatch.slot_N][:, None] * out_ND
    return weighted_ND.new_zeros(dispatch.tokens, out_ND.shape[1]).index_add(0, dispatch.token_N, weighted_ND)
