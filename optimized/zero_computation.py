"""Experts that are no networks, beside any backend: nothing is sorted or gathered for them, and no kernel knows of them.

A backend takes an id beyond its networks for a dropped assignment; what those experts answer is added here, from the tokens where they
are. Equations: those of `reference.zero_computation`.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from reference.autograd import Routing
from reference.autograd.tokens import at_least_fp32, without_autocast
from reference.autograd.zero_computation import KINDS, own_arrays
from reference.config import ExpertsConfig
from reference.zero_computation import KINDS as NUMPY_KINDS


def add_zero_computation(y_TD: Tensor, x_TD: Tensor, routing: Routing, params: Mapping[str, Tensor], config: ExpertsConfig) -> Tensor:
    """y_t + Σ_k g_tk E_{e_tk}(x_t) over the assignments to experts without a network, in the dtype of y, summed in fp32 or better.

    Shapes: y, x [T, D] → [T, D]. Experts of a kind that learns nothing are one, whose gate is their sum. Gradient: by autograd.
    """
    gate_TK, first = routing.gate.masked_fill(~routing.keep, 0), config.networks
    with without_autocast(x_TD.device):
        wide_TD, sum_TD = at_least_fp32(x_TD), at_least_fp32(y_TD)
        for kind, count in config.zero_computation:
            alike = 1 if NUMPY_KINDS[kind].arrays else count
            for number in range(0, count, alike):
                id_ = first + number
                gate_T = gate_TK.where((routing.expert >= id_) & (routing.expert < id_ + alike), 0).sum(1)
                sum_TD = sum_TD + gate_T[:, None] * KINDS[kind](wide_TD, own_arrays(kind, number, params))
            first += count
    return sum_TD.to(y_TD.dtype)
