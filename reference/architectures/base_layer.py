"""BASE layers: training solves an assignment problem, so that every expert has the same number of tokens, without a loss or a capacity.

Source: Lewis et al. 2021 (BASE layers, arXiv 2103.16716), §3.
Specific: an expert's logit, the paper's affinity, is a product of two vectors; of all ways to give each expert as many tokens, the one
with the largest sum of logits; the expert's output enters with a sigmoid of its logit, which is all that teaches the vectors.
Deviates: an expert here is one network; the paper stacks residual blocks, and its sum with the token is left to the block around it.
"""

from __future__ import annotations

import numpy as np

from ..choices import balanced_assignment
from ..config import MoEConfig
from ..experts import Params
from ..scores import logits_forward, sigmoid
from ..tokens import Draws, TokenInfo
from ._mixture import mixture


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = σ(h_t · w_a) f_a(h_t), a the token's expert: (y [T, D], no losses)."""
    affinity_TE, _ = logits_forward(x_TD, params["router.weight"])
    gate_TE = np.zeros_like(affinity_TE)
    for group in np.unique(info.group_T):
        members = np.flatnonzero(info.group_T == group)
        expert = balanced_assignment(affinity_TE[members], -(-len(members) // config.experts.count))
        gate_TE[members, expert] = sigmoid(affinity_TE[members, expert])
    return mixture(x_TD, gate_TE, params, "relu"), {}
