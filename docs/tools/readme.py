"""Write the README's tables anew, from the committed results: `make readme`, and `make bench` when it has measured."""

from __future__ import annotations

import json
import re

import sources
import timings
from layout import markdown

from optimized.comparison import Row
from optimized.tour import worst_of_layers

README = sources.ROOT / "README.md"
BENCH, PARITY, END = "docs/results/bench-cpu.json", "docs/results/parity.json", "<!-- end -->"


def bench() -> str:
    """The summary, and how often somebody else is faster."""
    counts, machine = timings.counts(), timings.result()["machine"]
    shapes = "\n".join(f"- {name}: {timings.sizes(name)}" for name in timings.result()["plan"]["shapes"])
    return (
        f"{timings.summary()}\n\n{shapes}\n\n"
        f"fp32, one thread of {machine['processor']}; times: how many times as long the fastest other implementation of the same function\n"
        "takes. "
        f"Of {counts['measurements']} measurements, bf16 and all threads among them, somebody else is faster in {counts['losses']}; of "
        f"{counts['goals']} goals {counts['reached']} are\nreached. [How they are taken, and each of them](docs/benchmarks.md)."
    )


def parity() -> str:
    """The worst row of each track and dtype, over all cases and presets."""
    found = json.loads((sources.ROOT / PARITY).read_text(encoding="utf-8"))
    rows = worst_of_layers([Row(**row) for row in found["rows"]])
    lines = [[row.track, row.dtype, row.verdict, f"{row.rms_error:.1e}", f"{row.max_error:.1e}"] for row in rows]
    tried, accepted = found["teeth"]["tried"], len(found["teeth"]["accepted"])
    return (
        f"{markdown(['track', 'dtype', 'verdict', 'RMS error', 'largest error'], lines)}\n\n"
        f"The worst, by RMS, of {len(found['inputs'])} cases and presets, output and gradients, relative to the RMS of NumPy in float64.\n"
        f"Triton ran in its interpreter. The same verdict rejects {tried - accepted} of {tried} outputs that are wrong on purpose."
    )


BLOCKS = {PARITY: parity, BENCH: bench}


def filled(text: str) -> str:
    """The README with each table between its two marks. Raises ValueError where there is not exactly one such place."""
    for source, table in BLOCKS.items():
        begin = f"<!-- from {source} -->"
        made = f"{begin}\n{table()}\n{END}"
        text, count = re.subn(f"{re.escape(begin)}\n.*?{re.escape(END)}", lambda _, made=made: made, text, flags=re.DOTALL)
        if count != 1:
            raise ValueError(f"{README.name} has {count} places between {begin!r} and {END!r}; it must have one")
    return text


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
