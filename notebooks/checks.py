"""The exercises' checkers: `check("keep", keep)` runs a learner's function beside the reference and says what is wrong with it.

Every wrong answer is told where it differs, by which relation if one explains it on all inputs (`differs`), and which section of which
chapter has the idea; one that agrees with a usual mistake everywhere is told which mistake it is; and it is drawn beside the reference.
Integers must be equal, floats as equal as `reference.proof.equal` asks of float32: an answer may sum in its own order.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from reference.config import require
from reference.proof.equal import Report, Tolerance, compare, rms, round_to

from . import differs, exercises
from .differs import Pair
from .exercises import Case, Exercise, Mistake

PRECISION = "float32"

Arrays = tuple[np.ndarray, ...]


class Difference(NamedTuple):
    """One output that is wrong, ready to be drawn; axes: the names of its axes."""

    name: str
    axes: tuple[str, ...]
    pair: Pair


class Finding(NamedTuple):
    """passed: the answer is right;  message: why not, for the learner;  difference: the first output that can be drawn and is wrong."""

    passed: bool
    message: str
    difference: Difference | None = None


class Answer(NamedTuple):
    """What was returned on one case, what is right, and the right thing computed plainly."""

    found: Arrays
    wanted: Arrays
    eager: Arrays


class Failure(NamedTuple):
    """What is wrong on one case: lines to print, and what to draw."""

    lines: list[str]
    difference: Difference | None = None


def _arrays(returned: Any) -> Arrays:
    return tuple(np.asarray(array) for array in (returned if isinstance(returned, tuple) else (returned,)))


def _is_unwritten(error: BaseException | None) -> bool:
    """Whether the stub raised it, or something that ran the stub, as Triton's interpreter runs a kernel."""
    return error is not None and (isinstance(error, NotImplementedError) or _is_unwritten(error.__cause__))


def _answer(exercise: Exercise, function: Callable, case: Case) -> Answer | Failure:
    """What the function returns on one case, or why that is no answer at all. Raises NotImplementedError where it is the stub."""
    given = tuple(argument.copy() if isinstance(argument, np.ndarray) else argument for argument in case.arguments)
    try:
        found = _arrays(function(*given))
    except Exception as error:  # whatever a learner's code raises is a finding, not a failure of the checker
        if _is_unwritten(error):
            raise NotImplementedError from error
        return Failure([f"raises {type(error).__name__}: {error}"])
    if any(array.dtype == object and array.ndim == 0 and array.item() is None for array in found):
        return Failure(["returns None: is there a `return`?"])
    if any(isinstance(a, np.ndarray) and not np.array_equal(a, b) for a, b in zip(given, case.arguments, strict=True)):
        return Failure(["changes one of its arguments; work on a copy"])
    if len(found) != len(exercise.outputs):
        return Failure([f"returns {len(found)} array(s); wanted: {', '.join(exercise.outputs)}"])
    for name, array in zip(exercise.outputs, found, strict=True):
        if array.dtype.kind not in "biuf":
            return Failure([f"{name} holds {array.dtype}, not numbers"])
    wanted = _arrays(exercise.truth(*case.arguments))
    eager = tuple(round_to(truth, PRECISION) for truth in wanted) if exercise.eager is None else _arrays(exercise.eager(*case.arguments))
    return Answer(found, wanted, eager)


def _compared(name: str, found: np.ndarray, truth: np.ndarray, eager: np.ndarray) -> Report:
    """The policy's verdict; where both are NaN they agree: a mistake may be, the reference never is."""
    if found.shape == truth.shape and found.dtype.kind == truth.dtype.kind == "f" and np.array_equal(np.isnan(found), np.isnan(truth)):
        found, truth, eager = (np.where(np.isnan(truth), 0, values) for values in (found, truth, eager))
    return compare(name, found, truth, eager, PRECISION)


def _wrong(found: np.ndarray, truth: np.ndarray, eager: np.ndarray) -> np.ndarray:
    """Where the two differ: farther than the policy lets one element be, or, if only their mean is too far away, not the same number."""
    if truth.dtype.kind != "f":
        return np.asarray(found != truth)
    error = np.abs(found - truth)
    bound = Tolerance(PRECISION).max_bound(float(np.max(np.abs(eager - truth), initial=0.0)), rms(truth), np.abs(truth))
    far = (error > bound) | ~np.isfinite(found)
    return np.asarray(far if far.any() else found != truth)


