"""Counts what interpreted kernels read, write and multiply."""

# pyright: reportAttributeAccessIssue=false
# The operations of the interpreter are replaced while it runs.

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from triton.runtime import interpreter


class Counted:
    """One launch: its kernel, the FLOPs of its products, and how many bytes at different addresses it reads and writes."""

    def __init__(self, kernel: str) -> None:
        self.kernel = kernel
        self.flops = 0
        self._seen: dict[tuple[str, int], list[NDArray[np.uint64]]] = {}

    def touch(self, kind: str, pointers: Any, mask: Any) -> None:
        """Note the addresses of one load ("read") or store ("write") whose lanes are on."""
        shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
        used = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data, shape).astype(bool)]
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        self._seen.setdefault((kind, size), []).append(np.unique(used.astype(np.uint64)))

    @property
    def bytes(self) -> int:
        """Bytes at different addresses, reads and writes together."""
        return sum(size * len(np.unique(np.concatenate(found))) for (_, size), found in self._seen.items())


@contextmanager
def counted() -> Iterator[list[Counted]]:
    """Inside the block every launch of an interpreted kernel is counted."""
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    stock = builder.create_masked_load, builder.create_masked_store, builder.create_dot, executor.__call__
    launches: list[Counted] = []

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        launches[-1].touch("read", pointers, mask)
        return stock[0](self, pointers, mask, *rest, **named)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        launches[-1].touch("write", pointers, mask)
        return stock[1](self, pointers, value, mask, *rest, **named)

    def dot(self: Any, left: Any, right: Any, *rest: Any, **named: Any) -> Any:
        launches[-1].flops += 2 * left.data.shape[0] * left.data.shape[1] * right.data.shape[1]
        return stock[2](self, left, right, *rest, **named)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        launches.append(Counted(self.fn.__name__))
        return stock[3](self, *arguments, **named)

    builder.create_masked_load, builder.create_masked_store, builder.create_dot, executor.__call__ = load, store, dot, call
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store, builder.create_dot, executor.__call__ = stock
