"""What the numbers say: how near to the goals, and where we lose."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .peers import OURS, RIVAL
from .shapes import EXPERTS_RATIO, LIMIT, SAVED_RATIO, SCALING, goals
from .timing import Spread

FAR_UNDER = 0.5  # of what must be reached: noise does not halve a median of ratios


@dataclass(frozen=True)
class Verdict:
    """One number beside what it must reach; `smaller` is better for costs.

    verdict   "beyond" the goal | "reached" | "missed" | "far under"
    """

    where: str
    measure: str
    value: float
    must: float
    goal: float | None
    rival: str = ""
    smaller: bool = False

    @property
    def verdict(self) -> str:
        """The word for it."""
        share = self.must / self.value if self.smaller else self.value / self.must
        if share < FAR_UNDER:
            return "far under"
        if share < 1:
            return "missed"
        beyond = self.goal is not None and (self.value <= self.goal if self.smaller else self.value >= self.goal)
        return "beyond" if beyond else "reached"


def _row(measurement: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    return next((row for row in measurement["candidates"] if row["name"] == name), None)


def best_peer(measurement: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The fastest other implementation of the same function, or None where none took part."""
    others = [row for row in measurement["candidates"] if row["same_function"] and not row["ours"]]
    return min(others, key=lambda row: row["times_ours"].median, default=None)


def place(measurement: Mapping[str, Any]) -> str:
    """Where a number was taken, in words."""
    count = measurement["threads"]
    parts = (measurement["shape"], f"T = {measurement['tokens']}", measurement["dtype"], measurement["mode"])
    return ", ".join(parts) + (f", {count} threads" if count > 1 else "")


def verdicts(data: Mapping[str, Any]) -> list[Verdict]:
    """Every goal that these results can be held against."""
    found: list[Verdict] = []
    for measurement in data["measurements"]:
        found += _of_measurement(measurement)
    return found + _scaling(data["measurements"]) + _experts(data["sweeps"])


def _of_measurement(measurement: Mapping[str, Any]) -> list[Verdict]:
    ours, peer, found = _row(measurement, OURS), best_peer(measurement), []
    if ours is None:
        return []
    for goal in goals(measurement["shape"], measurement["tokens"], measurement["mode"], measurement["dtype"]):
        if goal.measure == LIMIT:
            found.append(Verdict(place(measurement), goal.measure, ours["fraction"].median, goal.must, goal.goal))
        elif peer is not None:
            found.append(Verdict(place(measurement), goal.measure, peer["times_ours"].median, goal.must, goal.goal, peer["name"]))
    rival = _row(measurement, RIVAL)
    if rival is not None and rival["saved_bytes"] and measurement["tokens"] >= 1024:
        share = ours["saved_bytes"] / rival["saved_bytes"]
        found.append(Verdict(place(measurement), "saved for the backward", share, SAVED_RATIO, None, RIVAL, smaller=True))
    return found


def _scaling(measurements: list[Mapping[str, Any]]) -> list[Verdict]:
    """Two threads against one, of the medians: the two were not interleaved."""
    found = []
    one = {(m["shape"], m["tokens"], m["dtype"], m["mode"]): m for m in measurements if m["threads"] == 1}
    for measurement in measurements:
        key = measurement["shape"], measurement["tokens"], measurement["dtype"], measurement["mode"]
        rows = [_row(m, OURS) for m in (measurement, one.get(key)) if m is not None]
        if measurement["threads"] == 2 and measurement["tokens"] >= 1024 and len(rows) == 2 and None not in rows:
            speedup = rows[1]["milliseconds"].median / rows[0]["milliseconds"].median  # type: ignore[index]
            found.append(Verdict(place(measurement), "times one thread", speedup, SCALING, None))
    return found


def _experts(sweeps: list[Mapping[str, Any]]) -> list[Verdict]:
    """The cost of the most experts against the fewest."""
    found = []
    for sweep in (sweep for sweep in sweeps if sweep["sweep"] == "experts"):
        rows = [row for row in sweep["rows"] if row["name"] == OURS]
        spread: Spread = rows[-1]["times_first"]
        where = f"{rows[-1]['at']} against {rows[0]['at']}, T = {sweep['tokens']}, {sweep['mode']}"
        found.append(Verdict(where, "cost at equal FLOPs", spread.median, EXPERTS_RATIO, None, smaller=True))
    return found


def losses(data: Mapping[str, Any]) -> list[str]:
    """Every measurement in which somebody else is faster, in words, the worst first."""
    found = []
    for measurement in data["measurements"]:
        peer = best_peer(measurement)
        if peer is not None and peer["times_ours"].median < 1:
            found.append(
                (peer["times_ours"].median, f"{place(measurement)}: {peer['name']} takes {peer['times_ours'].median:.2f} × our time")
            )
    return [line for _, line in sorted(found)]


def inside_transformers(data: Mapping[str, Any]) -> list[tuple[str, Spread]]:
    """(where, time inside transformers as a multiple of ours alone) for each measurement."""
    rows = [(place(m), _row(m, f"{OURS} in transformers")) for m in data["measurements"]]
    return [(where, row["times_ours"]) for where, row in rows if row is not None]
