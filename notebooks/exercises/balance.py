"""Notebook 04: the balance loss and its gradient."""

from __future__ import annotations

import numpy as np

from reference.balancing import balance_backward, expert_balance_forward, first_choice_balance_forward
from reference.gating import top_k
from reference.proof import museum_losses
from reference.proof.museum_losses import loss_inputs

from . import Case, Exercise, Mistake

Answer = tuple[float, np.ndarray]


def _inputs(scores_TE: np.ndarray, expert_TK: np.ndarray):
    inputs = loss_inputs(np.log(scores_TE), expert_TK.shape[1])
    return inputs._replace(scores_TE=scores_TE, probability_TE=scores_TE, expert_TK=expert_TK)


def _balance(scores_TE: np.ndarray, expert_TK: np.ndarray) -> Answer:
    loss, cache = expert_balance_forward(_inputs(scores_TE, expert_TK))
    return loss, balance_backward(1.0, cache)["probability"]


def _first_choices(scores_TE: np.ndarray, expert_TK: np.ndarray) -> Answer:
    loss, cache = first_choice_balance_forward(_inputs(scores_TE, expert_TK))
    return loss, balance_backward(1.0, cache)["probability"]


def _not_divided_by_k(scores_TE: np.ndarray, expert_TK: np.ndarray) -> Answer:
    loss = museum_losses.not_divided_by_k(_inputs(scores_TE, expert_TK))
    return loss, expert_TK.shape[1] * _balance(scores_TE, expert_TK)[1]


def _chosen_only(scores_TE: np.ndarray, expert_TK: np.ndarray) -> Answer:
    chosen_TE = np.zeros(scores_TE.shape, bool)
    np.put_along_axis(chosen_TE, expert_TK, True, axis=1)
    loss = museum_losses.probability_of_the_chosen_only(_inputs(scores_TE, expert_TK))
    return loss, _balance(scores_TE, expert_TK)[1] * chosen_TE


def _softmax_twice(scores_TE: np.ndarray, expert_TK: np.ndarray) -> Answer:
    return museum_losses.softmax_twice(_inputs(scores_TE, expert_TK)), _balance(scores_TE, expert_TK)[1]


def _without_experts(scores_TE: np.ndarray, expert_TK: np.ndarray) -> Answer:
    loss, gradient = _balance(scores_TE, expert_TK)
    return loss / scores_TE.shape[1], gradient / scores_TE.shape[1]


def _gradient_of_the_mean(scores_TE: np.ndarray, expert_TK: np.ndarray) -> Answer:
    loss, gradient = _balance(scores_TE, expert_TK)
    return loss, gradient * len(scores_TE)


def _without_counts(scores_TE: np.ndarray, expert_TK: np.ndarray) -> Answer:
    mean_E = scores_TE.mean(0)
    return len(mean_E) * float((mean_E**2).sum()), np.broadcast_to(2 * len(mean_E) * mean_E / len(scores_TE), scores_TE.shape)


def _cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(4)
    scores_TE = rng.dirichlet(np.ones(5), 12)
    crowd_TE = rng.dirichlet(np.array([9.0, 6.0, 1.0, 1.0]), 9)
    return (
        Case("12 tokens, 5 experts, K = 2", (scores_TE, top_k(scores_TE, 2))),
        Case("a router that loves two of four experts", (crowd_TE, top_k(crowd_TE, 2))),
        Case("one expert for each token", (crowd_TE, top_k(crowd_TE, 1))),
        Case("choices that a bias has steered away from the best scores", (scores_TE, top_k(-scores_TE, 3))),
    )


EXERCISE = Exercise(
    {"loss": (), "dscores": ("token", "expert")}, _balance, _cases(),
    (
        Mistake(_not_divided_by_k,
                "The counts are divided by the tokens, not by the assignments: f must sum to 1, and a token has K assignments."),
        Mistake(_chosen_only, "P averages only the chosen scores. It is the mean of every score, chosen or not: how else could an expert "
                "that nobody chose be pulled up?"),
        Mistake(_softmax_twice, "The scores are probabilities already. A second softmax flattens them, and collapse looks cheap."),
        Mistake(_first_choices, "Only the first choices are counted. That is GShard's and Switch's loss; here all K choices count."),
        Mistake(_without_counts, "P takes the place of f as well. f counts who was chosen, whatever the scores are, and has no gradient."),
        Mistake(_without_experts, "The factor E is missing: even load must cost 1."),
        Mistake(_gradient_of_the_mean, "The loss is right. Its gradient forgets that P is a mean over T tokens: divide by T."),
    ),
    chapter="docs/chapters/losses.md#by-hand",
)  # fmt: skip
