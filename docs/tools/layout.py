"""Numbers and tables as the pages print them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


def digits(value: float, places: int = 3) -> str:
    """A number as a page prints it, with a true minus sign and no minus before 0."""
    text = f"{value:,.{places}f}"
    return text.replace("-", "" if float(text.replace(",", "")) == 0 else "−")


def markdown(header: Sequence[str], rows: Iterable[Sequence[Any]], *, numbers: bool = True) -> str:
    """A Markdown table; right-aligned but for the first column and those whose cells mostly begin as words."""
    told = [[str(cell) for cell in row] for row in rows]
    columns = list(zip(*told, strict=True))[1:] if told else [()] * (len(header) - 1)
    rule = ["---", *("---:" if numbers and 2 * sum(map(_is_word, column)) <= len(column) else "---" for column in columns)]
    return "\n".join("| " + " | ".join(row) + " |" for row in (header, rule, *told))


def matrix(rows: Iterable[Iterable[float]]) -> str:
    """A matrix of whole numbers in LaTeX."""
    return r"\begin{pmatrix} " + r" \\ ".join(" & ".join(f"{value:.0f}" for value in row) for row in rows) + r" \end{pmatrix}"


def _is_word(cell: str) -> bool:
    return bool(re.match(r"[*_~`<]*[^\W\d]", cell))


def definitions(rows: Iterable[Sequence[str]]) -> str:
    """Terms and what is said about each, which a narrow page can put below each other."""
    return "\n\n".join(f"{term}\n:   {text}" for term, text in rows)


def tabs(parts: Mapping[str, str]) -> str:
    """Parts of which one is shown at a time; equal titles on a page change together."""
    return "\n\n".join(f'=== "{title}"\n\n' + textwrap.indent(part, "    ") for title, part in parts.items())
