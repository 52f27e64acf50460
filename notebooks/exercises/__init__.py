"""One exercise a file: the reference's function, the inputs on which an answer is run beside it, and the usual mistakes.

`EXERCISE` of `notebooks/exercises/keep.py` is the exercise "keep". A mistake is a function that is wrong in a known way; where the bug
museum has it, it is the museum's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from reference.config import require

NAMES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


class Case(NamedTuple):
    """why: what this input is there to catch;  arguments: by position."""

    why: str
    arguments: tuple[Any, ...]


class Mistake(NamedTuple):
    """function: wrong in a usual way;  hint: what to tell who wrote it."""

    function: Callable
    hint: str


@dataclass(frozen=True)
class Exercise:
    """outputs: the name of each array that the function returns → the names of its axes;  truth: the reference's function.

    chapter: where the idea is explained, a page of `docs/` and a section of it;
    eager: the same computed plainly in float32, where an answer may compute in it; without it the truth rounded to float32.
    """

    outputs: Mapping[str, tuple[str, ...]]
    truth: Callable
    cases: tuple[Case, ...]
    mistakes: tuple[Mistake, ...]
    chapter: str
    eager: Callable | None = None


def get(name: str) -> Exercise:
    """The exercise of this name. Raises ValueError for an unknown one."""
    require(name in NAMES, f"there is no exercise {name!r}; known: {', '.join(NAMES)}")
    return importlib.import_module(f".{name}", __name__).EXERCISE
