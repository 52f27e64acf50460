"""Museum, room two: scores, choices, gates, and the bias that steers them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from ..balancing import sign_bias_update
from ..choices import choose
from ..config import GatingConfig
from ..gating import gates_backward, gates_forward, group_top2_sum, limit_to_groups, sum_normalizer_forward, top_k
from ..scores import jitter, logits_forward, softmax_forward
from ..tokens import Draws, token_info
from .equal import round_to
from .exhibit import Bug, expect

Gates = Callable[[np.ndarray, np.ndarray, GatingConfig], np.ndarray]


def gates_ignore_the_bias(gates: Gates) -> None:
    """A correction bias that changes no choice changes no gate."""
    scores_TE = softmax_forward(np.random.default_rng(0).standard_normal((7, 5)))[0]
    config = GatingConfig(top_k=2, correction_bias=True, normalize="sum")
    plain, biased = gates(scores_TE, np.zeros(5), config), gates(scores_TE, np.full(5, 0.5), config)
    expect(np.allclose(plain, biased, rtol=1e-12), f"an even bias moves a gate from {plain[0, 0]:.4f} to {biased[0, 0]:.4f}")


def tiny_scores_keep_their_ratio(gates: Gates) -> None:
    """In fp32, scores of 1e-8 and 3e-8 under a bias of 12 still give gates of 1/4 and 3/4."""
    scores_TE, bias_E = np.array([[1e-8, 3e-8, 0.0]], np.float32), np.array([12, 12, 0], np.float32)
    gate_TK = gates(scores_TE, bias_E, GatingConfig(top_k=2, correction_bias=True, normalize="sum", eps=1e-20))
    expect(np.allclose(np.sort(gate_TK[0]), [0.25, 0.75], rtol=1e-5), f"scores of 1e-8 and 3e-8 give the gates {gate_TK[0].tolist()}")


def closed_groups_are_never_chosen(limit: Callable[[np.ndarray, GatingConfig], np.ndarray]) -> None:
    """With every score negative, no expert outside the best groups is chosen."""
    config = GatingConfig(top_k=2, groups=4, top_groups=2, group_score="top2_sum")
    choice_TE = np.random.default_rng(1).uniform(-3, -1, (6, 8))
    open_TG = np.zeros((6, 4), bool)
    np.put_along_axis(open_TG, top_k(group_top2_sum(choice_TE.reshape(6, 4, 2)), 2), True, axis=1)
    chosen_TK = top_k(limit(choice_TE, config), 2) // 2
    expect(
        np.take_along_axis(open_TG, chosen_TK, axis=1).all(),
        f"groups {chosen_TK[0].tolist()} chosen, open {open_TG[0].nonzero()[0].tolist()}",
    )


def two_good_experts_beat_one(group_score: Callable[[np.ndarray], np.ndarray]) -> None:
    """A group with two good experts is better than one with the single best expert."""
    scores_TG = group_score(np.array([[[0.9, 0.0], [0.8, 0.7]]]))
    expect(scores_TG[0, 1] > scores_TG[0, 0], f"group scores are {scores_TG[0].tolist()}; the second group holds the better pair")


def underflowed_scores_stay_finite(normalize: Callable[[np.ndarray], np.ndarray]) -> None:
    """Scores that all underflowed to 0 give finite gates."""
    gate_TK = normalize(np.zeros((1, 3)))
    expect(np.isfinite(gate_TK).all(), f"scores of 0 give the gates {gate_TK[0].tolist()}")


def ties_go_to_the_lowest_id(select: Callable[[np.ndarray, int], np.ndarray]) -> None:
    """Among equal scores the experts with the lowest ids are chosen, in order."""
    chosen = select(np.array([[1.0] * 40, [0.0] * 20 + [1.0] * 20]), 3).tolist()
    expect(chosen == [[0, 1, 2], [20, 21, 22]], f"equal scores choose {chosen} instead of [[0, 1, 2], [20, 21, 22]]")


def close_logits_stay_apart(logits: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """Two experts whose logits are 12.00 and 12.01 are told apart."""
    logits_TE = logits(np.ones((1, 2)), np.array([[10.0, 2.0], [10.0, 2.01]]))
    expect(logits_TE[0, 1] > logits_TE[0, 0], f"both experts have the logit {logits_TE[0, 0]}")


def a_single_expert_teaches_the_router(gradient: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """With K = 1 a gate's cotangent reaches the scores."""
    scores_TE = softmax_forward(np.random.default_rng(2).standard_normal((4, 5)))[0]
    dscores_TE = gradient(scores_TE, np.ones((4, 1)))
    expect(np.abs(dscores_TE).max() > 1e-3, f"the largest gradient of a score is {np.abs(dscores_TE).max():.2g}")


