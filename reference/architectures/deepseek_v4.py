"""DeepSeek-V4: V3's router with √softplus scores and no groups; its first three layers choose by hash and still learn the gates.

Source: DeepSeek-AI 2026 (DeepSeek-V4, arXiv 2606.19348), §2.1 and §4.2; the gates of hashed experts: its code in transformers.
Specific: √softplus grows without bound where a sigmoid saturates; the bias steers the choice and enters no gate; a faint loss per sequence.
Deviates: SwiGLU's sides, which V4 caps at ±10, are left alone.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params
from ..scores import logits_forward
from ..tokens import Draws, TokenInfo
from ._mixture import indicator, mixture, shared


def _affinity(x_TD: np.ndarray, params: Params) -> np.ndarray:
    return np.sqrt(np.logaddexp(0, logits_forward(x_TD, params["router.weight"])[0]))


def _output(
    x_TD: np.ndarray, affinity_TE: np.ndarray, chosen_TE: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo
) -> tuple[np.ndarray, dict[str, float]]:
    kept_TE = np.where(chosen_TE, affinity_TE, 0)
    gate_TE = config.gating.scale * kept_TE / (kept_TE.sum(1, keepdims=True) + config.gating.eps)
    losses = []
    for sequence in np.unique(info.group_T):
        affinity_SE = affinity_TE[info.group_T == sequence]
        frequency_E = config.experts.count / config.gating.top_k * indicator(affinity_SE, config.gating.top_k).mean(0)
        losses.append(float(frequency_E @ (affinity_SE / affinity_SE.sum(1, keepdims=True)).mean(0)))
    return shared(x_TD, params) + mixture(x_TD, gate_TE, params), {"sequence_balance": sum(losses) / max(len(losses), 1)}


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = FFN_shared(x_t) + Σ over the K best of s + b of g_ti FFN_i(x_t): (y [T, D], {"sequence_balance"})."""
    affinity_TE = _affinity(x_TD, params)
    chosen_TE = indicator(affinity_TE + params["router.correction_bias"], config.gating.top_k)
    return _output(x_TD, affinity_TE, chosen_TE, params, config, info)


def forward_by_hash(
    x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws
) -> tuple[np.ndarray, dict[str, float]]:
    """The same with the experts that the table holds for the token's id: (y [T, D], {"sequence_balance"})."""
    assert info.token_ids_T is not None
    chosen_TE = np.zeros((len(x_TD), config.experts.count), bool)
    np.put_along_axis(chosen_TE, params["router.hash_table"][info.token_ids_T], True, axis=1)
    return _output(x_TD, _affinity(x_TD, params), chosen_TE, params, config, info)
