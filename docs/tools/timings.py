"""Tables of the benchmark's page, from the committed result of `make bench`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import sources
from layout import definitions, digits, markdown, tabs

from optimized.benchmarks import verdicts
from optimized.benchmarks.journal import revive
from optimized.benchmarks.peers import OURS, RIVAL
from optimized.benchmarks.shapes import MODES, SHAPES

RESULT = "docs/results/bench-cpu.json"
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}
Json = dict[str, Any]


@functools.cache
def result() -> Json:
    """The committed result, its spreads as such."""
    return revive(json.loads((sources.ROOT / RESULT).read_text(encoding="utf-8")))


def candidate(measurement: Json, name: str = OURS) -> Json:
    """Its row of a measurement."""
    return next(row for row in measurement["candidates"] if row["name"] == name)


def _size(count: float | None) -> str:
    return "–" if count is None else f"{digits(count / 2**20, 1)}"


def speeds(mode: str, threads: int = 1) -> str:
    """Every measurement of a mode, a tab for each shape: time, fraction of the limit, and times the best peer; bold where it is faster."""
    rows: dict[str, list[list[str]]] = {}
    for one in result()["measurements"]:
        if one["mode"] == mode and (one["threads"] > 1) == (threads > 1):
            own, peer = candidate(one), verdicts.best_peer(one)
            times = ["–", "–"] if peer is None else [digits(peer["times_ours"].median, 2), peer["name"].replace("_", "\\_")]
            if peer is not None and peer["times_ours"].median < 1:
                times[0] = f"**{times[0]}**"
            milliseconds, fraction = own["milliseconds"].median, own["fraction"].median
            cells = digits(one["tokens"], 0), DTYPES[one["dtype"]], digits(milliseconds, 2), digits(fraction, 2), *times
            rows.setdefault(one["shape"], []).append([*cells])
    header = ["T", "dtype", "ms", "of the limit", "× best peer", "best peer"]
    return tabs({shape: markdown(header, own) for shape, own in rows.items()})


def summary() -> str:
    """By shape, mode and tokens: fraction of the limit and times the best peer, on one thread in fp32."""
    chosen = [one for one in result()["measurements"] if one["threads"] == 1 and one["dtype"] == "float32"]
    tokens = sorted({one["tokens"] for one in chosen})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for one in chosen:
        peer = verdicts.best_peer(one)
        times = "–" if peer is None else digits(peer["times_ours"].median, 1)
        cells.setdefault((one["shape"], one["mode"]), {})[one["tokens"]] = f"{digits(candidate(one)['fraction'].median, 2)} · {times}×"
    rows = [[f"{shape}, {mode}", *(row.get(count, "–") for count in tokens)] for (shape, mode), row in cells.items()]
    return markdown(["of the limit · × best peer", *(f"T = {count:,}" for count in tokens)], rows)


def memory() -> str:
    """What a forward keeps for its backward and how far the process grows in a step, in MiB, ours beside grouped_mm; a tab a shape."""
    rows: dict[str, list[list[str]]] = {}
    for one in result()["measurements"]:
        if one["mode"] == MODES[1] and one["threads"] == 1 and one["tokens"] >= 1024:
            pair = [candidate(one), next((row for row in one["candidates"] if row["name"] == RIVAL), {})]
            saved = [row.get("saved_bytes") for row in pair]
            share = digits(saved[0] / saved[1], 2) if all(saved) else "–"
            peaks = [_size(row.get("peak_bytes")) for row in pair]
            cells = digits(one["tokens"], 0), DTYPES[one["dtype"]], *map(_size, saved), share, *peaks
            rows.setdefault(one["shape"], []).append([*cells])
    header = ["T", "dtype", "kept, ours", "kept, theirs", "share", "growth, ours", "growth, theirs"]
    return tabs({shape: markdown(header, own) for shape, own in rows.items()})


def sweep(name: str) -> str:
    """One thing varied, a tab for each mode: our time and grouped_mm's, each as a multiple of its own first, and what the tokens touch."""
    rows: dict[str, list[list[str]]] = {}
    for one in (one for one in result()["sweeps"] if one["sweep"] == name):
        by = {(row["name"], row["at"]): row for row in one["rows"]}
        for at in dict.fromkeys(row["at"] for row in one["rows"]):
            own, rival = by[OURS, at], by.get((RIVAL, at))
            others = ["–", "–"] if rival is None else [digits(rival["milliseconds"].median, 2), digits(rival["times_first"].median, 2)]
            touched = own["touched_experts"], digits(own["touched_bytes"] / own["tokens"] / 2**10, 0)
            cells = digits(own["milliseconds"].median, 2), digits(own["times_first"].median, 2), *others, *touched
            rows.setdefault(one["mode"], []).append([at.replace(" ", "\u00a0"), *cells])
    header = ["", "ours, ms", "× first", "theirs, ms", "× first", "experts touched", "KiB a token"]
    return tabs({mode: markdown(header, own) for mode, own in rows.items()})


