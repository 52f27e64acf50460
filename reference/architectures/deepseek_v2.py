"""DeepSeek-V2: DeepSeekMoE in which a token may reach only a few devices.

Source: DeepSeek-AI 2024 (DeepSeek-V2, arXiv 2405.04434), §2.2; the factor on the gates is in the released configuration.
Specific: the experts of a device are a group; a token goes to the M groups that hold its best single experts, then to the top-K in them.
Deviates: the affinities outside are −∞ here and 0 in transformers, which is the same as long as they are probabilities. The paper
computes its losses per sequence, here over the batch; its device and communication losses and its token drop are not in this recipe.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws
from ._mixture import indicator, mixture, shared


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, group_T: np.ndarray, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """DeepSeekMoE, the experts chosen within M devices: (y [T, D], {"expert_balance"})."""
    experts, groups = config.experts.count, config.gating.groups
    affinity_TE, _ = softmax_forward(logits_forward(x_TD, params["router.weight"])[0])

    best_TG = affinity_TE.reshape(-1, groups, experts // groups).max(2)
    open_TE = np.repeat(indicator(best_TG, config.gating.top_groups), experts // groups, axis=1)
    chosen_TE = indicator(np.where(open_TE, affinity_TE, -np.inf), config.gating.top_k)
    gate_TE = config.gating.scale * np.where(chosen_TE, affinity_TE, 0)
    y_TD = shared(x_TD, params) + mixture(x_TD, gate_TE, params)

    tokens = max(len(x_TD), 1)
    frequency_E = experts / (config.gating.top_k * tokens) * chosen_TE.sum(0)
    mean_E = affinity_TE.sum(0) / tokens
    return y_TD, {"expert_balance": float(frequency_E @ mean_E)}
