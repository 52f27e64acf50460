"""gpt-oss: a router with a bias, biases in every expert, and a SwiGLU that is clamped and never quite closes its linear half.

Source: OpenAI 2025 (gpt-oss model card, arXiv 2508.10925), §2.2; the constants 7, 1.702 and 1 are in the released code.
Specific: the softmax runs over the chosen logits alone; a bias is weighed by the gate like the rest of its expert; the gate half is
clamped above only, the linear half on both sides, and 1 is added to it.
Deviates: released weights alternate gate and up rows (`reference.experts.concatenate_gate_up`). No balance loss is published.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params
from ..scores import logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo
from ._mixture import indicator


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = Σ_i Softmax(TopK(W_r x_t + b_r))_i E_i(x_t): (y [T, D], no losses)."""
    logits_TE, _ = logits_forward(x_TD, params["router.weight"], params["router.bias"])
    chosen_TE = indicator(logits_TE, config.gating.top_k)
    gate_TE, _ = softmax_forward(np.where(chosen_TE, logits_TE, -np.inf))

    y_TD = np.zeros_like(x_TD)
    for e in range(config.experts.count):
        pre_TM = x_TD @ params["experts.gate_up_proj"][e].T + params["experts.gate_up_proj_bias"][e]
        gate_proj_TF, up_TF = np.split(pre_TM, 2, axis=1)
        gate_proj_TF, up_TF = np.minimum(gate_proj_TF, 7), np.clip(up_TF, -7, 7)
        hidden_TF = (up_TF + 1) * gate_proj_TF / (1 + np.exp(-1.702 * gate_proj_TF))
        out_TD = hidden_TF @ params["experts.down_proj"][e].T + params["experts.down_proj_bias"][e]
        y_TD += gate_TE[:, [e]] * out_TD
    return y_TD, {}
