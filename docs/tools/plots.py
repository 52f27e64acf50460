"""Pictures of committed results as SVG inside the page: ink and colours are the page's, so that both schemes can read them."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any

import components
import matplotlib as mpl
import measured
import numpy as np
import origins
import overviews
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
KEYED = ("collapse", "drop-by-position")
"""Pictures whose panels all have the same lines: these are named once, above them."""
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


def runs_band(axes: Axes, x: list[float], values: np.ndarray, number: int, label: str, **how: Any) -> None:
    """The mean over seeds as a line, the seeds' range as a band; values [seeds, len(x)]."""
    axes.fill_between(x, values.min(0), values.max(0), color=COLORS[number], alpha=0.18, linewidth=0)
    axes.plot(x, values.mean(0), color=COLORS[number], linestyle=LINES[number], linewidth=1.8, label=label, **how)


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
    left.axvline(found["shift"], ymax=0.76, color=INK, linewidth=0.8)
    left.annotate(
        "other text", (found["shift"], 0.66), xycoords=("data", "axes fraction"), xytext=(4, 0), textcoords="offset points", color=INK
    )
    left.set(xlabel="step")
    left.set_ylim(0, 8.5)
    left.legend(ncols=3, loc="upper left", columnspacing=1, handlelength=1.8)
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
    grid[2].set_ylim(0, 1.4)
    grid[2].legend(loc="upper left")
    return grid, "Bits beyond chance, overlap of experts and agreement of checkpoints over training, mean and range over the seeds."


def drop_by_position() -> tuple[list[Axes], str]:
    """Who is dropped along a sequence, by the queue: a router that throws dice, and the layers of a trained model."""
    found = measured.result("drop-by-position")
    summary = found["summary"]
    layers = [router for router in summary if router != "dice"]
    grid = panels("dice, % dropped", f"trained model, % dropped, {len(layers)} layers", width=4.6, height=3.1)
    for axes, routers in zip(grid, (["dice"], layers), strict=True):
        for number, order in enumerate(summary["dice"]):
            rates = np.array([[100 * rate["mean"] for rate in summary[router][order]] for router in routers])
            # Two lines coincide; their marks stand at different places.
            apart = {"marker": overviews.MARKERS[number], "markersize": 6, "markevery": (number, len(summary["dice"]))}
            runs_band(axes, list(range(1, rates.shape[1] + 1)), rates, number, order.replace("_", " "), **apart)
        axes.set_xlabel("eighth of the sequence")
    top = max(axes.get_ylim()[1] for axes in grid)
    for axes in grid:
        axes.set_ylim(0, top)
    last = summary[layers[-1]]["token_major"][-1]["mean"]
    told = f"Share dropped by place in the sequence, for {len(summary['dice'])} queues."
    return grid, f"{told} Token by token the last eighth of the last layer loses {100 * last:.0f} %."


def shares() -> tuple[list[Axes], str]:
    """What each preset stores, and what a token meets of it."""
    return components.picture(panels, COLORS, INK, FAINT, experts=False)


def parity() -> tuple[list[Axes], str]:
    """The largest error of each writing of each layer, beside the distance from 1 to the next number of two dtypes."""
    rows = measured.result("status")["rows"]
    errors = {
        "recipe": [row["recipe"]["forward"]["max"] for row in rows],
        "PyTorch": [row["autograd"]["forward"]["max"] for row in rows],
        "gradients": [row["autograd"]["gradient"]["max"] for row in rows],
    }
    worst = max(map(max, errors.values()))
    (axes,) = grid = panels("largest error, a dot for each model", width=5.2, height=2.2)
    floor = 1e-17
    for number, found in enumerate(errors.values()):
        spread = number + np.linspace(-0.25, 0.25, len(found))
        axes.scatter(np.maximum(found, floor), spread, s=16, color=COLORS[number], alpha=0.7, linewidth=0)
    for dtype in ("float64", "float32"):
        eps = float(np.finfo(dtype).eps)
        axes.axvline(eps, ymax=0.85, color=INK, linewidth=0.8, linestyle=":")
        axes.annotate(f"eps of {dtype}", (eps, 0.9), xycoords=("data", "axes fraction"), ha="center", color=INK, fontsize=10)
    axes.set(xscale="log", xlim=(floor / 2, max(1e-6, 2 * worst)), ylim=(len(errors) - 0.4, -1.0))
    axes.set_yticks(range(len(errors)), list(errors))
    axes.set_xticks([floor, 1e-15, 1e-13, 1e-11, 1e-9, 1e-7], ["0", *(f"$10^{{{power}}}$" for power in (-15, -13, -11, -9, -7))])
    axes.minorticks_off()
    told = f"The largest errors of {len(rows)} models in float64, by recipe, PyTorch and PyTorch's gradients."
    return grid, f"{told} The largest of all is {worst:.0e}."


def beginnings() -> tuple[list[Axes], str]:
    """Which expert is trusted where in the task of 1991."""
    return origins.picture(panels, COLORS, INK)


def sizes() -> tuple[list[Axes], str]:
    """What every published model stores, and what a token meets of it."""
    return components.picture(panels, COLORS, INK, FAINT)


def bench() -> tuple[list[Axes], str]:
    """How near to the limit, and how much faster than others."""
    return overviews.speeds(panels, COLORS, INK)


def kernels() -> tuple[list[Axes], str]:
    """What the compiler makes of each kernel."""
    return overviews.registers(panels, COLORS, INK)


def status() -> tuple[list[Axes], str]:
    """How far the writings of each layer are from one another."""
    return overviews.errors(panels, COLORS, INK)


PLOTS: dict[str, Callable[[], tuple[list[Axes], str]]] = {
    "collapse": collapse,
    "bias-control": bias_control,
    "specialization": specialization,
    "beginnings": beginnings,
    "sizes": sizes,
    "bench": bench,
    "kernels": kernels,
    "status": status,
    "drop-by-position": drop_by_position,
    "shares": shares,
    "parity": parity,
}
"""Name → (figure, what it shows in a sentence for those who do not see it)."""


def get(name: str) -> str:
    """The picture of this name as an element of the page. Raises ValueError with the known names."""
    if name not in PLOTS:
        raise ValueError(f"no plot {name!r}; known: {', '.join(PLOTS)}")
    with mpl.rc_context(STYLE | {"svg.hashsalt": name}):
        drawn, told = PLOTS[name]()
        pictures = "".join(page_svg(axes.figure, f"{name}-{number}") for number, axes in enumerate(drawn))
        named = key(drawn[0], name) if name in KEYED else ""
    columns = 2 if len(drawn) == 4 else min(len(drawn), 3)
    return f'<div class="moe-plots" style="--columns: {columns}" role="img" aria-label="{told}">{named}{pictures}</div>'


def swatch(line: Any) -> Figure:
    """A short piece of a line, with one of its markers."""
    figure = Figure(figsize=(0.5, 0.16))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 1), ylim=(0, 1))
    axes.axis("off")
    told = {name: line.properties()[name] for name in ("color", "linestyle", "linewidth", "marker", "markersize")}
    axes.plot([0.05, 0.5, 0.95], [0.5] * 3, markevery=[1], **told)
    return figure


def key(axes: Axes, name: str) -> str:
    """What the lines of a panel are called, for all panels of a picture."""
    pieces = [
        f"<span>{page_svg(swatch(line), f'{name}-key-{number}')}{label}</span>"
        for number, (line, label) in enumerate(zip(*axes.get_legend_handles_labels(), strict=True))
    ]
    return f'<div class="moe-key">{"".join(pieces)}</div>'


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
