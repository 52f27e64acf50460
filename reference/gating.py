"""scores_TE → expert_TK, gate_TK: which experts a token goes to, and with what weight each of them counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from .config import GatingConfig
from .scores import softmax_backward, softmax_forward
from .tokens import Draws, TokenInfo


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


def choose_top_k(choice_TE: np.ndarray, config: GatingConfig, tokens: TokenInfo) -> tuple[np.ndarray, np.ndarray]:
    """Every real token takes its K best experts: [T, E] → (expert [T, K], picked [T, K] bool, False for padding)."""
    expert_TK = top_k(choice_TE, config.top_k)
    return expert_TK, np.repeat(tokens.real_T[:, None], expert_TK.shape[1], axis=1)


CHOICES: dict[str, Callable[[np.ndarray, GatingConfig, TokenInfo], tuple[np.ndarray, np.ndarray]]] = {"top_k": choose_top_k}


def choose(
    scores_TE: np.ndarray, correction_bias: np.ndarray | None, config: GatingConfig, tokens: TokenInfo
) -> tuple[np.ndarray, np.ndarray]:
    """The discrete half of a router (choice): top-k of scores + correction bias inside the best groups.

    Shapes: scores [T, E], correction_bias [E] or None → expert [T, K] int64, picked [T, K] bool (the assignments that exist).
    Gradient: none; a choice is piecewise constant. The bias steers the choice and is never seen by a gate.
    Source: DeepSeek-V3, §2.1.2; Wang et al. 2024 (auxiliary-loss-free balancing).
    """
    choice_TE = scores_TE if correction_bias is None else scores_TE + correction_bias
    return CHOICES[config.choice](limit_to_groups(choice_TE, config), config, tokens)


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
    """chosen scores [T, K] → gates [T, K], and back."""

    forward: Callable[[np.ndarray, float], tuple[np.ndarray, Any]]
    backward: Callable[[np.ndarray, Any], np.ndarray]


NORMALIZERS: dict[str, Normalizer] = {
    "none": Normalizer(no_normalizer_forward, no_normalizer_backward),
    "sum": Normalizer(sum_normalizer_forward, sum_normalizer_backward),
    "softmax": Normalizer(softmax_normalizer_forward, softmax_backward),
}


class GateCache(NamedTuple):
    """expert_TK: whose scores were taken; experts: E; config: the settings; inner: the normalizer's own cache."""

    expert_TK: np.ndarray
    experts: int
    config: GatingConfig
    inner: Any


def gates_forward(scores_TE: np.ndarray, expert_TK: np.ndarray, config: GatingConfig) -> tuple[np.ndarray, GateCache]:
    """The gates of given choices (gates): g = scale · normalize(s[expert]).

    Shapes: scores [T, E], expert [T, K] → (gate [T, K], cache). The scores are those without correction bias.
    Gradient: through the chosen scores only; see each normalizer.
    """
    chosen_TK = np.take_along_axis(scores_TE, expert_TK, axis=1)
    gate_TK, inner = NORMALIZERS[config.normalize].forward(chosen_TK, config.eps)
    return gate_TK * np.asarray(config.scale, gate_TK.dtype), GateCache(expert_TK, scores_TE.shape[1], config, inner)


def gates_backward(dgate_TK: np.ndarray, cache: GateCache) -> np.ndarray:
    """dscores [T, E] of `gates_forward`; 0 for every expert that was not chosen."""
    dchosen_TK = NORMALIZERS[cache.config.normalize].backward(dgate_TK * cache.config.scale, cache.inner)
    dscores_TE = np.zeros((dgate_TK.shape[0], cache.experts), dgate_TK.dtype)
    np.put_along_axis(dscores_TE, cache.expert_TK, dchosen_TK, axis=1)
    return dscores_TE


def always_second(gate_TK: np.ndarray, draws: Draws) -> np.ndarray:
    """Every chosen expert is wanted: [T, K] → all True."""
    return np.ones(gate_TK.shape, bool)


def random_second(gate_TK: np.ndarray, draws: Draws) -> np.ndarray:
    """GShard's random second expert, in training (random-second): wanted iff 2·g₂ > r, r ~ U(0, 1).

    Shapes: gate [T, 2], already normalized → wanted [T, 2] bool; the first choice is always wanted.
    Source: Lepikhin et al. 2020, algorithm 1.
    Deviates: in the paper's pseudo-code a rejected second choice still uses up a slot of its expert; lingvo, mesh-tensorflow and this
    free it. They also draw in evaluation; here all noise belongs to training.
    """
    wanted_TK = np.ones(gate_TK.shape, bool)
    wanted_TK[:, 1] = 2 * gate_TK[:, 1] > draws.uniform("second_choice", (gate_TK.shape[0],))
    return wanted_TK


SECOND_CHOICES: dict[str, Callable[[np.ndarray, Draws], np.ndarray]] = {"always": always_second, "random": random_second}
