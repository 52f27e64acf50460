"""The notebooks' pictures: no background of their own, and colours that read on white and on black; a hatch repeats what a colour says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes

INK = "#7f7f7f"
COLOURS = ("#4a8fd0", "#d2762b", "#3c9a68", "#b065c0")
HATCHES = ("", "//", "..", "xx")
STYLE = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "hatch.linewidth": 0.6,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK, "xtick.color": INK, "ytick.color": INK,
}  # fmt: skip


def axes(width: float, height: float, title: str) -> Axes:
    """Axes in the style of these notebooks."""
    plt.rcParams.update(STYLE)
    _, drawn = plt.subplots(figsize=(width, height), layout="constrained")
    drawn.set_title(title)
    return drawn


def load(load_E: np.ndarray, capacity: int, experts: Sequence[str]) -> None:
    """Assignments asked for, one bar for each expert, with the capacity as a line; what lies above it is hatched."""
    drawn = axes(6, 2.6, "what is asked of each expert, and its capacity")
    kept_E = np.minimum(load_E, capacity)
    drawn.bar(experts, kept_E, color=COLOURS[0], label="accepted")
    full = [name for name, over in zip(experts, load_E > capacity, strict=True) if over]
    over_E = (load_E - kept_E)[load_E > capacity]
    drawn.bar(full, over_E, bottom=capacity, color="none", edgecolor=COLOURS[1], hatch="///", label="dropped")
    drawn.axhline(capacity, color=INK, linestyle="--", label="capacity")
    drawn.set_ylabel("assignments")
    drawn.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def gates(gates_by_router: Mapping[str, np.ndarray], experts: Sequence[str], token: str) -> None:
    """One group of bars for each router: the gate that each expert [E] gets from it, 0 where it was not chosen."""
    drawn = axes(7.5, 2.8, f"the gates of “{token}”")
    where = np.arange(len(gates_by_router))
    for expert, name in enumerate(experts):
        height = [gate_E[expert] for gate_E in gates_by_router.values()]
        drawn.bar(where + 0.2 * (expert - 1.5), height, 0.18, color=COLOURS[expert], hatch=HATCHES[expert], label=name)
    drawn.axhline(1, color=INK, linestyle=":", linewidth=1)
    drawn.set_xticks(where, list(gates_by_router))
    drawn.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def curves(x: np.ndarray, curves_by_name: Mapping[str, np.ndarray], xlabel: str, title: str) -> None:
    """Several functions of one variable, told apart by colour and by the kind of line."""
    drawn = axes(6.5, 2.8, title)
    lines = zip(curves_by_name.items(), COLOURS, ("-", "--", ":", "-."), strict=False)
    for (name, values), colour, line in lines:
        drawn.plot(x, values, color=colour, linestyle=line, linewidth=2, label=name)
    drawn.axhline(0, color=INK, linewidth=0.8)
    drawn.set_xlabel(xlabel)
    drawn.legend(loc="center left", bbox_to_anchor=(1, 0.5))
