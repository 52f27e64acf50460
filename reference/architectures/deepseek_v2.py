"""DeepSeek-V2: DeepSeekMoE in which a token may reach only a few devices.

Source: DeepSeek-AI 2024 (DeepSeek-V2, arXiv 2405.04434), §2.2; the factor on the gates is in the released configuration.
Specific: the experts of a device are a group; a token goes to the M groups that hold its best single experts, then to the top-K in them.
Three losses: the load of experts, the load of devices, and how many tokens each device is sent.
Deviates: the scores outside are −∞ here and 0 in transformers, which is the same as long as they are probabilities. The paper
computes its losses per sequence, here over the batch; its token drop is not in this recipe.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo
from ._mixture import indicator, mixture, shared


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """DeepSeekMoE, the experts chosen within M devices: (y [T, D], the three losses)."""
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
    on_device = (groups, experts // groups)
    device_frequency_G, device_mean_G = frequency_E.reshape(on_device).mean(1), mean_E.reshape(on_device).sum(1)
    sent_G = chosen_TE.reshape(-1, *on_device).any(2).sum(0)
    received_G = groups / (config.gating.top_groups * tokens) * sent_G
    return y_TD, {
        "expert_balance": float(frequency_E @ mean_E),
        "device_balance": float(device_frequency_G @ device_mean_G),
        "communication_balance": float(received_G @ device_mean_G),
    }