def routed_scores_sum_to_one(scores: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """The softmax runs over the routed experts only, whatever a shared expert's logit would be."""
    total = float(scores(np.array([[0.3, -1.0, 2.0]]), np.array([[4.0]])).sum())
    expect(abs(total - 1) < 1e-12, f"the routed experts' scores sum to {total:.4f}")


def noise_scales_with_the_input(logits: Callable[[np.ndarray, np.ndarray, Draws], np.ndarray]) -> None:
    """Jitter multiplies: a token of zeros has logits of exactly 0, noise or not."""
    logits_TE = logits(np.zeros((2, 3)), np.ones((4, 3)), Draws(np.random.default_rng(3)))
    expect(not logits_TE.any(), f"a token of zeros gets the logit {logits_TE[0, 0]:.4f}")


def small_steps_add_up(update: Callable[[np.ndarray, np.ndarray, float], np.ndarray]) -> None:
    """Two hundred steps of 0.001 move a bias of 1 to 1.2."""
    bias = np.ones(2, np.float32)
    for _ in range(200):
        bias = update(bias, np.array([0, 9]), 0.001)
    expect(abs(bias[0] - 1.2) < 1e-3, f"after 200 steps of 0.001 a bias of 1 is {bias[0]:.4f}")


def ranks_agree_with_one_machine(update: Callable[[Sequence[np.ndarray]], np.ndarray]) -> None:
    """The bias moves alike whether the batch lies on one rank or on two."""
    loads = [np.array([10, 0, 2]), np.array([1, 4, 3])]
    split, whole = update(loads), update([loads[0] + loads[1]])
    expect(np.array_equal(split, whole), f"two ranks move the bias by {split.tolist()}, one by {whole.tolist()}")


def reference_gates(scores_TE: np.ndarray, correction_bias: np.ndarray, config: GatingConfig) -> np.ndarray:
    """The reference's gates: chosen with the bias, weighed without it."""
    expert_TK, _ = choose(scores_TE, correction_bias, config, token_info(len(scores_TE)))
    return gates_forward(scores_TE, expert_TK, config)[0]


def biased_gates(scores_TE: np.ndarray, correction_bias: np.ndarray, config: GatingConfig) -> np.ndarray:
    """Weighs the experts by the biased scores that chose them."""
    return reference_gates(scores_TE + correction_bias, np.zeros_like(correction_bias), config)


def bias_subtracted_again(scores_TE: np.ndarray, correction_bias: np.ndarray, config: GatingConfig) -> np.ndarray:
    """Recovers a score as biased score minus bias, which in fp32 rounds every score much smaller than the bias to 0."""
    return reference_gates((scores_TE + correction_bias) - correction_bias, correction_bias, config)


def zero_outside_the_groups(choice_TE: np.ndarray, config: GatingConfig) -> np.ndarray:
    """Masks closed groups with 0 instead of −∞, which beats every negative biased score."""
    limited_TE = limit_to_groups(choice_TE, config)
    return np.where(np.isneginf(limited_TE), 0.0, limited_TE)


def best_expert_of_a_group(choice_TGI: np.ndarray) -> np.ndarray:
    """Scores a group by its best expert alone where the model sums the best two."""
    return choice_TGI.max(2)


def normalized(chosen_TK: np.ndarray) -> np.ndarray:
    """The reference's gates, divided by their sum + eps."""
    return sum_normalizer_forward(chosen_TK, 1e-20)[0]


def normalized_without_eps(chosen_TK: np.ndarray) -> np.ndarray:
    """Divides by the bare sum: 0/0 once all sigmoids have underflowed."""
    with np.errstate(invalid="ignore"):
        return chosen_TK / chosen_TK.sum(1, keepdims=True)


def unstable_top_k(value_TE: np.ndarray, count: int) -> np.ndarray:
    """Reverses an ascending sort, so that among ties the highest id wins; `torch.topk` promises no order at all."""
    return np.argsort(value_TE, axis=1, kind="stable")[:, ::-1][:, :count]


def reference_logits(x_TD: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The reference's logits in fp32, as a model in low precision asks for them."""
    return logits_forward(x_TD.astype(np.float32), weight.astype(np.float32))[0]


def bfloat16_logits(x_TD: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Leaves the logits in the model's bfloat16, whose steps near 12 are 1/16: close experts become ties."""
    return round_to(logits_forward(x_TD, weight)[0], "bfloat16")


def _score_gradient(scores_TE: np.ndarray, dgate_TK: np.ndarray, **settings: Any) -> np.ndarray:
    config = GatingConfig(top_k=1, **settings)
    _, cache = gates_forward(scores_TE, top_k(scores_TE, 1), config)
    return gates_backward(dgate_TK, cache)


def plain_top1_gradient(scores_TE: np.ndarray, dgate_TK: np.ndarray) -> np.ndarray:
    """The reference's gradient with the probability itself as the gate, as in Switch."""
    return _score_gradient(scores_TE, dgate_TK)


def renormalized_top1_gradient(scores_TE: np.ndarray, dgate_TK: np.ndarray) -> np.ndarray:
    """Divides the single gate by itself: it is constantly 1, and the task teaches the router nothing."""
    return _score_gradient(scores_TE, dgate_TK, normalize="sum")


def routed_scores(routed: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """The reference's scores: shared experts have no logit."""
    return softmax_forward(routed)[0]


def shared_in_the_softmax(routed: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """Lets the shared experts take part in the softmax, where they eat probability."""
    return softmax_forward(np.concatenate([routed, shared], axis=1))[0][:, : routed.shape[1]]


def jittered_logits(x_TD: np.ndarray, weight: np.ndarray, draws: Draws) -> np.ndarray:
    """The reference's logits under Switch's jitter."""
    return logits_forward(jitter(x_TD, 0.1, draws)[0], weight)[0]


def additive_jitter(x_TD: np.ndarray, weight: np.ndarray, draws: Draws) -> np.ndarray:
    """Adds U(0.9, 1.1) to the logits instead of multiplying the input by it."""
    logits_TE = logits_forward(x_TD, weight)[0]
    return logits_TE + 0.9 + 0.2 * draws.uniform("jitter", logits_TE.shape)


def bfloat16_bias(correction_bias: np.ndarray, load_E: np.ndarray, rate: float) -> np.ndarray:
    """Keeps the bias in bfloat16, whose steps above 1 are 1/128: a step of 0.001 is rounded away, and distinct biases collapse."""
    return round_to(sign_bias_update(correction_bias, load_E, rate), "bfloat16").astype(np.float32)


def update_from_all_ranks(loads: Sequence[np.ndarray]) -> np.ndarray:
    """The reference's step, from the load summed over the ranks."""
    return sign_bias_update(np.zeros(3), np.sum(loads, axis=0), 1.0)


def update_on_each_rank(loads: Sequence[np.ndarray]) -> np.ndarray:
    """Takes the sign on every rank and adds the signs up: a small rank outvotes a large one."""
    return np.sum([sign_bias_update(np.zeros(3), load_E, 1.0) for load_E in loads], axis=0)


BUGS = (
    Bug("biased scores as gates", "vllm-project/vllm#12002; PaddlePaddle/PaddleFleet#329",
        biased_gates, reference_gates, gates_ignore_the_bias),
    Bug("bias subtracted again", "flashinfer-ai/flashinfer#3875", bias_subtracted_again, reference_gates, tiny_scores_keep_their_ratio),
    Bug("closed groups set to 0", "huggingface/transformers#45441",
        zero_outside_the_groups, limit_to_groups, closed_groups_are_never_chosen),
    Bug("best expert instead of the best two", "deepseek-ai/DeepSeek-V3#741; vllm-project/vllm#13474",
        best_expert_of_a_group, group_top2_sum, two_good_experts_beat_one),
    Bug("no eps under the sum", "flashinfer-ai/flashinfer#3803, #3946", normalized_without_eps, normalized, underflowed_scores_stay_finite),
    Bug("unstable ties", "near: torch.topk, whose documentation promises no order", unstable_top_k, top_k, ties_go_to_the_lowest_id),
    Bug("router in bfloat16", "vllm-project/vllm#14027; sgl-project/sglang#33764",
        bfloat16_logits, reference_logits, close_logits_stay_apart),
    Bug("renormalized top-1", "near: Shazeer et al. 2017, eq. 3 with K = 1; Switch keeps the probability instead",
        renormalized_top1_gradient, plain_top1_gradient, a_single_expert_teaches_the_router),
    Bug("shared experts in the softmax", "near: DeepSeekMoE (Dai et al. 2024), eq. 9–11",
        shared_in_the_softmax, routed_scores, routed_scores_sum_to_one),
    Bug("additive jitter", "laekov/fastmoe fmoe/gates/switch_gate.py", additive_jitter, jittered_logits, noise_scales_with_the_input),
    Bug("correction bias in bfloat16", "sgl-project/sglang#31213", bfloat16_bias, sign_bias_update, small_steps_add_up),
    Bug("bias updated per rank", "near: Wang et al. 2024, algorithm 1 (the load of the whole batch)",
        update_on_each_rank, update_from_all_ranks, ranks_agree_with_one_machine),
)  # fmt: skip
