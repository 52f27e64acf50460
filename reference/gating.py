"""scores_TE → gate_TK: the order of preference, groups of experts, and with what weight each chosen expert counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .config import GatingConfig
from .scores import at_least_fp32, softmax_backward, softmax_forward
from .tokens import Draws


def top_k(value_TE: np.ndarray, count: int) -> np.ndarray:
    """Ids of the `count` highest values of each row, best first, ties to the lowest id (top-k): [T, E] → [T, count] int64.

    Deviates: `torch.topk` promises no order among ties, so every track sorts stably instead.
    """
    return np.argsort(-value_TE, axis=1, kind="stable")[:, :count]


def group_max(choice_TGI: np.ndarray) -> np.ndarray:
    """A group is as good as its best expert (group-max): [T, G, E/G] → [T, G]. Source: DeepSeek-V2, §2.2.2."""
    return choice_TGI.max(2)


def group_top2_sum(choice_TGI: np.ndarray) -> np.ndarray:
    """A group is as good as its two best experts together (group-top2-sum): [T, G, E/G] → [T, G].

    Source: DeepSeek-V3, §2.1.2, where it is the sum of the K / top_groups = 8 / 4 best.
    Deviates: Megatron-LM sums the K / top_groups best for any K; transformers and torchtitan always two, as here.
    """
    return np.sort(choice_TGI, axis=2)[:, :, -2:].sum(2)


GROUP_SCORES: dict[str, Callable[[np.ndarray], np.ndarray]] = {"max": group_max, "top2_sum": group_top2_sum}
"""What `GatingConfig.group_score` can name: choice [T, G, E/G] → [T, G]."""


def limit_to_groups(choice_TE: np.ndarray, config: GatingConfig) -> np.ndarray:
    """−∞ outside each token's best `top_groups` groups (group-limit): [T, E] → [T, E].

    Source: DeepSeek-V2, §2.2.2; DeepSeek-V3, §2.1.2.
    Deviates: code that writes 0 instead of −∞ chooses experts outside the groups once a correction bias is negative.
    """
    if config.top_groups == config.groups:
        return choice_TE
    tokens, experts = choice_TE.shape
    choice_TGI = choice_TE.reshape(tokens, config.groups, experts // config.groups)
    best = top_k(GROUP_SCORES[config.group_score](choice_TGI), config.top_groups)
    open_TG = np.zeros((tokens, config.groups), bool)
    np.put_along_axis(open_TG, best, True, axis=1)
    return np.where(open_TG[:, :, None], choice_TGI, -np.inf).reshape(tokens, experts)


def no_normalizer_forward(chosen_TK: np.ndarray, eps: float) -> tuple[np.ndarray, None]:
    """The chosen scores as they are (gate-plain). Source: Switch Transformer; DeepSeekMoE; OLMoE."""
    return chosen_TK, None


def no_normalizer_backward(dgate_TK: np.ndarray, cache: None) -> np.ndarray:
    """dchosen [T, K] of `no_normalizer_forward`."""
    return dgate_TK


class SumCache(NamedTuple):
    """gate_TK: the result; total: what was divided by, [T, 1]."""

    gate_TK: np.ndarray
    total: np.ndarray


def sum_normalizer_forward(chosen_TK: np.ndarray, eps: float) -> tuple[np.ndarray, SumCache]:
    """Gates that sum to 1 (gate-sum): g_k = s_k / (Σ_j s_j + eps).

    Gradient: ds = (dg − Σ_j dg_j g_j) / (Σ_j s_j + eps); with K = 1 it is 0, so the task teaches such a router nothing.
    Source: GShard, algorithm 1; DeepSeek-V3, eq. 13 (eps = 1e-20 in transformers: sigmoids can all underflow).
    """
    total = chosen_TK.sum(1, keepdims=True) + np.asarray(eps, chosen_TK.dtype)
    gate_TK = chosen_TK / total
    return gate_TK, SumCache(gate_TK, total)


def sum_normalizer_backward(dgate_TK: np.ndarray, cache: SumCache) -> np.ndarray:
    """dchosen [T, K] of `sum_normalizer_forward`."""
    return (dgate_TK - (dgate_TK * cache.gate_TK).sum(1, keepdims=True)) / cache.total


def softmax_normalizer_forward(chosen_TK: np.ndarray, eps: float) -> tuple[np.ndarray, np.ndarray]:
    """Softmax over the chosen logits (gate-softmax); equal to softmax over all experts, top-k, divided by the sum.

    Source: Shazeer et al. 2017, eq. 3; Mixtral, §2.1; gpt-oss.
    """
    return softmax_forward(chosen_TK)


class Normalizer(NamedTuple):
    """chosen scores [T, K] → gates [T, K], and back; absent: the score that takes part in nothing."""

    forward: Callable[[np.ndarray, float], tuple[np.ndarray, Any]]
    backward: Callable[[np.ndarray, Any], np.ndarray]
    absent: float = 0.0


NORMALIZERS: dict[str, Normalizer] = {
    "none": Normalizer(no_normalizer_forward, no_normalizer_backward),
    "sum": Normalizer(sum_normalizer_forward, sum_normalizer_backward),
    "softmax": Normalizer(softmax_normalizer_forward, softmax_backward, -np.inf),
}
"""What `GatingConfig.normalize` can name."""


class GateCache(NamedTuple):
    """expert_TK: whose scores were taken, where present_TK; experts: E; config: the settings; inner: the normalizer's own cache."""

    expert_TK: np.ndarray
    present_TK: np.ndarray
    experts: int
    config: GatingConfig
    inner: Any