def _is_as_exact(found: np.ndarray, truth: np.ndarray) -> bool:
    """Whether the kind of number is one that the policy compares: floats by value, integers with integers, booleans with booleans."""
    return truth.dtype.kind == "f" or (found.dtype.kind in "biu" and (found.dtype.kind == "b") == (truth.dtype.kind == "b"))


def _failure(exercise: Exercise, answer: Answer) -> Failure | None:
    """What is wrong with an answer: of each wrong output where and how it differs, and the first one that can be drawn."""
    lines, differences = [], []
    for (name, axes), found, truth, eager in zip(exercise.outputs.items(), *answer, strict=True):
        report = _compared(name, found, truth, eager)
        if report.passed:
            continue
        if found.shape != truth.shape or not _is_as_exact(found, truth):
            lines += report.failures
            continue
        pair = Pair(found, truth, _wrong(found, truth, eager))
        lines += [f"{name}: {differs.where(axes, pair.wrong)}", *differs.places(axes, pair)]
        differences.append(Difference(name, axes, pair))
    return Failure(lines, differences[0] if differences else None) if lines else None


def _run(exercise: Exercise, function: Callable, case: Case) -> Failure | None:
    """What is wrong with the function on one case. Raises NotImplementedError where it is the stub."""
    answer = _answer(exercise, function, case)
    return answer if isinstance(answer, Failure) else _failure(exercise, answer)


def _relations(exercise: Exercise, function: Callable) -> list[str]:
    """For each output the relation to the reference's that holds on all inputs, in words; nothing where there is none."""
    names = list(inspect.signature(function).parameters)
    runs = [(_answer(exercise, function, case), dict(zip(names, case.arguments, strict=False))) for case in exercise.cases]
    answers = [(answer, given) for answer, given in runs if isinstance(answer, Answer)]
    lines = []
    for number, name in enumerate(exercise.outputs):
        outputs = [(*(arrays[number] for arrays in answer), given) for answer, given in answers]
        wrong = [output for output in outputs if not _compared(name, *output[:3]).passed]
        alike = all(found.shape == truth.shape and _is_as_exact(found, truth) for found, truth, _, _ in wrong)
        pairs = [Pair(found, truth, _wrong(found, truth, eager) if alike else truth, given) for found, truth, eager, given in wrong]
        said = differs.relation(pairs) if alike else differs.transposed(pairs)
        lines += [f"on all inputs where {name} differs: {said}"] if said else []
    return lines


def _agrees(exercise: Exercise, function: Callable, mistake: Mistake) -> bool:
    """Whether the function does what the mistake does on every case."""
    truth, eager = mistake.function, None
    if exercise.eager is not None:  # the answer computes in float32, so the mistake is one in float64 and has its own float32 beside it
        truth, eager = (lambda *given: mistake.function(*map(_wide, given))), mistake.function
    as_mistaken = replace(exercise, truth=truth, mistakes=(), eager=eager)
    return not any(_run(as_mistaken, function, case) for case in exercise.cases)


def _wide(argument: Any) -> Any:
    is_float = isinstance(argument, np.ndarray) and argument.dtype.kind == "f"
    return argument.astype(np.float64) if is_float else argument


def examine(name: str, function: Callable) -> Finding:
    """Runs a learner's function on the cases of an exercise. Raises ValueError for an unknown exercise or something not callable."""
    exercise = exercises.get(name)
    require(callable(function), f"check() takes the function itself, not {function!r}")
    try:
        for case in exercise.cases:
            if failure := _run(exercise, function, case):
                hints = [mistake.hint for mistake in exercise.mistakes if _agrees(exercise, function, mistake)][:1]
                advice = [f"→ {line}" for line in (*hints, f"the idea: {exercise.chapter}")]
                lines = [f"with {case.why}:", *failure.lines, *_relations(exercise, function), *advice]
                return Finding(False, "\n".join(lines), failure.difference)
    except NotImplementedError:
        return Finding(False, "not written yet: replace the line that raises NotImplementedError")
    return Finding(True, f"right on all {len(exercise.cases)} inputs")


def check(name: str, function: Callable) -> None:
    """Prints what `examine` finds, and draws what is wrong."""
    finding = examine(name, function)
    print(f"{'✓' if finding.passed else '✗'} {name}: {finding.message}")
    if finding.difference is not None:
        from . import plots

        name, axes, pair = finding.difference
        plots.difference(name, axes, pair.found, pair.truth, pair.wrong)
