"""The commands of `moebius`, one module each, with the name of the command.

A module has a function `run`, whose annotated arguments are the command's options and which returns a `Result`. A name in `COMMANDS` is all
that the command line needs to know. Modules import torch inside `run`, so that `moebius --help` answers at once.
"""

from __future__ import annotations

from typing import Any, NamedTuple

COMMANDS = ("tour", "parity", "bench", "kernels", "train", "sample", "model", "status", "lab")


class Result(NamedTuple):
    """What a command printed, as plain data for `--json`; good: False where it measured something that is not as it must be.

    rows: lists of the data with so many elements that the file holds each of them in one line; () spreads everything out.
    """

    data: dict[str, Any]
    good: bool = True
    rows: tuple[str, ...] = ()
