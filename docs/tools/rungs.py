"""The committed counts of the ladder as a table."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from layout import markdown

RESULTS = Path(__file__).resolve().parents[1] / "results/ladder.json"


@cache
def counts() -> dict[str, Any]:
    """The committed result. Raises ValueError where there is none, with the command that makes it."""
    if not RESULTS.is_file():
        raise ValueError(f"there is no {RESULTS.name}; `make ladder` makes it")
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def rung(name: str) -> dict[str, Any]:
    """One rung's counts by its name."""
    return next(row for row in counts()["rungs"] if row["name"] == name)


def megabytes(count: float) -> str:
    """Bytes in 10⁶."""
    return f"{count / 1e6:.2f}"


def table() -> str:
    """Each rung: what it does without, launches, bytes moved, bytes kept for the backward."""
    rows = []
    for number, row in enumerate(counts()["rungs"], 1):
        label = str(number) if row["backend"] != "native" else "–"
        launches = (row[part]["launches"] for part in ("forward", "backward"))
        moved = (megabytes(row[part]["bytes"]) for part in ("forward", "backward"))
        rows.append([label, row["name"], *launches, *moved, megabytes(row["saved_bytes"])])
    return markdown(["", "rung", "launches", "backward", "MB moved", "backward", "MB saved"], rows)
