"""Runs code and checks every array it names: `gate_TK` must have two dimensions, and one letter one size inside a function call."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

SUFFIX = re.compile(r"^[a-z]\w*_([A-Z]+)$")
"""A lower-case name that ends in the letters of its shape."""


def broken_shapes(names: Mapping[str, Any]) -> list[str]:
    """What contradicts the suffixes of these named values; values without a shape (None) are left out."""
    errors, sizes = [], {}
    for name, value in names.items():
        found, shape = SUFFIX.match(name), getattr(value, "shape", None)
        if found is None or shape is None:
            continue
        letters = found[1]
        if len(letters) != len(shape):
            errors.append(f"{name} has shape {tuple(shape)}")
            continue
        for letter, size in zip(letters, shape, strict=True):
            first, expected = sizes.setdefault(letter, (name, size))
            if size != expected:
                errors.append(f"{letter} is {size} in {name} and {expected} in {first}")
    if "P" in sizes and "E" in sizes and sizes["P"][1] != sizes["E"][1] + 1:
        errors.append(f"P is {sizes['P'][1]} in {sizes['P'][0]} and E is {sizes['E'][1]} in {sizes['E'][0]}")
    return errors


class Trace:
    """What a run showed: errors, and the suffixed names seen, each as "file:function name"."""

    def __init__(self, folders: tuple[Path, ...]) -> None:
        self.prefixes = tuple(str(folder) for folder in folders)
        self.errors: list[str] = []
        self.seen: set[str] = set()

    def __call__(self, frame: FrameType, event: str, result: Any) -> None:
        code = frame.f_code
        if event != "return" or not code.co_filename.startswith(self.prefixes):
            return
        where = f"{Path(code.co_filename).name}:{code.co_name}"
        scopes = [dict(frame.f_locals)]
        values = result if type(result) is tuple else (result,)
        scopes += [value._asdict() for value in values if hasattr(value, "_asdict")]
        for scope in scopes:
            self.seen.update(f"{where} {name}" for name in scope if SUFFIX.match(name))
            self.errors += [f"{where}: {error}" for error in broken_shapes(scope)]


@contextmanager
def traced(*folders: Path) -> Iterator[Trace]:
    """Checks, inside the block, each call of a function that lies in one of the folders, when it returns."""
    trace, before = Trace(folders), sys.getprofile()
    sys.setprofile(trace)
    try:
        yield trace
    finally:
        sys.setprofile(before)