def survivors(keep_TK: np.ndarray) -> np.ndarray:
    """Which slots are normalized over after a drop (survivors): the kept ones, and all of a token that kept none, whose gates are 0 anyway.

    Source: DeepSpeed's top2gating: the survivor of a drop gets the whole weight.
    Deviates: GShard, lingvo and Tutel normalize before the drop, so that a token which lost an expert counts less.
    """
    return keep_TK | ~keep_TK.any(1, keepdims=True)


def gates_forward(
    scores_TE: np.ndarray, expert_TK: np.ndarray, config: GatingConfig, present_TK: np.ndarray | None = None
) -> tuple[np.ndarray, GateCache]:
    """The gates of given choices (gates): g = scale · normalize(s[expert]), over the slots that are present (None: all).

    Shapes: scores [T, E], expert [T, K], present [T, K] bool → (gate [T, K], cache). The scores are those without correction bias.
    Gradient: through the chosen scores only; see each normalizer.
    """
    normalizer = NORMALIZERS[config.normalize]
    present_TK = np.ones(expert_TK.shape, bool) if present_TK is None else present_TK
    chosen_TK = np.where(present_TK, np.take_along_axis(scores_TE, expert_TK, axis=1), np.asarray(normalizer.absent, scores_TE.dtype))
    gate_TK, inner = normalizer.forward(chosen_TK, config.eps)
    cache = GateCache(expert_TK, present_TK, scores_TE.shape[1], config, inner)
    return gate_TK * np.asarray(config.scale, gate_TK.dtype), cache


def gates_backward(dgate_TK: np.ndarray, cache: GateCache) -> np.ndarray:
    """dscores [T, E] of `gates_forward`; 0 for every expert that was not chosen."""
    dchosen_TK = NORMALIZERS[cache.config.normalize].backward(dgate_TK * cache.config.scale, cache.inner)
    dscores_TE = np.zeros((dgate_TK.shape[0], cache.experts), dchosen_TK.dtype)
    np.add.at(dscores_TE, (np.arange(len(dscores_TE))[:, None], cache.expert_TK), np.where(cache.present_TK, dchosen_TK, 0))
    return dscores_TE


class ExpertScaleCache(NamedTuple):
    """gate_TK: before the scale; expert_TK: whose; scale: [E]."""

    gate_TK: np.ndarray
    expert_TK: np.ndarray
    scale: np.ndarray


def expert_scale_forward(gate_TK: np.ndarray, expert_TK: np.ndarray, scale: np.ndarray) -> tuple[np.ndarray, ExpertScaleCache]:
    """A learned factor for each expert (expert-scale): g_tk ← g_tk r_e, e the slot's expert.

    Shapes: gate, expert [T, K], scale [E] → (gate [T, K], cache). Gradient: dg = dg' r_e, dr_e = Σ dg' g over the expert's slots.
    Source: Gemma 4's `per_expert_scale` in transformers.
    """
    scale = at_least_fp32(scale)
    return gate_TK * scale[expert_TK], ExpertScaleCache(gate_TK, expert_TK, scale)


def expert_scale_backward(dscaled_TK: np.ndarray, cache: ExpertScaleCache) -> tuple[np.ndarray, np.ndarray]:
    """(dgate [T, K], dscale [E]) of `expert_scale_forward`."""
    dscale = np.zeros_like(cache.scale)
    np.add.at(dscale, cache.expert_TK, dscaled_TK * cache.gate_TK)
    return dscaled_TK * cache.scale[cache.expert_TK], dscale


def always_second(gate_TK: np.ndarray, config: GatingConfig, draws: Draws) -> np.ndarray:
    """Every chosen expert is wanted: [T, K] → all True."""
    return np.ones(gate_TK.shape, bool)


def random_second(gate_TK: np.ndarray, config: GatingConfig, draws: Draws) -> np.ndarray:
    """A random second expert, in training (random-second): wanted iff g₂ / θ > r, r ~ U(0, 1), so with probability min(1, g₂ / θ).

    Shapes: gate [T, 2], normalized and scaled → wanted [T, 2] bool; the first choice is always wanted. θ is second_threshold · scale.
    Source: Lepikhin et al. 2020, algorithm 1 (2 g₂ > r, θ = 1/2); Zoph et al. 2022 (ST-MoE), §G, and mesh-tensorflow (θ = 0.2).
    Deviates: in GShard's pseudo-code a rejected second choice still uses up a slot of its expert; lingvo, mesh-tensorflow and this
    free it. They also draw in evaluation; here all noise belongs to training.
    """
    wanted_TK = np.ones(gate_TK.shape, bool)
    threshold = np.asarray(config.second_threshold * config.scale, gate_TK.dtype)
    wanted_TK[:, 1] = gate_TK[:, 1] / threshold > draws.uniform("second_choice", (gate_TK.shape[0],))
    return wanted_TK


SECOND_CHOICES: dict[str, Callable[[np.ndarray, GatingConfig, Draws], np.ndarray]] = {"always": always_second, "random": random_second}
"""What `GatingConfig.second_choice` can name: (gate [T, K], config, draws) → wanted [T, K] bool."""
