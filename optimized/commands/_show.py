"""Results as tables for a terminal of 60 columns or more. No numbers are made here."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from ..comparison import Row, Timing

STYLES = {"equal": "green", "yardstick": "cyan", "broken": "bold red", "cannot": "dim"}
LEVELS = " ▁▂▃▄▅▆▇█"
ROOMY = 80  # columns of a terminal in which every table fits unfolded
COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red")


def console() -> Console:
    """A console on the present stdout."""
    return Console(highlight=False)


def table(*columns: str, left: Sequence[str] = ()) -> Table:
    """An empty table; numbers to the right, those of `left` to the left. In a narrow terminal text folds and no number is cut."""
    narrow = console().width < ROOMY
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0 if narrow else 1), header_style="bold")
    for name in columns:
        shown = name.replace(" ", "\n") if narrow else name
        made.add_column(shown, justify="left" if name in left else "right", no_wrap=not (narrow and name in left[:1]), overflow="fold")
    return made


def error(value: float | None) -> str:
    """A relative error in two digits; a dash where there is none."""
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}"


def verdict(name: str) -> Text:
    """The verdict in its colour."""
    return Text(name, style=STYLES[name])


def parity_table(rows: Sequence[Row], columns: int) -> Table:
    """A line for each row: track, dtype, verdict, errors, flips; the worst place where there is room for it."""
    wide = columns >= 110
    names = ("track", "dtype", "verdict", "RMS error", "max error", "flips", *(("worst",) if wide else ()))
    made = table(*names, left=("track", "dtype", "verdict", "worst"))
    for row in rows:
        place = "" if row.verdict == "cannot" else f"{row.worst}, {row.where}"
        cells = [row.track, row.dtype, verdict(row.verdict), error(row.rms_error), error(row.max_error), str(row.flips)]
        made.add_row(*cells, *((place,) if wide else ()))
    return made


def failures(rows: Sequence[Row], limit: int = 6) -> list[str]:
    """The first broken bounds in words, and how many more there are."""
    lines = [f"{row.track}, {row.dtype}, {row.where}: {why}" for row in rows if row.broken for why in row.why]
    return lines[:limit] + ([f"… and {len(lines) - limit} more"] if len(lines) > limit else [])


def absences(rows: Sequence[Row]) -> list[str]:
    """Each track that cannot run, once for each reason."""
    return list(dict.fromkeys(f"{row.track} cannot run here: {why}" for row in rows if row.verdict == "cannot" for why in row.why))


def speed_table(timings: Sequence[Timing]) -> Table:
    """ms per 1000 tokens and the ratio to the yardstick."""
    made = table("track", "dtype", "ms / 1000 tokens", "× reference.autograd", left=("track", "dtype"))
    for timing in timings:
        if timing.milliseconds is None:
            made.add_row(timing.track, timing.dtype, Text("cannot", style="dim"), "")
        else:
            made.add_row(timing.track, timing.dtype, f"{timing.milliseconds:.1f}", "" if timing.ratio is None else f"{timing.ratio:.2f}")
    return made


def heat_line(share: Sequence[float], most: float, color: str, width: int) -> Text:
    """One domain over the experts: a bar per expert, the highest of the layer is full."""
    cells = [LEVELS[round((len(LEVELS) - 1) * value / most)] * width for value in share]
    return Text((" " if width > 1 else "").join(cells), style=color)


def heat_table(routing: Mapping[int, Any], domains: Sequence[str], columns: int) -> Table:
    """MoE layers × domains: which experts a domain's tokens go to."""
    experts = len(next(iter(routing.values())).share[0])
    width = 2 if 3 * experts + 30 <= columns else 1
    heading = f"experts 0 … {experts - 1}"
    made = table("layer", "domain", heading, left=("domain", heading))
    for layer, found in routing.items():
        most = max(max(row) for row in found.share)
        for number, (domain, share) in enumerate(zip(domains, found.share, strict=True)):
            bar = heat_line(share, most, COLORS[number % len(COLORS)], width)
            made.add_row(str(layer) if number == 0 else "", domain, bar)
    return made


def information_table(routing: Mapping[int, Any]) -> Table:
    """What the expert tells about the domain, in bits, beside what chance would tell."""
    made = table("layer", "bits about the domain", "by chance", "excess", "p")
    for layer, found in routing.items():
        bits = found.information
        chance = f"{bits['null_low']:.3f} – {bits['null_high']:.3f}"
        made.add_row(str(layer), f"{bits['information']:.3f}", chance, f"{bits['excess']:.3f}", f"{bits['p_value']:.3f}")
    return made


def bits_table(bits: Mapping[str, Mapping[str, float]], domains: Sequence[str]) -> Table:
    """Held-out bits per byte: a column for each model."""
    made = table("bits per byte", *bits, left=("bits per byte",))
    for domain in domains:
        made.add_row(domain, *(f"{values[domain]:.3f}" for values in bits.values()))
    return made
