"""Llama 4: one expert per token, whose input, not output, is multiplied by the gate, and a shared expert.

Source: Meta 2025 (Llama 4 announcement; model card meta-llama/Llama-4-Scout-17B-16E); the rule itself is in the released code.
Specific: the gate σ(z) of the best logit scales the token before the expert's SwiGLU, which bends it: the result is not the gate times
the expert's output. An expert without biases answers 0 with 0, so what was not chosen adds nothing. No balance loss is published.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params, ffn_forward
from ..scores import logits_forward, sigmoid_forward
from ..tokens import Draws, TokenInfo
from ._mixture import expert, indicator, shared


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = E_i(σ(z_i) x_t) + FFN_shared(x_t), i = argmax z: (y [T, D], no losses)."""
    logits_TE, _ = logits_forward(x_TD, params["router.weight"])
    gate_TE = indicator(logits_TE, config.gating.top_k) * sigmoid_forward(logits_TE)[0]
    y_TD = shared(x_TD, params)
    for e in range(config.experts.count):
        y_TD = y_TD + ffn_forward(gate_TE[:, [e]] * x_TD, expert(params, e), "swiglu")[0]
    return y_TD, {}