def goals() -> str:
    """How many of each kind of goal are reached, and the one that is farthest away."""
    found, rows = verdicts.verdicts(result()), []
    for measure in dict.fromkeys(verdict.measure for verdict in found):
        own = [verdict for verdict in found if verdict.measure == measure]
        reached = sum(verdict.verdict in ("reached", "beyond") for verdict in own)
        worst = min(own, key=lambda v: v.must / v.value if v.smaller else v.value / v.must)
        kind = "at most" if worst.smaller else "at least"
        rows.append([measure, f"{reached} of {len(own)}", f"{digits(worst.value, 2)} and must be {kind} {worst.must:g}: {worst.where}"])
    return markdown(["goal", "reached", "the farthest from it"], rows, numbers=False)


def missed() -> str:
    """Every goal that is not reached, a tab for each kind, the farthest first."""
    found = [verdict for verdict in verdicts.verdicts(result()) if verdict.verdict in ("missed", "far under")]
    found.sort(key=lambda v: v.must / v.value if v.smaller else v.value / v.must)
    rows: dict[str, list[list[str]]] = {}
    for v in found:
        rows.setdefault(v.measure, []).append([v.where, digits(v.value, 2), f"{v.must:g}"])
    return tabs({measure: markdown(["where", "value", "must"], own) for measure, own in rows.items()}) or "None."


def losses() -> str:
    """Every measurement in which somebody else is faster."""
    found = verdicts.losses(result())
    return "\n".join(f"- {line}" for line in found) or "In none of the measurements."


def facts() -> str:
    """Machine, versions and settings."""
    data, machine = result(), result()["machine"]
    settings = {name: value for name, value in machine["environment"].items() if value is not None}
    loads = data["load_average"]
    rows = [
        ["processor", f"{machine['processor']}, {machine['cores']} cores, {machine['capability']}"],
        ["our kernel", machine["native"]],
        ["versions", ", ".join(f"{name} {version}" for name, version in {"Python": machine["python"], **machine["versions"]}.items())],
        ["settings", ", ".join(f"`{name}={value}`" for name, value in settings.items()) or "none"],
        ["load average", f"{' '.join(map(str, loads['before']))} before, {' '.join(map(str, loads['after']))} after"],
        ["measurements", f"{len(data['measurements'])} and {len(data['sweeps'])} sweeps in {digits(data['seconds'], 0)} s"],
    ]
    return definitions(rows)


def sizes(name: str) -> str:
    """A shape in words."""
    shape = SHAPES[name]
    return f"{shape.experts} experts of width {shape.width:,}, {shape.top_k} chosen, at D = {shape.d_model}"


def counts() -> Json:
    """Numbers for sentences: measurements, losses, goals, and how much longer ours takes inside transformers."""
    found, inside = verdicts.verdicts(result()), verdicts.inside_transformers(result())
    reached = sum(verdict.verdict in ("reached", "beyond") for verdict in found)
    worst = max((spread.median for _, spread in inside), default=None)
    numbers = {"measurements": len(result()["measurements"]), "losses": len(verdicts.losses(result()))}
    return numbers | {"goals": len(found), "reached": reached, "inside": "–" if worst is None else digits(worst, 2)}


TABLES: dict[str, Callable[[], str]] = {
    "bench-summary": summary, "bench-goals": goals, "bench-missed": missed, "bench-losses": losses, "bench-machine": facts,
    "bench-memory": memory,
    "bench-forward": partial(speeds, MODES[0]), "bench-backward": partial(speeds, MODES[1]),
    "bench-forward-threads": partial(speeds, MODES[0], 2), "bench-backward-threads": partial(speeds, MODES[1], 2),
    "bench-experts": partial(sweep, "experts"), "bench-load": partial(sweep, "load"), "bench-batch": partial(sweep, "batch"),
}  # fmt: skip

if __name__ == "__main__":
    print(summary())
