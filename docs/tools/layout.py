"""Numbers and tables as the pages print them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
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


def _is_word(cell: str) -> bool:
    return bool(re.match(r"[*_~`<]*[^\W\d]", cell))
