"""Tables of the benchmark's page, from the committed result of `make bench`."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from functools import partial
from typing import Any

import sources
from layout import digits, markdown

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


def _own(measurement: Json, name: str = OURS) -> Json:
    return next(row for row in measurement["candidates"] if row["name"] == name)


def _size(count: float | None) -> str:
    return "–" if count is None else f"{digits(count / 2**20, 1)}"


def speeds(mode: str, threads: int = 1) -> str:
    """Every measurement of a mode: time, fraction of the limit, and times the best peer; in bold where somebody else is faster."""
    rows = []
    for one in result()["measurements"]:
        if one["mode"] == mode and (one["threads"] > 1) == (threads > 1):
            own, peer = _own(one), verdicts.best_peer(one)
            times = [] if peer is None else [digits(peer["times_ours"].median, 2), peer["name"]]
            if times and peer["times_ours"].median < 1:  # type: ignore[index]
                times[0] = f"**{times[0]}**"
            milliseconds, fraction = own["milliseconds"].median, own["fraction"].median
            cells = one["tokens"], DTYPES[one["dtype"]], digits(milliseconds, 2), digits(fraction, 2), *(times or ("–", "–"))
            rows.append([one["shape"], *cells])
    return markdown(["shape", "T", "dtype", "ms", "of the limit", "× best peer", "best peer"], rows)


def summary() -> str:
    """By shape, mode and tokens: fraction of the limit and times the best peer, on one thread in fp32."""
    chosen = [one for one in result()["measurements"] if one["threads"] == 1 and one["dtype"] == "float32"]
    tokens = sorted({one["tokens"] for one in chosen})
    cells: dict[tuple[str, str], dict[int, str]] = {}
    for one in chosen:
        peer = verdicts.best_peer(one)
        times = "–" if peer is None else digits(peer["times_ours"].median, 1)
        cells.setdefault((one["shape"], one["mode"]), {})[one["tokens"]] = f"{digits(_own(one)['fraction'].median, 2)} · {times}×"
    rows = [[f"{shape}, {mode}", *(row.get(count, "–") for count in tokens)] for (shape, mode), row in cells.items()]
    return markdown(["of the limit · × best peer", *(f"T = {count:,}" for count in tokens)], rows)


def memory() -> str:
    """What a forward keeps for its backward and how far the process grows in a step, ours beside grouped_mm, in MiB."""
    rows = []
    for one in result()["measurements"]:
        if one["mode"] == MODES[1] and one["threads"] == 1 and one["tokens"] >= 1024:
            pair = [_own(one), next((row for row in one["candidates"] if row["name"] == RIVAL), {})]
            saved = [row.get("saved_bytes") for row in pair]
            share = digits(saved[0] / saved[1], 2) if all(saved) else "–"
            peaks = [_size(row.get("peak_bytes")) for row in pair]
            rows.append([one["shape"], one["tokens"], DTYPES[one["dtype"]], *map(_size, saved), share, *peaks])
    header = ["shape", "T", "dtype", "kept, ours", "kept, grouped_mm", "share", "growth, ours", "growth, grouped_mm"]
    return markdown(header, rows)


def sweep(name: str) -> str:
    """One thing varied: our time and grouped_mm's, each as a multiple of its own first, and what the tokens touch."""
    rows = []
    for one in (one for one in result()["sweeps"] if one["sweep"] == name):
        by = {(row["name"], row["at"]): row for row in one["rows"]}
        for at in dict.fromkeys(row["at"] for row in one["rows"]):
            own, rival = by[OURS, at], by.get((RIVAL, at))
            others = ["–", "–"] if rival is None else [digits(rival["milliseconds"].median, 2), digits(rival["times_first"].median, 2)]
            touched = own["touched_experts"], _size(own["touched_bytes"] / own["tokens"])
            rows.append([at, one["mode"], digits(own["milliseconds"].median, 2), digits(own["times_first"].median, 2), *others, *touched])
    header = ["", "mode", "ours, ms", "× first", "grouped_mm, ms", "× first", "experts touched", "MiB a token"]
    return markdown(header, rows)


def goals() -> str:
    """How many of each kind of goal are reached, and the one that is farthest away."""
    found, rows = verdicts.verdicts(result()), []
    for measure in dict.fromkeys(verdict.measure for verdict in found):
        own = [verdict for verdict in found if verdict.measure == measure]
        reached = sum(verdict.verdict in ("reached", "beyond") for verdict in own)
        worst = min(own, key=lambda v: v.must / v.value if v.smaller else v.value / v.must)
        kind = "at most" if worst.smaller else "at least"
        rows.append([measure, f"{reached} of {len(own)}", digits(worst.value, 2), f"{kind} {worst.must:g}", worst.where])
    return markdown(["", "reached", "farthest", "must", "where"], rows)


def missed() -> str:
    """Every goal that is not reached, the farthest first."""
    found = [verdict for verdict in verdicts.verdicts(result()) if verdict.verdict in ("missed", "far under")]
    found.sort(key=lambda v: v.must / v.value if v.smaller else v.value / v.must)
    rows = [[v.where, v.measure, digits(v.value, 2), f"{v.must:g}"] for v in found]
    return markdown(["where", "measure", "value", "must"], rows) if rows else "None."


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
        ["load average before, after", f"{loads['before']}, {loads['after']}"],
        ["measurements", f"{len(data['measurements'])} and {len(data['sweeps'])} sweeps in {digits(data['seconds'], 0)} s"],
    ]
    return markdown(["", ""], rows, numbers=False)


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
