"""Write the README's table of the benchmark anew, from the committed result: `make readme`, and `make bench` when it has measured."""

from __future__ import annotations

import re

import sources
import timings

README = sources.ROOT / "README.md"
BEGIN, END = "<!-- from docs/results/bench-cpu.json -->", "<!-- end -->"


def table() -> str:
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


def filled(text: str) -> str:
    """The README with the table between its two marks. Raises ValueError where there is not exactly one such place."""
    made, count = re.subn(f"{re.escape(BEGIN)}\n.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{table()}\n{END}", text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"{README.name} has {count} places between {BEGIN!r} and {END!r}; it must have one")
    return made


if __name__ == "__main__":
    README.write_text(filled(README.read_text(encoding="utf-8")), encoding="utf-8")
