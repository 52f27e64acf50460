"""The exercises' checkers: `check("keep", keep)` runs a learner's function beside the reference and says what is wrong with it.

An exercise knows the reference's function, the inputs on which both are run, each there for a reason, and the usual mistakes: functions
that are wrong in a known way. An answer that agrees with one of them everywhere is told which mistake it is; any other wrong one is shown
the first rows that differ. Integers must be equal, floats as equal as `reference.proof.equal` asks of float32: an answer may sum in its
own order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from reference.capacity import choice_major, keep_within_capacity, token_major
from reference.choices import choose
from reference.config import GatingConfig, require
from reference.gating import gates_backward, gates_forward, top_k
from reference.proof.equal import compare, round_to
from reference.proof.museum_capacity import second_choices_from_zero
from reference.proof.museum_gates import unstable_top_k
from reference.scores import sigmoid_forward, softmax_backward, softmax_forward
from reference.tokens import Draws, token_info

PRECISION = "float32"
ROWS_SHOWN = 3


class Case(NamedTuple):
    """why: what this input is there to catch;  arguments: by position."""

    why: str
    arguments: tuple[Any, ...]


class Mistake(NamedTuple):
    """function: wrong in a usual way;  hint: what to tell who wrote it."""

    function: Callable
    hint: str


@dataclass(frozen=True)
class Exercise:
    """outputs: the names of what the function returns, in order;  truth: the reference's function."""

    outputs: tuple[str, ...]
    truth: Callable
    cases: tuple[Case, ...]
    mistakes: tuple[Mistake, ...]


class Finding(NamedTuple):
    """passed: the answer is right;  message: why not, for the learner."""

    passed: bool
    message: str


def _arrays(returned: Any) -> tuple[np.ndarray, ...]:
    return tuple(np.asarray(array) for array in (returned if isinstance(returned, tuple) else (returned,)))


def _failures(exercise: Exercise, found: tuple[np.ndarray, ...], wanted: tuple[np.ndarray, ...]) -> list[str]:
    if len(found) != len(wanted):
        return [f"returns {len(found)} array(s); wanted: {', '.join(exercise.outputs)}"]
    lines = []
    for name, array, truth in zip(exercise.outputs, found, wanted, strict=True):
        if array.dtype.kind not in "biuf":
            return [f"{name} holds {array.dtype}, not numbers"]
        report = compare(name, array, truth, round_to(truth, PRECISION), PRECISION)
        if not report.passed:
            lines += [*report.failures, *_rows(array, truth)]
    return lines


def _rows(found: np.ndarray, truth: np.ndarray) -> list[str]:
    """The first rows that differ, one under the other."""
    if found.shape != truth.shape or truth.ndim != 2:
        return []
    with np.printoptions(precision=4, suppress=True):
        wrong = [row for row in range(len(truth)) if not np.allclose(found[row], truth[row], rtol=1e-6, atol=1e-9, equal_nan=True)]
        lines = [f"  row {row}: yours {found[row]}   reference {truth[row]}" for row in wrong[:ROWS_SHOWN]]
    return lines + ([f"  … {len(wrong)} of {len(truth)} rows differ"] if len(wrong) > ROWS_SHOWN else [])


def _run(exercise: Exercise, function: Callable, case: Case) -> list[str]:
    """What is wrong with the function on one case."""
    given = tuple(argument.copy() if isinstance(argument, np.ndarray) else argument for argument in case.arguments)
    try:
        found = _arrays(function(*given))
    except NotImplementedError:
        raise
    except Exception as error:  # whatever a learner's code raises is a finding, not a failure of the checker
        return [f"raises {type(error).__name__}: {error}"]
    if any(array.dtype == object and array.ndim == 0 and array.item() is None for array in found):
        return ["returns None: is there a `return`?"]
    if any(isinstance(a, np.ndarray) and not np.array_equal(a, b) for a, b in zip(given, case.arguments, strict=True)):
        return ["changes one of its arguments; work on a copy"]
    return _failures(exercise, found, _arrays(exercise.truth(*case.arguments)))


def _agrees(exercise: Exercise, function: Callable, mistake: Mistake) -> bool:
    """Whether the function does what the mistake does on every case."""
    as_mistaken = Exercise(exercise.outputs, mistake.function, exercise.cases, ())
    return not any(_run(as_mistaken, function, case) for case in exercise.cases)


def examine(name: str, function: Callable) -> Finding:
    """Runs a learner's function on the cases of an exercise. Raises ValueError for an unknown exercise or something not callable."""
    require(name in EXERCISES, f"there is no exercise {name!r}; known: {', '.join(EXERCISES)}")
    require(callable(function), f"check() takes the function itself, not {function!r}")
    exercise = EXERCISES[name]
    try:
        for case in exercise.cases:
            if wrong := _run(exercise, function, case):
                hints = [f"→ {mistake.hint}" for mistake in exercise.mistakes if _agrees(exercise, function, mistake)]
                return Finding(False, "\n".join([f"with {case.why}:", *wrong, *hints[:1]]))
    except NotImplementedError:
        return Finding(False, "not written yet: replace the line that raises NotImplementedError")
    return Finding(True, f"right on all {len(exercise.cases)} inputs")


def check(name: str, function: Callable) -> None:
    """Prints what `examine` finds."""
    finding = examine(name, function)
    print(f"{'✓' if finding.passed else '✗'} {name}: {finding.message}")


