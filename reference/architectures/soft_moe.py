"""Soft MoE: nothing is routed. A slot is a weighted mean of a sequence's tokens, a token's output a weighted mean of the slots' outputs.

Source: Puigcerver et al. 2023 (Soft MoE, arXiv 2308.00951), §2.1 and §2.3.
Specific: two softmaxes of the same logits, D over the tokens and C over the slots; tokens and slots have length 1 before they meet, and
one learned number scales their cosine. Every token reaches every expert and none is dropped; no balance loss. Not causal.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import FFN, Params, ffn_forward
from ..scores import softmax_forward
from ..tokens import Draws, TokenInfo


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """Y = C · FFNs(Dᵀ X) for each sequence: (y [T, D], no losses)."""
    phi = params["router.weight"].reshape(-1, config.d_model)
    phi = params["router.scale"] * phi / np.sqrt((phi**2).sum(1, keepdims=True) + 1e-6)
    y_TD = np.zeros_like(x_TD)
    for sequence in np.unique(info.group_T):
        own = info.group_T == sequence
        x_SD = x_TD[own]
        logits = x_SD / np.sqrt((x_SD**2).sum(1, keepdims=True) + 1e-6) @ phi.T
        dispatch, combine = softmax_forward(logits.T)[0].T, softmax_forward(logits)[0]
        inputs = np.split(dispatch.T @ x_SD, config.experts.count)
        weights = (params[f"experts.{name}"] for name in ("up_proj", "down_proj", "up_proj_bias", "down_proj_bias"))
        outputs = [ffn_forward(rows, FFN(*expert), "gelu")[0] for rows, *expert in zip(inputs, *weights, strict=True)]
        y_TD[own] = combine @ np.concatenate(outputs)
    return y_TD, {}
