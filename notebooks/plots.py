"""The notebooks' pictures: no background of their own, and colours that read on white and on black; a hatch repeats what a colour says.

Type is large for the width, and legends lie below the picture: on a phone a picture is half as wide.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

INK, LIGHTER_INK = "#7f7f7f", "#818181"
"""Two greys that nobody tells apart, one on either side of the middle: where the labels of the ticks are all of one side, Jupyter takes the
picture for one that needs a ground of the other, and lays white under it on a dark page.

The contrast of the first is 4.00 with white and 4.02 with the site's dark ground, #1e2129, whose luminance is 0.015; of the second, 3.90
and 4.13. No colour has more than √(1.05 / (0.015 + 0.05)) = 4.01 with both: 4.5 would need a dark ground of #060606 at most."""
COLOURS = ("#4a8fd0", "#d2762b", "#3c9a68", "#b065c0", "#c9525a", "#8c8a2e", "#2a9da5", "#a07855")
LINES = ("-", "--", ":", "-.")
HATCHES = ("", "//", "..", "xx")
STYLE = {
    "figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none", "legend.frameon": False,
    "axes.spines.top": False, "axes.spines.right": False, "hatch.linewidth": 0.6,
    "font.size": 12, "axes.titlesize": 13, "legend.fontsize": 12,
    "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK, "axes.titlecolor": INK, "xtick.color": INK,
    "ytick.color": LIGHTER_INK,
}  # fmt: skip
LETTERS_PER_INCH = 12
"""How much of a title fits; an inch of the width is the axis's."""
MOST_LINES = 40
"""Up to how many rows or columns the cells of a matrix are framed."""
PALEST = 0.3
"""How much of a cell's colour is there as soon as the cell is not 0: less is lost on a dark page or on a white one."""
BLUE, ORANGE = (0.29, 0.56, 0.82), (0.82, 0.46, 0.17)


def _shades(name: str, *colours: tuple[float, float, float]) -> ListedColormap:
    """Nothing at all where a number is 0, whatever lies below; then from PALEST to the full colour, for two colours on either side of 0."""
    alpha = np.linspace(PALEST, 1, 127)
    sides = [np.column_stack([np.tile(colour, (127, 1)), alpha]) for colour in colours]
    nothing = np.zeros((1, 4))
    return ListedColormap(
        np.concatenate([nothing, sides[0]] if len(sides) == 1 else [sides[0][::-1], nothing, sides[1]]), name
    ).with_extremes(bad=INK)


SHADES = _shades("shades", BLUE)
BOTH_SIDES = _shades("both sides", ORANGE, BLUE)


class Picture(Figure):
    """A figure whose text, where a picture cannot be shown, says what it shows."""

    def __repr__(self) -> str:
        return "picture: " + " · ".join(" ".join(drawn.get_title().split()) for drawn in self.axes if drawn.get_title())


def axes(width: float, height: float, *titles: str) -> Sequence[Axes]:
    """Axes beside one another in the style of these notebooks, one for each title."""
    plt.rcParams.update(STYLE)
    _, drawn = plt.subplots(1, len(titles), figsize=(width, height), layout="constrained", squeeze=False, FigureClass=Picture)
    for own, title in zip(drawn[0], titles, strict=True):
        own.set_title(balanced(title, round(LETTERS_PER_INCH * (width / len(titles) - 1))))
    return drawn[0]


def balanced(title: str, width: int) -> str:
    """The title in as few lines as fit, and these as narrow as they can be: no word is left alone."""
    lines, longest = len(textwrap.wrap(title, width)), max(map(len, title.split()))
    enough = (narrow for narrow in range(min(longest, width), width) if len(textwrap.wrap(title, narrow)) == lines)
    return textwrap.fill(title, next(enough, width))


def cells(drawn: Axes, values: np.ndarray, shades: ListedColormap, low: float, high: float) -> AxesImage:
    """A matrix, one cell a number, with a thin line around each cell where there are few enough; a number next to 0 is not drawn as 0."""
    step = (high - low) / shades.N
    if low < 0:
        values = np.where((values != 0) & (np.abs(values) < step), np.sign(values) * step, values)
    else:
        values = np.where((values > 0) & (values < step), step, values)
    image = drawn.imshow(values, aspect="auto", cmap=shades, vmin=low, vmax=high, interpolation="nearest")
    if max(values.shape) <= MOST_LINES:
        for rows, axis in ((values.shape[0], drawn.axhline), (values.shape[1], drawn.axvline)):
            for edge in range(rows + 1):
                axis(edge - 0.5, color=INK, linewidth=0.4, alpha=0.6)
    for axis in (drawn.xaxis, drawn.yaxis):
        axis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    return image


