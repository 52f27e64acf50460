"""Museum, room five: noise, experts that choose, hash tables, thresholds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..balancing import LossInputs
from ..capacity import keep_within_capacity, queue_order
from ..choices import ChoiceContext, balanced_hash, choose, choose_gumbel
from ..config import GatingConfig
from ..gating import top_k
from ..noise import Noisy, smooth_load_forward
from ..scores import residual_forward, softmax_forward, sqrt_softplus_backward, sqrt_softplus_forward
from ..tokens import Draws, token_info
from .equal import round_to
from .exhibit import Bug, expect

EXPERTS = 4


def evaluation_has_a_load_loss(loss: Callable[[np.ndarray, Noisy], float]) -> None:
    """Without noise the load loss is the CV² of the counts, a number."""
    logits_TE = np.random.default_rng(0).standard_normal((12, EXPERTS))
    value = loss(logits_TE, Noisy(logits_TE, None))
    count_E = np.bincount(top_k(logits_TE, 2).ravel(), minlength=EXPERTS)
    expected = count_E.var() / count_E.mean() ** 2
    expect(abs(value - expected) < 1e-9, f"without noise the load loss is {value}, the counts vary by {expected:.4f}")


def underflowed_scores_teach_nothing(gradient: Callable[[np.ndarray], np.ndarray]) -> None:
    """The gradient of a score that underflowed to 0 is finite."""
    dlogits_TE = gradient(np.array([[-200.0, 0.0, 3.0]], np.float32))
    expect(np.isfinite(dlogits_TE).all(), f"logits of -200, 0 and 3 have the gradients {dlogits_TE[0].astype(float).round(4).tolist()}")


def evaluation_drops_alike(keep: Callable[[np.ndarray, Draws], np.ndarray]) -> None:
    """In evaluation two generators drop the same tokens."""
    expert_TK = np.zeros((16, 1), np.int64)
    first, second = (keep(expert_TK, Draws(np.random.default_rng(seed)))[:, 0] for seed in (1, 2))
    expect(np.array_equal(first, second), f"of 16 tokens {int((first != second).sum())} are kept by one evaluation and not by another")


def noise_leaves_the_logits_alone(select: Callable[[np.ndarray, Draws], np.ndarray]) -> None:
    """Drawing a choice does not change the logits that the caller holds."""
    logits_TE = np.random.default_rng(2).standard_normal((5, EXPERTS))
    before_TE = logits_TE.copy()
    select(logits_TE, Draws(np.random.default_rng(3)))
    moved = float(np.abs(logits_TE - before_TE).max())
    expect(moved == 0, f"the caller's logits moved by up to {moved:.3f}")


def experts_compare_tokens_by_probability(pick: Callable[[np.ndarray], np.ndarray]) -> None:
    """An expert takes the token to which it matters most among the experts, not the one with the largest logits."""
    picked_TE = pick(np.array([[6.0, 7.0, 6.0], [1.0, -1.0, 0.0]]))
    expect(picked_TE[1, 0], f"expert 0 takes token {int(picked_TE[:, 0].argmax())}; token 1 gives it 0.67, token 0 only 0.21")


def a_hash_table_outlives_its_process(table: Callable[[int], np.ndarray]) -> None:
    """The table that a checkpoint restores is the one that was trained with, whatever the generator has done since."""
    first, later = table(1), table(2)
    moved = int((first != later).any(1).sum())
    expect(moved == 0, f"{moved} of {len(first)} token ids go to other experts after a restart")


def a_residual_keeps_near_logits_apart(route: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
    """A token that a layer sends by a small margin is sent the same way by a next layer that only repeats its logits."""
    previous_TE = np.array([[5.0, 5.01, 0.0, 0.0], [5.02, 5.01, 0.0, 0.0]], np.float32)
    chosen_T = route(previous_TE, np.eye(EXPERTS, dtype=np.float32))
    expect(chosen_T.tolist() == [1, 0], f"logits of 5 and 5.01, then 5.02 and 5.01, send their tokens to experts {chosen_T.tolist()}")


def load_loss(clean_TE: np.ndarray, noise: Noisy) -> float:
    """The reference's load loss of a top-2 router."""
    tokens, (probability_TE, _) = token_info(len(clean_TE)), softmax_forward(noise.noisy_TE)
    expert_TK, picked_TK = choose(probability_TE, None, GatingConfig(top_k=2), tokens)
    inputs = LossInputs(clean_TE, probability_TE, probability_TE, expert_TK, picked_TK, tokens, None, noise, 2)
    return float(smooth_load_forward(inputs)[0])


def divided_by_no_noise(clean_TE: np.ndarray, noise: Noisy) -> float:
    """Divides by the deviation in evaluation too, where it is 0: 0/0 for the expert that stands at its own threshold."""
    with np.errstate(invalid="ignore", divide="ignore"):
        threshold = np.sort(clean_TE, axis=1)[:, [-2]]
        load_E = ((clean_TE - threshold) / np.zeros_like(clean_TE)).sum(0)
        return float(load_E.var() / load_E.mean() ** 2)


def score_gradient(logits_TE: np.ndarray) -> np.ndarray:
    """The reference's gradient of the sum of sqrt-softplus scores."""
    scores_TE, cache = sqrt_softplus_forward(logits_TE)
    return sqrt_softplus_backward(np.ones_like(scores_TE), cache)


