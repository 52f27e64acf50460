"""Pictures of committed results as SVG inside the page: ink and colours are the page's, so that both schemes can read them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import measured
import numpy as np
import origins
from layout import digits
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT = "#010203", "#010204"
COLORS = ("#010205", "#010206", "#010207", "#010208", "#010209")
PAGE = {INK: "currentColor", FAINT: "var(--moe-line)"} | {
    color: f"var(--moe-{name})" for color, name in zip(COLORS, ("0", "1", "2", "3", "lost"), strict=True)
}
"""Stand-ins that matplotlib draws with → what the page's style sheets say."""
LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
STYLE = {
    "svg.fonttype": "none", "path.simplify": True, "path.simplify_threshold": 0.5, "font.family": "sans-serif", "font.size": 11,
    "figure.facecolor": "none", "axes.facecolor": "none", "axes.spines.top": False, "axes.spines.right": False, "legend.frameon": False,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.titlesize": 11, "axes.titlelocation": "left", "grid.color": FAINT, "legend.fontsize": 10,
}  # fmt: skip


def panels(*titles: str, width: float = 3.5, height: float = 2.8) -> list[Axes]:
    """One picture a title, so that a narrow page can put them below each other."""
    made = []
    for title in titles:
        made.append(Figure(figsize=(width, height), layout="constrained").subplots())
        made[-1].set_title(title)
    return made


def runs_band(axes: Axes, x: list[float], values: np.ndarray, number: int, label: str) -> None:
    """The mean over seeds as a line, the seeds' range as a band; values [seeds, len(x)]."""
    axes.fill_between(x, values.min(0), values.max(0), color=COLORS[number], alpha=0.18, linewidth=0)
    axes.plot(x, values.mean(0), color=COLORS[number], linestyle=LINES[number], linewidth=1.8, label=label)


def collapse() -> tuple[list[Axes], str]:
    """MaxVio, idle experts and held-out loss over the steps, by the way of balancing."""
    found = measured.result("collapse")
    grid = panels("MaxVio", "experts without a token", "held-out bits per byte")
    for number, (name, runs) in enumerate(found["arms"].items()):
        steps = [row["step"] for row in runs[0]["rows"]]
        rows = np.array([[[np.mean(row["max_vio"]), sum(row["dead"])] for row in run["rows"]] for run in runs])
        for axes, column in zip(grid, range(2), strict=False):
            runs_band(axes, steps, smooth(rows[:, :, column]), number, name)
        bits = np.array([[np.mean(list(row["bits"].values())) for row in run["heldout"]] for run in runs])
        runs_band(grid[2], [row["step"] for row in runs[0]["heldout"]], bits, number, name)
    for axes in grid:
        axes.set_xlabel("step")
    grid[0].set_ylim(bottom=0)
    grid[1].set_ylim(bottom=0)
    grid[2].legend()
    summary = found["summary"]
    told = "; ".join(
        f"{name}: MaxVio {digits(one['max_vio']['mean'], 1)}, idle {digits(one['dead']['mean'], 1)}" for name, one in summary.items()
    )
    return grid, f"MaxVio, experts without a token and held-out loss over training. At the end: {told}."


def smooth(rows: np.ndarray, width: int = 5) -> np.ndarray:
    """Running mean over the last axis; the first places average what there is."""
    total = np.cumsum(np.pad(rows, ((0, 0), (1, 0))), axis=1)
    last = np.arange(1, rows.shape[1] + 1)
    first = np.maximum(last - width, 0)
    return (total[:, last] - total[:, first]) / (last - first)


def bias_control() -> tuple[list[Axes], str]:
    """MaxVio over the steps for each step size of the bias, and where each ends."""
    found = measured.result("bias-control")
    left, right = grid = panels("MaxVio, mean of 20 steps", "MaxVio by step size", width=4.6, height=3.1)
    shown = [rate for rate in found["arms"] if rate in ("0", "0.0001", "0.01", "0.1", "1")]
    for number, rate in enumerate(shown):
        runs = found["arms"][rate]
        values = np.array([[row["max_vio"] for row in run["rows"]] for run in runs])
        runs_band(left, [row["step"] for row in runs[0]["rows"]], values, number, "no bias" if rate == "0" else f"γ = {rate}")
    left.axvline(found["shift"], color=INK, linewidth=0.8)
    left.annotate(
        "other text", (found["shift"], 0.02), xycoords=("data", "axes fraction"), xytext=(4, 0), textcoords="offset points", color=INK
    )
    left.set(xlabel="step")
    left.set_ylim(0, 8.5)
    left.legend(ncols=2, loc="upper center")
    rates = [rate for rate in found["summary"] if float(rate)]
    for number, (key, label) in enumerate((("before", "before the change"), ("shift", "just after it"), ("after", "at the end"))):
        ends = np.array([[run["end"][key] for rate in rates for run in [found["arms"][rate][seed]]] for seed in range(len(found["seeds"]))])
        runs_band(right, [float(rate) for rate in rates], ends, number, label)
    right.set(xlabel="step of the bias, γ", xscale="log")
    right.set_ylim(bottom=0)
    right.legend()
    best = min(rates, key=lambda rate: found["summary"][rate]["after"]["mean"])
    return grid, f"MaxVio over training for several steps of the bias, and at the end by step. The most even load has γ = {best}."


