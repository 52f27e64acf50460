"""Small training runs that put a claim of the field to the test, one module each: `run(seeds, smoke)` returns plain data.

Models are byte models smaller than the tour's. What holds at this size may not hold at another, and the other way round; a result
says what was seen here. Each committed file under docs/results/ names the command that makes it again.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Experiment(NamedTuple):
    """result: the committed file's name in docs/results/, without its ending; question: what the runs are to answer."""

    result: str
    question: str


EXPERIMENTS = {
    "collapse": Experiment("collapse", "Does a router collapse without balancing, and does balancing help?"),
    "bias": Experiment("bias-control", "How large should the step of the bias be, and what if the data change?"),
    "beginnings": Experiment("beginnings", "Do experts that compete stand alone, and does EM find them?"),
    "specialization": Experiment("specialization", "What do experts specialize in, and when?"),
    "drop": Experiment("drop-by-position", "Are the tokens at the end of a sequence dropped more often?"),
}
"""Name → experiment; `optimized.lab.NAME` is its module."""


def runner(name: str) -> Callable[[Sequence[int], bool], dict[str, Any]]:
    """The experiment's `run`. Raises ValueError with the known names."""
    if name not in EXPERIMENTS:
        raise ValueError(f"no experiment {name!r}; known: {', '.join(EXPERIMENTS)}, all")
    return importlib.import_module(f".{name}", __package__).run
