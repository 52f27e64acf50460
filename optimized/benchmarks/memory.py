"""Memory of a step: what a forward keeps for its backward, and how far the process grows while both run."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from .. import backends
from ..native.library import load
from ..recycling import POOL
from .peers import Runnable
from .shapes import SHAPES, Problem

STATUS, RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
RESET_PEAK = "5"


def saved_bytes(given: Problem, runnable: Runnable) -> int:
    """Bytes that a forward keeps for its backward, each storage once; inputs and weights do not count."""
    kept: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in (given.x, given.gate, given.expert, *runnable.up, *runnable.down)}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = runnable.call()
    del y
    return sum(kept.values())


def _resident(name: str) -> int:
    line = next(line for line in STATUS.read_text(encoding="ascii").splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def _give_back() -> None:
    """Freed memory, and what our fast paths keep of it, goes back to the system: the next step has to fetch its own."""
    gc.collect()
    POOL.release()
    config = next(iter(SHAPES.values())).config
    if backends.why_not("native", torch.device("cpu"), torch.float32, config) is None:
        load().release()
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "malloc_trim"):
        ctypes.CDLL(None).malloc_trim(0)


def peak_bytes(step: Callable[[], object]) -> int | None:
    """How far the process's resident memory rises above what it was, while a step runs; None where the system does not say.

    Everything counts: results, gradients, temporaries, and what libraries allocate for themselves.
    """
    _give_back()
    try:
        before = _resident("VmRSS")
        RESET.write_text(RESET_PEAK, encoding="ascii")
        step()
        return max(_resident("VmHWM") - before, 0)
    except (OSError, StopIteration):
        return None