def specialization() -> tuple[list[Axes], str]:
    """Bits beyond chance, overlaps and agreement over the checkpoints."""
    found = measured.result("specialization")
    runs = found["runs"]
    steps = [checkpoint["step"] for checkpoint in runs[0]["checkpoints"]]
    places = list(range(len(steps)))
    layers = list(runs[0]["checkpoints"][0]["layers"])

    def over(pick: Callable[[dict[str, Any]], float]) -> np.ndarray:
        return np.array([[np.mean([pick(one["layers"][layer]) for layer in layers]) for one in run["checkpoints"]] for run in runs])

    grid = panels("bits told, beyond chance", "overlap, beyond chance", "agreement, corrected")
    for number, label in enumerate(measured.LABELS):
        runs_band(grid[0], places, over(lambda layer, label=label: layer["information"][label]["excess"]), number, label)
    for number, name in enumerate(("weights", "outputs")):
        runs_band(grid[1], places, over(lambda layer, name=name: layer[name]["excess"]), number, name)
    kinds = (("last", "with the end"), ("last_within_byte", "… within a byte"), ("previous", "with the one before"))
    for number, (key, label) in enumerate(kinds):
        first = 1 if key == "previous" else 0
        values = over(lambda layer, key=key: layer["agreement"][key]["corrected"])[:, first:]
        runs_band(grid[2], places[first:], values, number, label)
    for axes in grid:
        axes.set_xticks(places[::2], [str(step) for step in steps[::2]])
        axes.set_xlabel("step")
        axes.legend()
    return grid, "Bits beyond chance, overlap of experts and agreement of checkpoints over training, mean and range over the seeds."


def beginnings() -> tuple[list[Axes], str]:
    """Which expert is trusted where in the task of 1991."""
    return origins.picture(panels, COLORS, INK)


PLOTS: dict[str, Callable[[], tuple[list[Axes], str]]] = {
    "collapse": collapse,
    "bias-control": bias_control,
    "specialization": specialization,
    "beginnings": beginnings,
}
"""Name → (figure, what it shows in a sentence for those who do not see it)."""


def get(name: str) -> str:
    """The picture of this name as an element of the page. Raises ValueError with the known names."""
    if name not in PLOTS:
        raise ValueError(f"no plot {name!r}; known: {', '.join(PLOTS)}")
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        drawn, told = PLOTS[name]()
        pictures = "".join(page_svg(axes.figure, f"{name}-{number}") for number, axes in enumerate(drawn))
    return f'<div class="moe-plots" role="img" aria-label="{told}">{pictures}</div>'


def page_svg(figure: Any, name: str) -> str:
    """A figure as SVG for a page: its stand-in colours become the page's, and only the ids that something refers to stay."""
    written = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(written, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = written.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    used = set(re.findall(r"(?:url\(|href=\")#([\w-]+)", text))
    text = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", text)
    text = re.sub(r' (?:width|height)="[\d.]+pt"', "", text, count=2)  # the page decides
    text = re.sub(r"font: (?:\w+ )?([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r'font-family: [^;"]*; ?| transform="rotate\(-0 [^)]*\)"', "", text)
    text = re.sub(r"<g([^>]*)>\s*((?:<use [^>]*/>\s*)+)</g>", _style_once, text)  # xlink:href, for the theme rewrites href
    # A tenth of a point is enough for places.
    text = re.sub(r' (?:d|x|y)="[^"]*"', lambda match: re.sub(r"(\d\.\d)\d+", r"\1", match[0]), text)
    for stand_in, page in PAGE.items():
        text = text.replace(stand_in, page)
    return " ".join(text.split()).replace("<svg", '<svg aria-hidden="true"', 1)


def _style_once(match: re.Match[str]) -> str:
    """A group of equal markers with the style on the group instead of on each of them."""
    styles = set(re.findall(r' style="([^"]*)"', match[2]))
    if len(styles) != 1:
        return match[0]
    return f'<g{match[1]} style="{styles.pop()}">' + re.sub(r' style="[^"]*"', "", match[2]) + "</g>"
