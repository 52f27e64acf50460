"""The exercises' checkers: `check("keep", keep)` runs a learner's function beside the reference and says what is wrong with it.

An answer that agrees with one of the usual mistakes everywhere is told which mistake it is; any other wrong one is shown the first rows
that differ; and every wrong one is drawn beside the reference. Integers must be equal, floats as equal as `reference.proof.equal` asks of
float32: an answer may sum in its own order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from reference.config import require
from reference.proof.equal import compare, round_to

from . import exercises
from .exercises import Case, Exercise, Mistake

PRECISION = "float32"
ROWS_SHOWN = 3

Arrays = tuple[np.ndarray, ...]


class Difference(NamedTuple):
    """One output that is wrong, ready to be drawn."""

    name: str
    yours: np.ndarray
    reference: np.ndarray


class Finding(NamedTuple):
    """passed: the answer is right;  message: why not, for the learner;  difference: the first output that can be drawn and is wrong."""

    passed: bool
    message: str
    difference: Difference | None = None


class Failure(NamedTuple):
    """What is wrong on one case: lines to print, and what to draw."""

    lines: list[str]
    difference: Difference | None = None


def _arrays(returned: Any) -> Arrays:
    return tuple(np.asarray(array) for array in (returned if isinstance(returned, tuple) else (returned,)))


def _failure(exercise: Exercise, found: Arrays, wanted: Arrays, eager: Arrays) -> Failure | None:
    if len(found) != len(wanted):
        return Failure([f"returns {len(found)} array(s); wanted: {', '.join(exercise.outputs)}"])
    lines, differences = [], []
    for name, array, truth, plain in zip(exercise.outputs, found, wanted, eager, strict=True):
        if array.dtype.kind not in "biuf":
            return Failure([f"{name} holds {array.dtype}, not numbers"])
        if _same_nans(array, truth):
            array, truth, plain = (np.where(np.isnan(truth), 0, values) for values in (array, truth, plain))
        report = compare(name, array, truth, plain, PRECISION)
        if not report.passed:
            lines += [*report.failures, *_rows(array, truth)]
            differences += [Difference(name, array, truth)] if array.shape == truth.shape else []
    return Failure(lines, differences[0] if differences else None) if lines else None


def _same_nans(found: np.ndarray, truth: np.ndarray) -> bool:
    """Whether both are NaN at the same places and anywhere: a mistake may be, the reference never is."""
    if found.shape != truth.shape or found.dtype.kind != "f" or truth.dtype.kind != "f":
        return False
    return bool(np.isnan(truth).any() and np.array_equal(np.isnan(found), np.isnan(truth)))


def _rows(found: np.ndarray, truth: np.ndarray) -> list[str]:
    """The first rows that differ, one under the other."""
    if found.shape != truth.shape or truth.ndim != 2:
        return []
    with np.printoptions(precision=4, suppress=True):
        wrong = [row for row in range(len(truth)) if not np.allclose(found[row], truth[row], rtol=1e-6, atol=1e-9, equal_nan=True)]
        lines = [f"  row {row}: yours {found[row]}   reference {truth[row]}" for row in wrong[:ROWS_SHOWN]]
    return lines + ([f"  … {len(wrong)} of {len(truth)} rows differ"] if len(wrong) > ROWS_SHOWN else [])


def _is_unwritten(error: BaseException | None) -> bool:
    """Whether the stub raised it, or something that ran the stub, as Triton's interpreter runs a kernel."""
    return error is not None and (isinstance(error, NotImplementedError) or _is_unwritten(error.__cause__))


def _run(exercise: Exercise, function: Callable, case: Case) -> Failure | None:
    """What is wrong with the function on one case. Raises NotImplementedError where it is the stub."""
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
    wanted = _arrays(exercise.truth(*case.arguments))
    eager = tuple(round_to(truth, PRECISION) for truth in wanted) if exercise.eager is None else _arrays(exercise.eager(*case.arguments))
    return _failure(exercise, found, wanted, eager)


def _agrees(exercise: Exercise, function: Callable, mistake: Mistake) -> bool:
    """Whether the function does what the mistake does on every case."""
    truth, eager = mistake.function, None
    if exercise.eager is not None:  # the answer computes in float32, so the mistake is one in float64 and has its own float32 beside it
        truth, eager = (lambda *given: mistake.function(*map(_wide, given))), mistake.function
    as_mistaken = Exercise(exercise.outputs, truth, exercise.cases, (), eager)
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
                hints = [f"→ {mistake.hint}" for mistake in exercise.mistakes if _agrees(exercise, function, mistake)]
                return Finding(False, "\n".join([f"with {case.why}:", *failure.lines, *hints[:1]]), failure.difference)
    except NotImplementedError:
        return Finding(False, "not written yet: replace the line that raises NotImplementedError")
    return Finding(True, f"right on all {len(exercise.cases)} inputs")


def check(name: str, function: Callable) -> None:
    """Prints what `examine` finds, and draws what is wrong."""
    finding = examine(name, function)
    print(f"{'✓' if finding.passed else '✗'} {name}: {finding.message}")
    if finding.difference is not None:
        from . import plots

        plots.difference(*finding.difference)