def _legend(drawn: Axes) -> None:
    """What the colours mean, below the picture in as few lines as fit; a single name that is told already is not told again."""
    handles, names = drawn.get_legend_handles_labels()
    if len(names) > 1 or names[0] not in drawn.get_ylabel() + drawn.get_title():
        columns = max(1, min(len(names), 56 // (4 + max(map(len, names)))))
        drawn.figure.legend(handles, names, loc="outside lower center", ncols=columns)


def load(load_E: np.ndarray, capacity: int, experts: Sequence[str]) -> None:
    """Assignments asked for, one bar for each expert, with the capacity as a line; what lies above it is hatched."""
    (drawn,) = axes(5.4, 3.1, "what is asked of each expert, and its capacity")
    kept_E = np.minimum(load_E, capacity)
    drawn.bar(experts, kept_E, color=COLOURS[0], label="accepted")
    full = [name for name, over in zip(experts, load_E > capacity, strict=True) if over]
    over_E = (load_E - kept_E)[load_E > capacity]
    drawn.bar(full, over_E, bottom=capacity, color="none", edgecolor=COLOURS[1], hatch="///", label="dropped")
    drawn.axhline(capacity, color=INK, linestyle="--", label="capacity")
    drawn.set_xlabel("expert")
    drawn.set_ylabel("assignments")
    _legend(drawn)


def gates(gates_by_router: Mapping[str, np.ndarray], experts: Sequence[str], token: str) -> None:
    """One group of bars for each router: the gate that each expert [E] gets from it, 0 where it was not chosen."""
    heights = {name: [gate_E[expert] for gate_E in gates_by_router.values()] for expert, name in enumerate(experts)}
    bars([textwrap.fill(name, 12) for name in gates_by_router], heights, f"the gates of “{token}”", "gate")
    plt.gca().axhline(1, color=INK, linestyle=":", linewidth=1)


def bars(groups: Sequence[str], heights: Mapping[str, Sequence[float]], title: str, ylabel: str) -> None:
    """One group of bars for each name in `groups`, and in it one bar for each series."""
    (drawn,) = axes(6, 3.2, title)
    where, width = np.arange(len(groups)), 0.8 / len(heights)
    for number, ((name, series), colour, hatch) in enumerate(zip(heights.items(), COLOURS, cycle(HATCHES), strict=False)):
        drawn.bar(where + width * (number - (len(heights) - 1) / 2), series, 0.9 * width, color=colour, hatch=hatch, label=name)
    drawn.set_xticks(where, groups)
    drawn.set_ylabel(ylabel)
    _legend(drawn)


def curves(
    x: np.ndarray,
    curves_by_name: Mapping[str, np.ndarray],
    xlabel: str,
    ylabel: str,
    title: str,
    *,
    scale: str = "linear",
    mark: float | None = None,
) -> None:
    """Several functions of one variable, told apart by colour and by the kind of line; `mark` is a place to point at."""
    (drawn,) = axes(5.4, 3.2, title)
    for (name, values), colour, line in zip(curves_by_name.items(), COLOURS, cycle(LINES), strict=False):
        drawn.plot(x, values, color=colour, linestyle=line, linewidth=2, label=name)
    if scale == "linear":
        drawn.axhline(0, color=INK, linewidth=0.8)
    if mark is not None:
        drawn.axvline(mark, color=COLOURS[1], linestyle="--")
    drawn.set_yscale(scale)
    drawn.set_xlabel(xlabel)
    drawn.set_ylabel(ylabel)
    _legend(drawn)


def shares(load_SE: np.ndarray, title: str, mark: int | None = None) -> None:
    """Who gets the tokens, step by step: one row for each expert, dark where it gets many; `mark` is a step to point at."""
    (drawn,) = axes(5.8, 3, title)
    share_ES = (load_SE / load_SE.sum(1, keepdims=True)).T
    image = cells(drawn, share_ES, SHADES, 0, float(share_ES.max()))
    drawn.figure.colorbar(image, ax=drawn, label="share of the load")
    if mark is not None:
        drawn.axvline(mark, color=COLOURS[1], linestyle="--", linewidth=2)
    drawn.set_xlabel("step")
    drawn.set_ylabel("expert")
    drawn.set_yticks(range(len(share_ES)))


def table(values: np.ndarray, rows: Sequence[str], title: str, xlabel: str, ylabel: str, size: str, columns: Sequence[str] = ()) -> None:
    """A matrix of numbers ≥ 0, strong where they are large; `size` says what the numbers are; columns without names are numbered."""
    (drawn,) = axes(5.4, 1.1 + 0.28 * len(rows), title)
    image = cells(drawn, values, SHADES, 0, float(values.max()))
    drawn.figure.colorbar(image, ax=drawn, label=size)
    drawn.set_yticks(range(len(rows)), rows)
    if columns:
        drawn.set_xticks(range(values.shape[1]), columns)
    drawn.set_xlabel(xlabel)
    drawn.set_ylabel(ylabel)


def moves(token_N: np.ndarray, expert_N: np.ndarray, titles: Sequence[str], orders: Sequence[np.ndarray]) -> None:
    """Which token each row is a copy of, before and after sorting; a colour and a mark for each expert."""
    for drawn, order_N in zip(axes(6.4, 3.6, *titles), orders, strict=True):
        for expert in np.unique(expert_N):
            own = np.flatnonzero(expert_N[order_N] == expert)
            mark = "osD^vP*X"[expert % 8]
            drawn.scatter(token_N[order_N][own], own, color=COLOURS[expert % 8], marker=mark, label=f"expert {expert}")
        drawn.invert_yaxis()
        drawn.set_xlabel("token")
        drawn.set_ylabel("row")
        drawn.xaxis.set_major_locator(MaxNLocator(integer=True))
    _legend(drawn)


def tiles(spans: Sequence[tuple[int, int, int]], height: int, experts: int) -> None:
    """The tiles along the rows, as (expert, first row, end of the expert): filled where a row is the expert's, hatched where not."""
    (drawn,) = axes(6, 1.4 + 0.3 * experts, f"tiles of {height} rows: filled is computed and stored, hatched is masked")
    for expert, first, end in spans:
        used = min(first + height, end) - first
        drawn.barh(expert, used, left=first, color=COLOURS[0], edgecolor=INK)
        drawn.barh(expert, height - used, left=first + used, color="none", edgecolor=COLOURS[1], hatch="///")
    drawn.set_yticks(range(experts), [f"expert {expert}" for expert in range(experts)])
    drawn.invert_yaxis()
    drawn.set_xlabel("row")


def difference(name: str, axis_names: Sequence[str], yours: np.ndarray, reference: np.ndarray, wrong: np.ndarray) -> None:
    """A wrong answer beside the right one, and where they differ: matrices as three tables, anything smaller as bars.

    Blue is above 0 and orange below; in the third table, which has a scale of its own, too large and too small.
    """
    yours, reference = (np.asarray(array, np.float64) for array in (yours, reference))
    if reference.ndim == 2 and reference.size:
        top = float(np.nanmax(np.abs([yours, reference]), initial=1e-30))
        yours, reference = (np.where(np.abs(values) < 1e-9 * top, 0, values) for values in (yours, reference))
        distance = np.where(wrong, yours - reference, 0)
        parts = {f"your {name}": (yours, top), "reference": (reference, top), "where they differ": (distance, _largest(distance))}
        drawn = axes(8.6, 2.8, *parts)
        for own, (values, most), label in zip(drawn, parts.values(), (None, "value", "yours − reference"), strict=True):
            image = cells(own, values, BOTH_SIDES, -most, most)
            own.set_xlabel(axis_names[1])
            if label:
                own.figure.colorbar(image, ax=own, label=label)
        drawn[0].set_ylabel(axis_names[0])
    else:
        marks = ["≠" if is_wrong else "" for is_wrong in wrong.ravel()]
        groups = [f"{place}\n{mark}" for place, mark in enumerate(marks)] if reference.ndim else ["≠"]
        bars(groups, {"yours": yours.ravel(), "reference": reference.ravel()}, f"your {name} beside the reference", name)
        plt.gca().set_xlabel(f"{axis_names[0]} (≠: differs)" if reference.ndim else "")


def _largest(values: np.ndarray) -> float:
    return float(np.max(np.abs(values), initial=1e-30, where=np.isfinite(values)))
