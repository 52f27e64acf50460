"""Looks over the shoulder of kernels in Triton's interpreter: every address they read and write, and the order their programs run in.

The interpreter dereferences pointers without a check and runs one program after the other, so what a GPU would punish stays hidden:
reading past the end, two programs that write one element, a program that reads what another has written.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from triton.runtime import interpreter

from optimized.kernels import is_interpreting

INTERPRETED = is_interpreting()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Launch:
    """One launch: whose memory it may touch, and what it touched, as (program, addresses of elements)."""

    def __init__(self, kernel: str, tensors: list[torch.Tensor], halt: bool) -> None:
        self.kernel, self.halt = kernel, halt
        self.extents = [(t.data_ptr(), t.data_ptr() + _reach(t) * t.element_size()) for t in tensors if t.numel()]
        self.reads: list[tuple[int, NDArray[np.uint64]]] = []
        self.writes: list[tuple[int, NDArray[np.uint64]]] = []
        self.errors: list[str] = []

    def touch(self, kind: str, program: int, address: NDArray[np.uint64], size: int) -> None:
        inside = np.zeros(address.shape, bool)
        for first, end in self.extents:
            inside |= (address >= first) & (address + np.uint64(size) <= end)
        if not inside.all():
            self.errors.append(f"{self.kernel}, program {program}: {kind} of {np.count_nonzero(~inside)} elements out of bounds")
            if self.halt:
                raise AssertionError(self.errors[-1])
        if kind == "write" and len(np.unique(address)) < len(address):
            self.errors.append(f"{self.kernel}, program {program}: two lanes write one element")
        (self.writes if kind == "write" else self.reads).append((program, address))

    def finish(self) -> list[str]:
        """All errors, with the elements that more than one program writes and those read after (or before) a write."""
        written, writer = _flat(self.writes)
        read, _ = _flat(self.reads)
        pairs = np.unique(np.stack([written, writer]), axis=1)
        shared = np.unique(pairs[0], return_counts=True)[1] > 1
        if shared.any():
            self.errors.append(f"{self.kernel}: {np.count_nonzero(shared)} elements are written by several programs")
        if crossed := len(np.intersect1d(read, written)):
            self.errors.append(f"{self.kernel}: {crossed} elements are both read and written")
        return self.errors


def _reach(tensor: torch.Tensor) -> int:
    """Elements from a tensor's first to the one after its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _flat(touched: list[tuple[int, NDArray[np.uint64]]]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    if not touched:
        return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    addresses = np.concatenate([address for _, address in touched])
    return addresses, np.repeat(np.array([program for program, _ in touched], np.uint64), [len(address) for _, address in touched])


def _addresses(pointers: Any, mask: Any) -> tuple[NDArray[np.uint64], int]:
    shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
    used = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data, shape).astype(bool)]
    return used.astype(np.uint64), max(1, pointers.get_element_ty().primitive_bitwidth // 8)


@contextmanager
def watched(*, halt: bool = False) -> Iterator[list[Launch]]:
    """Inside the block every access of every launch is recorded; an access that must not be raises AssertionError when the block ends.

    halt: one out of bounds raises at once, before it is made; what a kernel does after it is nobody's to say.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    stock_load, stock_store, stock_call, stock_place = (
        builder.create_masked_load, builder.create_masked_store, executor.__call__, builder.set_grid_idx
    )  # fmt: skip
    launches: list[Launch] = []
    program = itertools.count()
    now = [0]

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        launches[-1].touch("read", now[0], *_addresses(pointers, mask))
        return stock_load(self, pointers, mask, *rest, **named)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        launches[-1].touch("write", now[0], *_addresses(pointers, mask))
        return stock_store(self, pointers, value, mask, *rest, **named)

    def place(self: Any, *index: int) -> None:
        now[0] = next(program)
        stock_place(self, *index)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
        launches.append(Launch(self.fn.__name__, tensors, halt))
        return stock_call(self, *arguments, **named)

    builder.create_masked_load, builder.create_masked_store, executor.__call__, builder.set_grid_idx = load, store, call, place
    try:
        yield launches
    finally:
        builder.create_masked_load, builder.create_masked_store = stock_load, stock_store
        executor.__call__, builder.set_grid_idx = stock_call, stock_place
    errors = [error for launch in launches for error in launch.finish()]
    if errors:
        raise AssertionError("\n".join(errors[:20]))


@contextmanager
def shuffled_programs(seed: int = 0) -> Iterator[None]:
    """Inside the block the programs of a launch run in a random order."""
    builder = interpreter.InterpreterBuilder
    stock_size, stock_place = builder.set_grid_dim, builder.set_grid_idx
    places: dict[tuple[int, ...], tuple[int, ...]] = {}

    def size(self: Any, *grid: int) -> None:
        ids = list(itertools.product(*(range(extent) for extent in grid)))
        places.clear()
        places.update(zip(ids, random.Random(seed).sample(ids, len(ids)), strict=True))
        stock_size(self, *grid)

    def place(self: Any, *index: int) -> None:
        stock_place(self, *places[index])

    builder.set_grid_dim, builder.set_grid_idx = size, place
    try:
        yield
    finally:
        builder.set_grid_dim, builder.set_grid_idx = stock_size, stock_place
