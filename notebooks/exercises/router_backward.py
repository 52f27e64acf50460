"""Notebook 03: the router's gradient, from the gates to the logits."""

from __future__ import annotations

import numpy as np

from reference.config import GatingConfig
from reference.gating import gates_backward, gates_forward, top_k
from reference.scores import softmax_backward, softmax_forward

from . import Case, Exercise, Mistake


def _router_backward(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    scores_TE, softmax = softmax_forward(logits_TE)
    _, gates = gates_forward(scores_TE, expert_TK, GatingConfig(top_k=expert_TK.shape[1], normalize="sum"))
    return softmax_backward(gates_backward(dgate_TK, gates), softmax)


def _sum_held_fixed(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    scores_TE, softmax = softmax_forward(logits_TE)
    _, gates = gates_forward(scores_TE, expert_TK, GatingConfig(top_k=expert_TK.shape[1]))
    total = np.take_along_axis(scores_TE, expert_TK, axis=1).sum(1, keepdims=True)
    return softmax_backward(gates_backward(dgate_TK / total, gates), softmax)


def _sum_forgotten(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    total = np.take_along_axis(softmax_forward(logits_TE)[0], expert_TK, axis=1).sum(1, keepdims=True)
    return _router_backward(dgate_TK * total, logits_TE, expert_TK)


def _without_division(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    scores_TE, softmax = softmax_forward(logits_TE)
    _, gates = gates_forward(scores_TE, expert_TK, GatingConfig(top_k=expert_TK.shape[1]))
    return softmax_backward(gates_backward(dgate_TK, gates), softmax)


def _without_softmax(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    _, gates = gates_forward(softmax_forward(logits_TE)[0], expert_TK, GatingConfig(top_k=expert_TK.shape[1], normalize="sum"))
    return gates_backward(dgate_TK, gates)


def _softmax_as_sigmoid(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    scores_TE = softmax_forward(logits_TE)[0]
    return _without_softmax(dgate_TK, logits_TE, expert_TK) * scores_TE * (1 - scores_TE)


def _by_slot(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    scores_TE, softmax = softmax_forward(logits_TE)
    _, gates = gates_forward(scores_TE, expert_TK, GatingConfig(top_k=expert_TK.shape[1], normalize="sum"))
    dchosen_TK = np.take_along_axis(gates_backward(dgate_TK, gates), expert_TK, axis=1)
    dscores_TE = np.zeros_like(scores_TE)
    dscores_TE[:, : expert_TK.shape[1]] = dchosen_TK
    return softmax_backward(dscores_TE, softmax)


def _cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(3)
    logits_TE = rng.standard_normal((6, 5))
    return (
        Case("6 tokens, 5 experts, K = 2", (rng.standard_normal((6, 2)), logits_TE, top_k(logits_TE, 2))),
        Case("every expert chosen", (rng.standard_normal((6, 5)), logits_TE, top_k(logits_TE, 5))),
        Case("choices that are not the best ones, as under a bias", (rng.standard_normal((6, 3)), logits_TE, top_k(-logits_TE, 3))),
    )


EXERCISE = Exercise(
    {"dlogits": ("token", "expert")}, _router_backward, _cases(),
    (
        Mistake(_sum_held_fixed,
                "The sum of the chosen scores is taken for a constant. It depends on each of them: hence the term − Σ_j dg_j g_j."),
        Mistake(_sum_forgotten, "The end of step 1 is missing: dg_k − Σ_j dg_j g_j is divided by S, the sum of the chosen scores, as each "
                "of these scores was on the way forwards."),
        Mistake(_without_division, "Step 1 is missing: this is the gradient of gates that nobody divided by their sum. Then experts that "
                "were not chosen get a gradient, too; after the division their logits cancel."),
        Mistake(_without_softmax, "This is the gradient of the scores. One step is missing: back through the softmax, to the logits."),
        Mistake(_softmax_as_sigmoid,
                "s (1 − s) is only the diagonal of softmax's derivative: raising one logit also lowers every other score."),
        Mistake(_by_slot, "The gradient of slot k was put into column k. It belongs into the column of the expert, expert[t, k]."),
    ),
    chapter="docs/chapters/gradients.md#by-hand",
)  # fmt: skip
