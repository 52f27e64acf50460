"""The committed result of the beginnings as a table and a picture."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from layout import markdown
from measured import cell, result

WAYS = {
    "cooperative": "1991, cooperative",
    "expected": "1991, expected error",
    "competitive": "1991, competitive",
    "em": "1994, hierarchy by EM",
}


def table() -> str:
    """Errors of each way, mean and range over the draws of the task."""
    found = result("beginnings")["summary"]
    rows = [[name, *(cell(found[way][key], 3) for key in ("blend", "alone")), cell(found[way]["sure"])] for way, name in WAYS.items()]
    return markdown(["trained by", "error of the blend", "of the trusted expert alone", "points decided (trust\u00a0>\u00a00.9)"], rows)


def picture(panels: Callable[..., list[Any]], colors: tuple[str, ...], ink: str) -> tuple[list[Any], str]:
    """Who is trusted where, for three of the ways, on the first draw: shape and colour tell the expert, filled is decided."""
    run, shown, told = result("beginnings")["runs"][0], ("cooperative", "competitive", "em"), []
    made = panels(*(WAYS[way] for way in shown), width=3.2, height=3.2)
    for axes, way in zip(made, shown, strict=True):
        one = run["ways"][way]
        axes.axhline(0, color=ink, linewidth=0.8, linestyle=":")
        axes.axvline(0, color=ink, linewidth=0.8, linestyle=":")
        for expert, marker in enumerate("os^D"):
            for decided in (True, False):
                kinds = zip(run["points"], one["trusted"], one["decided"], strict=True)
                own = [point for point, *kind in kinds if kind == [expert, decided]]
                face = colors[expert] if decided else "none"
                axes.plot(*zip(*own, strict=True), marker, color=colors[expert], markerfacecolor=face, markersize=4) if own else None
        axes.set(xticks=(-1, 0, 1), yticks=(-1, 0, 1), aspect="equal")
        told.append(f"{WAYS[way]}: the trusted expert alone is off by {one['alone']:.3f}")
    return made, "The square of inputs, each point marked by the expert that the gate trusts most. " + "; ".join(told) + "."
