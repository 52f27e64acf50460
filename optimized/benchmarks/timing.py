"""How numbers are taken: candidates take turns, and what is reported are medians of the rounds' ratios.

A change of the machine's speed between two rounds then hits both sides of every ratio alike.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

SLOW_SECONDS = 1.0  # a candidate that takes longer is timed in the first rounds only
SLOW_ROUNDS = 3
MOST_ROUNDS = 400


class Spread(NamedTuple):
    """The median of some values, and the quartiles around it."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of at least one value."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(median, low, high)


class Candidate(NamedTuple):
    """What is timed: `step` between two looks at the clock, `prepare` before the first."""

    step: Callable[[], object]
    prepare: Callable[[], object] = lambda: None


Times = dict[str, list[float]]


def interleave(
    candidates: Mapping[str, Candidate], *, seconds: float, clock: Callable[[], float] = time.process_time, least: int = 5
) -> Times:
    """Seconds of every candidate, round by round; each round starts with another one, so that nobody always finds the same cache.

    After a warm-up, rounds go on for about `seconds` of wall clock, and at least `least` times.
    """
    taken: Times = {name: [] for name in candidates}
    slow = {name for name, candidate in candidates.items() if _once(candidate, clock) > SLOW_SECONDS}
    names, number, end = list(candidates), 0, time.perf_counter() + seconds
    while number < least or (number < MOST_ROUNDS and time.perf_counter() < end):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            if name not in slow or number < SLOW_ROUNDS:
                taken[name].append(_once(candidates[name], clock))
        number += 1
    return taken


def _once(candidate: Candidate, clock: Callable[[], float]) -> float:
    candidate.prepare()
    began = clock()
    candidate.step()
    return clock() - began


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of the rounds' ratios; a candidate with fewer rounds is compared in those it took part in."""
    return Spread.of([above / below for above, below in zip(numerator, denominator, strict=False)])
