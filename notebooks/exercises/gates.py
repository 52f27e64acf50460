"""Notebook 02: DeepSeek-V3's choices and gates."""

from __future__ import annotations

from typing import Any

import numpy as np

from reference.choices import choose
from reference.config import GatingConfig
from reference.gating import gates_forward
from reference.proof.museum_gates import unstable_top_k
from reference.scores import sigmoid_forward
from reference.tokens import token_info

from . import Case, Exercise, Mistake

V3 = GatingConfig(correction_bias=True, normalize="sum")
"""How DeepSeek-V3 weighs its experts, K and scale aside."""


def _v3_gates(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float, **changed: Any) -> tuple[np.ndarray, np.ndarray]:
    config = GatingConfig(**{**V3.__dict__, "top_k": count, "scale": scale, **changed})
    expert_TK, _ = choose(scores_TE, bias_E, config, token_info(len(scores_TE)))
    return expert_TK, gates_forward(scores_TE, expert_TK, config)[0]


def _gates_of_biased_scores(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    return _v3_gates(scores_TE + bias_E, np.zeros_like(bias_E), count, scale)


def _gates_with_loose_ties(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    expert_TK = unstable_top_k(scores_TE + bias_E, count)
    return expert_TK, gates_forward(scores_TE, expert_TK, GatingConfig(top_k=count, normalize="sum", scale=scale))[0]


def _gates_divided_by_all(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    expert_TK, gate_TK = _v3_gates(scores_TE, bias_E, count, scale, normalize="none")
    return expert_TK, gate_TK / scores_TE.sum(1, keepdims=True)


def _cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(2)
    scores_TE, bias_E = sigmoid_forward(rng.standard_normal((7, 6)))[0], rng.uniform(-0.4, 0.4, 6)
    ties_TE = np.array([[0.5, 0.5, 0.5, 0.5], [0.2, 0.6, 0.6, 0.2]])
    return (
        Case("a bias that changes who is chosen", (scores_TE, bias_E, 2, 2.5)),
        Case("equal scores: the lowest ids win", (ties_TE, np.zeros(4), 2, 1.0)),
        Case("every expert chosen", (scores_TE, bias_E, 6, 2.5)),
        Case("one expert for each token", (scores_TE, bias_E, 1, 2.5)),
    )


EXERCISE = Exercise(
    {"expert": ("token", "choice"), "gate": ("token", "choice")}, _v3_gates, _cases(),
    (
        Mistake(_gates_of_biased_scores,
                "The gates are made of the biased scores. The bias decides who is chosen, the scores how much each counts."),
        Mistake(lambda scores_TE, bias_E, count, scale: _v3_gates(scores_TE, bias_E, count, 1.0),
                "The scale has no effect: on the scores it cancels in the division by their sum. Multiply at the end."),
        Mistake(lambda scores_TE, bias_E, count, scale: _v3_gates(scores_TE, bias_E, count, scale, normalize="none"),
                "The gates are not divided by their sum."),
        Mistake(_gates_divided_by_all,
                "The sum runs over all experts. It is that of the K chosen scores, so that the gates sum to the scale."),
        Mistake(lambda scores_TE, bias_E, count, scale: _v3_gates(scores_TE, np.zeros_like(bias_E), count, scale),
                "The bias has no effect. Choose by scores + bias."),
        Mistake(_gates_with_loose_ties,
                "Ties go to the highest id. Reversing an ascending sort does that; sort the negative values, stably."),
        Mistake(lambda scores_TE, bias_E, count, scale: _v3_gates(scores_TE, bias_E, count, scale, normalize="softmax"),
                "A softmax over the chosen scores takes the place of the division. The scores are sigmoids already: divide them by "
                "their sum."),
    ),
    chapter="docs/chapters/gating.md#the-trap",
)  # fmt: skip
