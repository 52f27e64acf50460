"""What the notebooks print as a table or a sentence: narrow enough for a page on a phone."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence

WIDTH = 42
"""Characters of a line that is not broken where the page is 390 pixels wide."""


def numbers(rows: Mapping[str, Iterable[float]], columns: Sequence[str], digits: int = 1) -> None:
    """One line for each name in `rows`, its numbers below the names of the columns; what is rounded to 0 has no sign."""
    margin = max(map(len, rows))
    print(" " * margin + "".join(f"{column:>8}" for column in columns))
    for name, values in rows.items():
        print(f"{name:>{margin}}" + "".join(f"{round(float(value), digits) + 0.0:8.{digits}f}" for value in values))


def sentence(text: str) -> None:
    """A sentence in short lines, all but the first indented; what a semicolon divides stands one below the other."""
    for number, part in enumerate(text.split("; ")):
        print(textwrap.fill(part, WIDTH, initial_indent="  " if number else "", subsequent_indent="  ", break_long_words=False))
