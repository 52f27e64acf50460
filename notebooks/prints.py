"""What the notebooks print as a table: narrow enough for a page on a phone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence


def numbers(rows: Mapping[str, Iterable[float]], columns: Sequence[str], digits: int = 1) -> None:
    """One line for each name in `rows`, its numbers below the names of the columns; what is rounded to 0 has no sign."""
    margin = max(map(len, rows))
    print(" " * margin + "".join(f"{column:>8}" for column in columns))
    for name, values in rows.items():
        print(f"{name:>{margin}}" + "".join(f"{round(float(value), digits) + 0.0:8.{digits}f}" for value in values))
