"""The pictures at the head of the pages of the project: benchmark, kernels and status, from their committed results."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import kernels
import sources
import timings
from layout import digits

from optimized.benchmarks import verdicts
from optimized.benchmarks.shapes import MODES

Panels = Callable[..., list[Any]]
MARKERS = "osD^"


def speeds(panels: Panels, colors: Sequence[str], ink: str) -> tuple[list[Any], str]:
    """Fraction of the limit and times the best peer over the number of tokens, by shape; one thread, fp32."""
    chosen = [one for one in timings.result()["measurements"] if one["threads"] == 1 and one["dtype"] == "float32"]
    titles = [f"{mode}: {what}" for mode in MODES[:2] for what in ("share of the limit", "× best of the others")]
    grid = panels(*titles, width=4.6, height=3.0)
    for place, mode in enumerate(MODES[:2]):
        for number, shape in enumerate(dict.fromkeys(one["shape"] for one in chosen)):
            own = [one for one in chosen if one["shape"] == shape and one["mode"] == mode]
            tokens = [one["tokens"] for one in own]
            shares = [timings.candidate(one)["fraction"].median for one in own]
            peers = [verdicts.best_peer(one) for one in own]
            times = [float("nan") if peer is None else peer["times_ours"].median for peer in peers]
            for axes, values in zip(grid[2 * place : 2 * place + 2], (shares, times), strict=True):
                axes.plot(tokens, values, color=colors[number], marker=MARKERS[number], markersize=5, linewidth=1.6, label=shape)
    for axes in grid:
        axes.axhline(1, color=ink, linewidth=0.8)
        axes.set(xscale="log", xlabel="tokens")
        axes.set_ylim(bottom=0)
    for axes in grid[::2]:
        axes.legend()  # on the right the line at 1 would run through it
    return grid, f"Over the number of tokens, {', '.join(titles)}. The table below has the numbers."


def used(kernel: str) -> list[dict[str, Any]]:
    """The rows of a kernel's default blocks; where it has them in bf16, these alone."""
    rows = [row for row in kernels.result()["rows"] if row["origin"] == "default" and row["role"] in kernels.KERNELS[kernel]]
    return [row for row in rows if "bfloat16" in row["dtypes"]] or rows


def registers(panels: Panels, colors: Sequence[str], ink: str) -> tuple[list[Any], str]:
    """Registers and occupancy of the default blocks by kernel and target, from the lowest to the highest."""
    found = {name: used(name) for name in kernels.KERNELS}
    targets = list(dict.fromkeys(row["target"] for rows in found.values() for row in rows))
    grid = panels("registers of a thread", "occupancy", width=4.6, height=4.4)
    for axes, key in zip(grid, ("registers", "occupancy"), strict=True):
        for number, target in enumerate(targets):
            for place, rows in enumerate(found.values()):
                values = [row[key] for row in rows if row["target"] == target]
                height, label = place + 0.19 * (number - 1.5), target if place == 0 else None
                axes.plot([min(values), max(values)], [height] * 2, color=colors[number], marker=MARKERS[number], markersize=4, label=label)
    for axes in grid:
        axes.set_yticks(range(len(found)), [name.removesuffix("_kernel").replace("_", " ") for name in found])
        axes.invert_yaxis()
        axes.set_xlim(left=0)
        axes.grid(axis="x")
        axes.figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=len(targets))
    most = max(row["registers"] for rows in found.values() for row in rows)
    return grid, f"Registers and occupancy of each kernel's default blocks on four targets; at most {digits(most, 0)} registers a thread."


def errors(panels: Panels, colors: Sequence[str], ink: str) -> tuple[list[Any], str]:
    """The largest error of every preset by the writing of its layer, and the bounds."""
    found = json.loads((sources.ROOT / "docs/results/status.json").read_text(encoding="utf-8"))
    edge = 1e-17
    grid = panels("largest error, forward", "largest error, gradients", width=4.6, height=2.1)
    for axes, direction in zip(grid, ("forward", "gradient"), strict=True):
        values = {
            track: [row[track][direction]["max"] for row in found["rows"] if direction in (row[track] or ())] for track in found["bounds"]
        }
        tracks = [track for track in values if values[track]]
        for number, track in enumerate(tracks):
            kind = list(values).index(track)
            axes.plot([edge, found["bounds"][track]], [number] * 2, color=ink, linewidth=0.8, marker="|", markersize=12)
            places = [max(value, edge) for value in values[track]]
            axes.plot(places, [number] * len(places), MARKERS[kind], color=colors[kind], alpha=0.5)
        axes.set_yticks(range(len(tracks)), tracks)
        axes.set(xscale="log", xlim=(edge / 2, 1e-10), ylim=(len(tracks) - 0.5, -0.5))
        axes.minorticks_off()
    told = "; ".join(f"{track} at most {bound:.0e}" for track, bound in found["bounds"].items())
    return grid, f"The largest errors of all presets, far below the bounds: {told}."