def _kept(queue: Callable, expert_TK: np.ndarray, capacity: int) -> np.ndarray:
    order_N = queue(np.zeros(expert_TK.shape), Draws(None))
    return keep_within_capacity(expert_TK, np.ones(expert_TK.shape, bool), np.array([capacity]), order_N, token_info(len(expert_TK)))


def _keep_cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(1)
    crowd_TK = np.stack([rng.permutation(5)[:3] for _ in range(12)])
    return (
        Case("an expert that is wanted twice first and twice second, capacity 3", (np.array([[1, 0], [0, 1], [0, 2], [2, 0]]), 3, 3)),
        Case("an expert that is exactly full", (np.array([[0, 1], [0, 2], [1, 0]]), 3, 3)),
        Case("12 tokens, 5 experts, K = 3, capacity 6", (crowd_TK, 5, 6)),
        Case("one slot for each expert", (crowd_TK, 5, 1)),
        Case("no token", (np.zeros((0, 2), np.int64), 4, 2)),
    )


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


def _v3_cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(2)
    scores_TE, bias_E = sigmoid_forward(rng.standard_normal((7, 6)))[0], rng.uniform(-0.4, 0.4, 6)
    ties_TE = np.array([[0.5, 0.5, 0.5, 0.5], [0.2, 0.6, 0.6, 0.2]])
    return (
        Case("a bias that changes who is chosen", (scores_TE, bias_E, 2, 2.5)),
        Case("equal scores: the lowest ids win", (ties_TE, np.zeros(4), 2, 1.0)),
        Case("every expert chosen", (scores_TE, bias_E, 6, 2.5)),
        Case("one expert for each token", (scores_TE, bias_E, 1, 2.5)),
    )


def _router_backward(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    scores_TE, softmax = softmax_forward(logits_TE)
    _, gates = gates_forward(scores_TE, expert_TK, GatingConfig(top_k=expert_TK.shape[1], normalize="sum"))
    return softmax_backward(gates_backward(dgate_TK, gates), softmax)


def _sum_held_fixed(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    scores_TE, softmax = softmax_forward(logits_TE)
    _, gates = gates_forward(scores_TE, expert_TK, GatingConfig(top_k=expert_TK.shape[1]))
    total = np.take_along_axis(scores_TE, expert_TK, axis=1).sum(1, keepdims=True)
    return softmax_backward(gates_backward(dgate_TK / total, gates), softmax)


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


def _backward_cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(3)
    logits_TE = rng.standard_normal((6, 5))
    return (
        Case("6 tokens, 5 experts, K = 2", (rng.standard_normal((6, 2)), logits_TE, top_k(logits_TE, 2))),
        Case("every expert chosen", (rng.standard_normal((6, 5)), logits_TE, top_k(logits_TE, 5))),
        Case("choices that are not the best ones, as under a bias", (rng.standard_normal((6, 3)), logits_TE, top_k(-logits_TE, 3))),
    )


EXERCISES: dict[str, Exercise] = {
    "keep": Exercise(
        ("keep",), lambda expert_TK, experts, capacity: _kept(choice_major, expert_TK, capacity), _keep_cases(),
        (
            Mistake(lambda expert_TK, experts, capacity: _kept(token_major, expert_TK, capacity),
                    "This serves token after token. All first choices come first: the loop over slots is the outer one."),
            Mistake(lambda expert_TK, experts, capacity: _kept(choice_major, expert_TK, capacity + 1),
                    "Each expert accepts one assignment too many: capacity C means that C were accepted before the first refusal."),
            Mistake(lambda expert_TK, experts, capacity: _kept(choice_major, expert_TK, max(capacity - 1, 0)),
                    "Each expert accepts one assignment too few: its last slot stays free."),
            Mistake(lambda expert_TK, experts, capacity: second_choices_from_zero(expert_TK, capacity),
                    "The count starts again at 0 for the second choices. An expert has C slots for all of its assignments together."),
        ),
    ),
    "gates": Exercise(
        ("expert", "gate"), _v3_gates, _v3_cases(),
        (
            Mistake(_gates_of_biased_scores,
                    "The gates are made of the biased scores. The bias decides who is chosen, the scores how much each counts."),
            Mistake(lambda scores_TE, bias_E, count, scale: _v3_gates(scores_TE, bias_E, count, 1.0),
                    "The scale has no effect: on the scores it cancels in the division by their sum. Multiply at the end."),
            Mistake(lambda scores_TE, bias_E, count, scale: _v3_gates(scores_TE, bias_E, count, scale, normalize="none"),
                    "The gates are not divided by their sum."),
            Mistake(lambda scores_TE, bias_E, count, scale: _v3_gates(scores_TE, np.zeros_like(bias_E), count, scale),
                    "The bias has no effect. Choose by scores + bias."),
            Mistake(_gates_with_loose_ties,
                    "Ties go to the highest id. Reversing an ascending sort does that; sort the negative values, stably."),
        ),
    ),
    "router_backward": Exercise(
        ("dlogits",), _router_backward, _backward_cases(),
        (
            Mistake(_sum_held_fixed,
                    "The sum of the chosen scores is taken for a constant. It depends on each of them: hence the term − Σ_j dg_j g_j."),
            Mistake(_without_softmax, "This is the gradient of the scores. One step is missing: back through the softmax, to the logits."),
            Mistake(_softmax_as_sigmoid,
                    "s (1 − s) is only the diagonal of softmax's derivative: raising one logit also lowers every other score."),
            Mistake(_by_slot, "The gradient of slot k was put into column k. It belongs into the column of the expert, expert[t, k]."),
        ),
    ),
}  # fmt: skip
"""Exercise → how it is judged."""
