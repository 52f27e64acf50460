"""Numbers and tables as the pages print them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def digits(value: float, places: int = 3) -> str:
    """A number as a page prints it, with a true minus sign and no minus before 0."""
    text = f"{value:,.{places}f}"
    return text.replace("-", "" if float(text.replace(",", "")) == 0 else "−")


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: bool = True) -> str:
    """A Markdown table; all columns but the first to the right where they hold numbers."""
    rule = ["---", *(["---:" if numbers else "---"] * (len(header) - 1))]
    return "\n".join("| " + " | ".join(map(str, row)) + " |" for row in (header, rule, *rows))
