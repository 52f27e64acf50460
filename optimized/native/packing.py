"""When packed copies of weights pay, and how they are kept in step with the parameters.

A forward reads each weight once per pass in the order of its panels. Where weights stand still that order is made once and kept; where
they are trained it would be thrown away after every step, so each panel is made as it is used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from weakref import ReferenceType, ref

from torch import Tensor

from .library import Library, make_call


@dataclass
class _Entry:
    """up, down: the stacks; state: what both were when last seen; packed: their copies, from the second time on."""

    up: ReferenceType[Tensor]
    down: ReferenceType[Tensor]
    state: tuple[int, ...]
    packed: tuple[Tensor, Tensor] | None = None


# By the identity of up, since tensors compare by value; an entry goes with its tensor, before another one can have its identity.
_entries: dict[int, _Entry] = {}


def entry_of(up: Tensor) -> _Entry | None:
    """What is known of a stack of weights."""
    entry = _entries.get(id(up))
    return entry if entry is not None and entry.up() is up else None


def _state(library: Library, up: Tensor, down: Tensor) -> tuple[int, ...]:
    # Writing through .data or a NumPy view raises no version counter; a sample of the values notices nearly all of that.
    at, below = up.data_ptr(), down.data_ptr()
    return up._version, at, down._version, below, library.sample(at, up.nbytes), library.sample(below, down.nbytes)


def packed(library: Library, up: Tensor, down: Tensor, activation: int, threads: int) -> tuple[Tensor | None, Tensor | None]:
    """The packed copies of up [E, M, D] and down [E, D, F], made when the same unchanged tensors are met for the second time.

    A gated activation's copies hold gate and up rows side by side. They need as much memory again as the weights, and go with them;
    MOEBIUS_PACK=0 makes none.
    """
    entry = entry_of(up)
    if entry is None and (os.environ.get("MOEBIUS_PACK") == "0" or up.is_inference() or down.is_inference() or not up.numel()):
        return None, None
    state = _state(library, up, down)
    if entry is None or entry.state != state or entry.down() is not down:
        key = id(up)
        _entries[key] = _Entry(ref(up, lambda _: _entries.pop(key, None)), ref(down), state)
        return None, None
    if entry.packed is None:
        entry.packed = library.pack(make_call(activation, threads, up=up, down=down))
    return entry.packed


def forget(up: Tensor) -> None:
    """Drop the packed copy of a tensor that is being trained."""
    if _entries:
        _entries.pop(id(up), None)
