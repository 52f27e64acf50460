"""When packed copies of weights pay, and how they are kept in step with the parameters.

A forward reads each weight once per pass in the order of its panels. Where weights stand still that order is made once and kept; where
they are trained it would be thrown away after every step, so each panel is made as it is used.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from weakref import ReferenceType, ref

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .library import Library, make_call


@dataclass
class _Entry:
    """down: the other stack; state: what both were when last seen; packed: their copies, from the second time on."""

    down: ReferenceType[Tensor]
    state: tuple[int, ...]
    packed: tuple[Tensor, Tensor] | None = None


_entries: WeakIdKeyDictionary = WeakIdKeyDictionary()


def _state(library: Library, up: Tensor, down: Tensor) -> tuple[int, ...]:
    # Writing through .data or a NumPy view raises no version counter; a sample of the values notices nearly all of that.
    return up._version, up.data_ptr(), down._version, down.data_ptr(), library.sample(up), library.sample(down)


def packed(library: Library, up: Tensor, down: Tensor, activation: int, threads: int) -> tuple[Tensor | None, Tensor | None]:
    """The packed copies of up [E, M, D] and down [E, D, F], made when the same unchanged tensors are met for the second time.

    A gated activation's copies hold gate and up rows side by side. They need as much memory again as the weights, and go with them;
    MOEBIUS_PACK=0 keeps none.
    """
    if os.environ.get("MOEBIUS_PACK") == "0" or up.is_inference() or down.is_inference() or not up.numel():
        return None, None
    state, entry = _state(library, up, down), _entries.get(up)
    if entry is None or entry.state != state or entry.down() is not down:
        _entries[up] = _Entry(ref(down), state)
        return None, None
    if entry.packed is None:
        entry.packed = library.pack(make_call(activation, threads, up=up, down=down))
    return entry.packed


def forget(up: Tensor) -> None:
    """Drop the packed copy of a tensor that is being trained."""
    _entries.pop(up, None)