def root_of_an_underflow(logits_TE: np.ndarray) -> np.ndarray:
    """Chains the gradients of root and softplus, which for an underflowed softplus is infinity times 0."""
    softplus_TE = np.log1p(np.exp(logits_TE))
    with np.errstate(invalid="ignore", divide="ignore", under="ignore"):
        return 0.5 / np.sqrt(softplus_TE) * (np.exp(logits_TE) / (1 + np.exp(logits_TE)) * (softplus_TE > 0))


def kept_in_evaluation(expert_TK: np.ndarray, draws: Draws) -> np.ndarray:
    """The reference's random drop in evaluation, where it is by position, at a capacity of 4."""
    order_N = queue_order(np.ones(expert_TK.shape), "random", draws, training=False)
    tokens = token_info(len(expert_TK))
    return keep_within_capacity(expert_TK, np.ones(expert_TK.shape, bool), np.array([4]), order_N, tokens)


def drawn_in_evaluation(expert_TK: np.ndarray, draws: Draws) -> np.ndarray:
    """Selects the tokens that stay at random whatever the mode, so that one prompt has many answers."""
    order_N = queue_order(np.ones(expert_TK.shape), "random", draws, training=True)
    tokens = token_info(len(expert_TK))
    return keep_within_capacity(expert_TK, np.ones(expert_TK.shape, bool), np.array([4]), order_N, tokens)


def drawn_choice(logits_TE: np.ndarray, draws: Draws) -> np.ndarray:
    """The reference's choice under Gumbel noise."""
    probability_TE, _ = softmax_forward(logits_TE)
    context = ChoiceContext(logits_TE, probability_TE, draws=draws, training=True)
    return choose_gumbel(probability_TE, GatingConfig(top_k=2, choice="gumbel"), token_info(len(logits_TE)), context)[0]


def noise_added_in_place(logits_TE: np.ndarray, draws: Draws) -> np.ndarray:
    """Adds the noise to the logits in place, from which the gates and the losses are then computed too."""
    logits_TE += -np.log(-np.log(np.maximum(draws.uniform("gumbel", logits_TE.shape), 1e-12)))
    return top_k(logits_TE, 2)


def _one_token_each(scores_TE: np.ndarray) -> np.ndarray:
    config = GatingConfig(choice="expert_choice")
    expert_TK, picked_TK = choose(scores_TE, None, config, token_info(len(scores_TE)), ChoiceContext(slots_B=np.array([1])))
    picked_TE = np.zeros(scores_TE.shape, bool)
    np.put_along_axis(picked_TE, expert_TK, picked_TK, axis=1)
    return picked_TE


def picked_by_probability(logits_TE: np.ndarray) -> np.ndarray:
    """The reference's expert choice at C = 1: each expert compares probabilities over the experts."""
    return _one_token_each(softmax_forward(logits_TE)[0])


def picked_by_share_of_the_expert(logits_TE: np.ndarray) -> np.ndarray:
    """Normalizes over the tokens instead of the experts, so that a token with large logits wins everywhere."""
    return _one_token_each(softmax_forward(logits_TE.T)[0].T)


def saved_table(seed: int) -> np.ndarray:
    """The reference's table is a buffer, drawn once and restored with the parameters."""
    return balanced_hash(40, GatingConfig(choice="hash", vocabulary=40), EXPERTS, np.random.default_rng(0))


def table_drawn_again(seed: int) -> np.ndarray:
    """Builds the table from the process's own seed at every start, so that the experts meet tokens which they never learned."""
    return balanced_hash(40, GatingConfig(choice="hash", vocabulary=40), EXPERTS, np.random.default_rng(seed))


def chosen_after_a_residual(previous_TE: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The reference's best expert where the token itself says nothing and the layer before everything."""
    return top_k(residual_forward(np.zeros_like(previous_TE), previous_TE, weight)[0], 1)[:, 0]


def residual_rounded_to_bf16(previous_TE: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Casts the logits of the layer before to the dtype of the matrix that reads them, though the router beside it is kept in fp32."""
    return chosen_after_a_residual(round_to(previous_TE, "bfloat16").astype(np.float32), weight)


BUGS = (
    Bug("load divided by no noise", "laekov/fastmoe fmoe/gates/noisy_gate.py", divided_by_no_noise, load_loss, evaluation_has_a_load_loss),
    Bug("root of an underflow", "near: huggingface/transformers DeepSeek-V4, softplus followed by sqrt (2026)",
        root_of_an_underflow, score_gradient, underflowed_scores_teach_nothing),
    Bug("random drop in evaluation", "deepspeedai/DeepSpeed deepspeed/moe/sharded_moe.py, random token selection",
        drawn_in_evaluation, kept_in_evaluation, evaluation_drops_alike),
    Bug("noise added in place", "deepspeedai/DeepSpeed deepspeed/moe/sharded_moe.py, top2gating",
        noise_added_in_place, drawn_choice, noise_leaves_the_logits_alone),
    Bug("softmax over the tokens", "near: Zhou et al. 2022, §3.2 (softmax over the experts, then the transpose)",
        picked_by_share_of_the_expert, picked_by_probability, experts_compare_tokens_by_probability),
    Bug("hash table drawn again", "near: Roller et al. 2021 (a fixed table)",
        table_drawn_again, saved_table, a_hash_table_outlives_its_process),
    Bug("gating residual in bf16", "SkyworkAI/MoE-plus-plus MoE++/moe_plus_plus_layer.py, Router.forward",
        residual_rounded_to_bf16, chosen_after_a_residual, a_residual_keeps_near_logits_apart),
)  # fmt: skip
