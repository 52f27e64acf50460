"""Memory of large tensors that have gone, for those to come.

A system hands out fresh pages full of zeros. Writing the gradients of a hundred megabytes of experts into such pages takes longer on a
CPU than computing them for a few tokens, and a training loop gives them back and asks for them anew in every step; so it does with what
each forward saves. In a virtual machine a page may even have to come from the host again.
"""

from __future__ import annotations

import ctypes
import math
import threading
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor

SMALLEST = 1 << 20  # below this an allocator keeps its pages anyway
KEPT_BYTES = 256 << 20  # at most this much waits for the next tensor; for what comes back beyond that, the oldest goes to the system


class Recycler:
    """Tensors whose memory comes back here when the last one that shares it is gone."""

    def __init__(self, most: int = KEPT_BYTES) -> None:
        """Keep at most so many bytes for the next tensors."""
        self.most = most
        self._free: list[Tensor] = []  # the oldest first
        self._waiting = 0
        self._lock = threading.RLock()  # a collection that runs while it is held may give memory back

    def empty(self, shape: Sequence[int], like: Tensor) -> Tensor:
        """An uninitialised contiguous tensor of a shape, in the dtype and on the device of another one.

        Only on a CPU is memory recycled, and only from SMALLEST bytes on; the storage of such a tensor cannot be resized.
        """
        size = math.prod(shape) * like.element_size()
        if like.device.type != "cpu" or type(like) not in (Tensor, torch.nn.Parameter) or size < SMALLEST:
            return like.new_empty(shape)
        block = self._take(size)
        lent = (ctypes.c_char * size).from_address(block.data_ptr())
        weakref.finalize(lent, self._give_back, block).atexit = False
        return torch.frombuffer(lent, dtype=like.dtype).view(shape)

    def waiting_bytes(self) -> int:
        """How much memory waits for the next tensor."""
        return self._waiting

    def release(self) -> None:
        """Give all of it to the system."""
        with self._lock:
            self._free, self._waiting = [], 0

    def _take(self, size: int) -> Tensor:
        with self._lock:
            for place in reversed(range(len(self._free))):
                if self._free[place].numel() == size:
                    self._waiting -= size
                    return self._free.pop(place)
        return torch.empty(size, dtype=torch.uint8)

    def _give_back(self, block: Tensor) -> None:
        with self._lock:
            self._free.append(block)
            self._waiting += block.numel()
            while self._waiting > self.most:
                self._waiting -= self._free.pop(0).numel()


POOL = Recycler()
"""Of the gradients of weights, and of what a forward saves for its backward."""
