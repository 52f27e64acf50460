"""How numbers are taken: candidates take turns, and what is reported are medians of the rounds' ratios.

A change of the machine's speed between two rounds then hits both sides of every ratio alike.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

SLOW_TIMES = 4.0  # a candidate that takes so much longer than the middle one is timed in the first rounds only,
SLOW_SHARE = 1 / 6  # where one step of it takes this share of a measurement's time
SLOW_ROUNDS = 2
ROUNDS, MOST_ROUNDS = 5, 400
DISTURBED = 0.25  # quartiles further apart than this share of the median: the machine did something else meanwhile
MOST_TAKES = 3
PATIENCE = 8.0  # seconds that the takes of a measurement may have lasted when another one begins


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
    candidates: Mapping[str, Candidate], *, seconds: float, clock: Callable[[], float] = time.process_time, least: int = ROUNDS
) -> Times:
    """Seconds of every candidate, round by round; each round has an order of its own, so that nobody always finds the same cache.

    After a warm-up, rounds go on for about `seconds` of the given clock, and at least `least` times: a busy machine gets as many rounds in
    processor time as an idle one.
    """
    taken: Times = {name: [] for name in candidates}
    warm = {name: _once(candidate, clock) for name, candidate in candidates.items()}
    limit = max(SLOW_TIMES * statistics.median_low(warm.values()), SLOW_SHARE * seconds)
    late = {name for name, took in warm.items() if took > limit}
    slow = {name for name in late if _once(candidates[name], clock) > limit}  # what a first step prepares for all others is not slowness
    names, draw, number, began = list(candidates), random.Random(0), 0, clock()
    while number < least or (number < MOST_ROUNDS and clock() - began < seconds):
        for name in draw.sample(names, len(names)):
            if name not in slow or number < SLOW_ROUNDS:
                taken[name].append(_once(candidates[name], clock))
        number += 1
    return taken


def steadiest(
    take: Callable[[], Times], watched: Callable[[Times], Sequence[Sequence[float]]], clock: Callable[[], float] = time.perf_counter
) -> tuple[Times, int]:
    """(times, how often they were taken): once; or, where they are disturbed, up to MOST_TAKES times, and the steadiest count.

    What lasted longer than PATIENCE is not taken again: it is a mean over all that happened meanwhile.

    watched: the lists whose quartiles tell. Nothing is chosen by who was faster.
    """
    taken: list[tuple[float, Times]] = []
    began = clock()
    while not taken or (taken[-1][0] > DISTURBED and len(taken) < MOST_TAKES and clock() - began < PATIENCE):
        times = take()
        spreads = map(Spread.of, watched(times))
        taken.append((max((spread.high - spread.low) / spread.median for spread in spreads), times))
    return min(taken, key=lambda one: one[0])[1], len(taken)


def _once(candidate: Candidate, clock: Callable[[], float]) -> float:
    candidate.prepare()
    began = clock()
    candidate.step()
    return clock() - began


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> Spread:
    """The spread of the rounds' ratios; a candidate with fewer rounds is compared in those it took part in."""
    return Spread.of([above / below for above, below in zip(numerator, denominator, strict=False)])
