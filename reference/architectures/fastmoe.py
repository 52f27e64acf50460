"""FastMoE: a system whose gates are plug-ins; its four best-known ones are other papers' routers, with its own capacities.

Source: He et al. 2021 (FastMoE, arXiv 2103.13262) and `fmoe/gates` of laekov/fastmoe; sizes: its Transformer-XL example for enwik8.
Specific: naive is a softmax over the K chosen logits, without any loss; noisy is Shazeer's gate; gshard and switch hold 1.2 times an even
load in training and 2.4 times in evaluation. Experts and routers have biases.
Deviates: its gshard gate drops before it draws, so that a rejected second choice keeps its slot, and its capacity is rounded down; its
switch gate adds uniform noise to the logits instead of multiplying the input, and counts f and P over the tokens that were kept; its
noisy gate divides by E − 1 in the variance of its losses, and its noise has no spread in evaluation.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from ..capacity import per_assignment, per_token
from ..config import MoEConfig
from ..experts import FFN, Params, ffn_forward
from ..gating import top_k
from ..scores import jitter, logits_forward, softmax_forward
from ..tokens import Draws, TokenInfo
from . import shazeer
from ._mixture import first_come, indicator


def _experts(x_TD: np.ndarray, gate_TE: np.ndarray, params: Params) -> np.ndarray:
    """Σ_i g_ti E_i(x_t), experts with ReLU and biases: [T, D]."""
    arrays = (params[f"experts.{name}"] for name in ("up_proj", "down_proj", "up_proj_bias", "down_proj_bias"))
    answers = (ffn_forward(x_TD, FFN(*network), "relu")[0] for network in zip(*arrays, strict=True))
    return sum((gate_TE[:, [e]] * answer_TD for e, answer_TD in enumerate(answers)), start=np.zeros_like(x_TD))


def _first_choice_loss(probability_TE: np.ndarray, first_T: np.ndarray) -> dict[str, float]:
    tokens, experts = max(len(first_T), 1), probability_TE.shape[1]
    share_E = np.bincount(first_T, minlength=experts) / tokens
    return {"first_choice_balance": experts * float(share_E @ probability_TE.sum(0)) / tokens}


def forward_naive(
    x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws
) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = Σ_i Softmax(TopK(W x_t + b))_i E_i(x_t): (y [T, D], no losses)."""
    logits_TE, _ = logits_forward(x_TD, params["router.weight"], params["router.bias"])
    gate_TE, _ = softmax_forward(np.where(indicator(logits_TE, config.gating.top_k), logits_TE, -np.inf))
    return _experts(x_TD, gate_TE, params), {}


def forward_noisy(
    x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws
) -> tuple[np.ndarray, dict[str, float]]:
    """Shazeer's gate on these experts: (y [T, D], {"importance", "smooth_load"})."""
    gate_TE, losses = shazeer.noisy_gates(x_TD, params, config, draws)
    return _experts(x_TD, gate_TE, params), losses


def forward_gshard(
    x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws
) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = Σ_k g_tk E_k(x_t), each token's two choices served together: (y [T, D], {"first_choice_balance"})."""
    experts = config.experts.count
    probability_TE, _ = softmax_forward(logits_forward(x_TD, params["router.weight"], params["router.bias"])[0])
    expert_TK = top_k(probability_TE, 2)
    gate_TK = np.take_along_axis(probability_TE, expert_TK, axis=1)
    gate_TK = gate_TK / gate_TK.sum(1, keepdims=True)
    wanted_TK = np.stack([np.ones(len(x_TD), bool), 2 * gate_TK[:, 1] > draws.uniform("second_choice", (len(x_TD),))], axis=1)
    slots_B = [per_assignment(config.capacity.factor, 2, int(size), experts) for size in info.real_per_group()]

    gate_TE, served = np.zeros_like(probability_TE), Counter()
    for t, k in np.argwhere(wanted_TK):
        group, e = info.group_T[t], expert_TK[t, k]
        gate_TE[t, e] = gate_TK[t, k] * (served[group, e] < slots_B[group])
        served[group, e] += 1
    return _experts(x_TD, gate_TE, params), _first_choice_loss(probability_TE, expert_TK[:, 0])


def forward_switch(
    x_TD: np.ndarray, params: Params, config: MoEConfig, info: TokenInfo, draws: Draws
) -> tuple[np.ndarray, dict[str, float]]:
    """y_t = p_ti E_i(x_t), i = argmax p_t: (y [T, D], {"first_choice_balance"})."""
    experts, noisy_TD = config.experts.count, jitter(x_TD, config.scores.noise_scale, draws)[0]
    probability_TE, _ = softmax_forward(logits_forward(noisy_TD, params["router.weight"], params["router.bias"])[0])
    first_T1 = probability_TE.argmax(1)[:, None]
    slots_B = np.array([per_token(config.capacity.factor, 1, int(size), experts) for size in info.real_per_group()], int)
    keep_T1 = first_come(first_T1, np.ones(first_T1.shape, bool), slots_B[info.group_T], info)
    gate_TE = np.where((np.arange(experts) == first_T1) & keep_T1, probability_TE, 0)
    return _experts(x_TD, gate_TE, params), _first_choice_loss(probability_TE, first_T1[:, 0])
