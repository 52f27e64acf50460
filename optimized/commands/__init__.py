"""The commands of `moebius`, one module each, with the name of the command.

A module has a function `run`, whose annotated arguments are the command's options and which returns a `Result`. A name in `COMMANDS` is all
that the command line needs to know. Modules import torch inside `run`, so that `moebius --help` answers at once.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

COMMANDS = ("tour", "parity", "bench", "kernels", "train", "sample", "inspect", "plan", "conformance", "model", "status", "lab")


class Result(NamedTuple):
    """What a command printed, as plain data for `--json`; good: False where it measured something that is not as it must be.

    rows: lists of the data with so many elements that the file holds each of them in one line; () spreads everything out.
    """

    data: dict[str, Any]
    good: bool = True
    rows: tuple[str, ...] = ()


def check_writable(path: Path, option: str) -> None:
    """That a file can be written there, found out before hours of work, not after them; makes its directory, leaves no file."""
    if path.is_dir():
        raise ValueError(f"{option} is {path}, which is a directory; name a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not path.exists()
    with path.open("ab"):
        pass
    if is_new:
        path.unlink()
