"""The sparsely-gated mixture: noisy top-k gating, and two losses that keep a few experts from taking everything.

Source: Shazeer et al. 2017 (arXiv 1701.06538), §2.1, eq. 2–5, and §4 with its appendix A, eq. 8–11.
Specific: each token learns how much noise each expert's logit gets; the gates are a softmax over the K noisy logits that are kept. The
load is estimated smoothly: with what probability would an expert be among the best K if its noise alone were drawn again?
Deviates: the 0.01 under the noise and the 1e-10 under CV² are tensor2tensor's. Both matrices start at 0 there, here the noise's does.
"""

from __future__ import annotations

import numpy as np

from ..config import MoEConfig
from ..experts import Params, normal_cdf
from ..noise import standard_normal
from ..scores import softmax_forward
from ..tokens import Draws, TokenInfo
from ._mixture import indicator, mixture


def noisy_gates(x_TD: np.ndarray, params: Params, config: MoEConfig, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """Softmax(KeepTopK(H(x_t), K)): (gate [T, E], {"importance", "smooth_load"})."""
    top_k = config.gating.top_k
    clean_TE = x_TD @ params["router.weight"].T
    deviation_TE = np.log1p(np.exp(x_TD @ params["router.noise_weight"].T)) + 0.01
    noisy_TE = clean_TE + standard_normal(draws, "logit_noise", clean_TE.shape) * deviation_TE
    gate_TE, _ = softmax_forward(np.where(indicator(noisy_TE, top_k), noisy_TE, -np.inf))

    load_E = np.zeros(config.experts.count)
    for e in range(config.experts.count):
        kth_excluding_T = np.sort(np.delete(noisy_TE, e, axis=1), axis=1)[:, -top_k]
        load_E[e] = normal_cdf((clean_TE[:, e] - kth_excluding_T) / deviation_TE[:, e]).sum()
    importance_E = gate_TE.sum(0)
    return gate_TE, {
        "importance": float(importance_E.var() / (importance_E.mean() ** 2 + 1e-10)),
        "smooth_load": float(load_E.var() / (load_E.mean() ** 2 + 1e-10)),
    }


def forward(x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = Σ_i Softmax(KeepTopK(H(x_t), K))_i E_i(x_t): (y [T, D], {"importance", "smooth_load"})."""
    gate_TE, losses = noisy_gates(x_TD, params, config, draws)
    return mixture(x_TD, gate_TE, params, "relu"), losses
