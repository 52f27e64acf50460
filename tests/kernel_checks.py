"""Looks over the shoulder of kernels in Triton's interpreter: every address they read and write, every product, the order of programs.

The interpreter dereferences pointers without a check and runs one program after the other, so what a GPU would punish stays hidden:
reading past the end, two programs that write one element, a program that reads what another has written.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from numpy.typing import NDArray
from triton.runtime import interpreter

from optimized.kernels import is_interpreting

INTERPRETED = is_interpreting()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Access(NamedTuple):
    """What one load or store touched: addresses of elements, each so many bytes large."""

    program: int
    address: NDArray[np.uint64]
    size: int


class Launch:
    """One launch: whose memory it may touch, what it touched, and the FLOPs of its products."""

    def __init__(self, kernel: str, tensors: list[torch.Tensor], halt: bool) -> None:
        self.kernel, self.halt = kernel, halt
        self.extents = [(t.data_ptr(), t.data_ptr() + _reach(t) * t.element_size()) for t in tensors if t.numel()]
        self.reads: list[Access] = []
        self.writes: list[Access] = []
        self.flops = 0
        self.errors: list[str] = []

    def touch(self, kind: str, access: Access) -> None:
        program, address, size = access
        inside = np.zeros(address.shape, bool)
        for first, end in self.extents:
            inside |= (address >= first) & (address + np.uint64(size) <= end)
        if not inside.all():
            self.errors.append(f"{self.kernel}, program {program}: {kind} of {np.count_nonzero(~inside)} elements out of bounds")
            if self.halt:
                raise AssertionError(self.errors[-1])
        if kind == "write" and len(np.unique(address)) < len(address):
            self.errors.append(f"{self.kernel}, program {program}: two lanes write one element")
        (self.writes if kind == "write" else self.reads).append(access)

    @property
    def bytes(self) -> int:
        """Bytes at different addresses, reads and writes apart."""
        return sum(_different_bytes(touched) for touched in (self.reads, self.writes))

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


def _different_bytes(touched: list[Access]) -> int:
    sizes = {access.size for access in touched}
    return sum(size * len(np.unique(np.concatenate([one.address for one in touched if one.size == size]))) for size in sizes)


def _flat(touched: list[Access]) -> tuple[NDArray[np.uint64], NDArray[np.uint64]]:
    if not touched:
        return np.zeros(0, np.uint64), np.zeros(0, np.uint64)
    lengths = [len(access.address) for access in touched]
    return np.concatenate([access.address for access in touched]), np.repeat(np.array([one.program for one in touched], np.uint64), lengths)


def _access(program: int, pointers: Any, mask: Any) -> Access:
    shape = np.broadcast_shapes(pointers.data.shape, mask.data.shape)
    used = np.broadcast_to(pointers.data, shape)[np.broadcast_to(mask.data, shape).astype(bool)]
    return Access(program, used.astype(np.uint64), max(1, pointers.get_element_ty().primitive_bitwidth // 8))


@contextmanager
def watched(*, halt: bool = False) -> Iterator[list[Launch]]:
    """Inside the block every access of every launch is recorded; an access that must not be raises AssertionError when the block ends.

    halt: one out of bounds raises at once, before it is made; what a kernel does after it is nobody's to say.
    """
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    stock_load, stock_store, stock_dot = builder.create_masked_load, builder.create_masked_store, builder.create_dot
    stock_call, stock_place = executor.__call__, builder.set_grid_idx
    launches: list[Launch] = []
    program = itertools.count()
    now = [0]

    def load(self: Any, pointers: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        launches[-1].touch("read", _access(now[0], pointers, mask))
        return stock_load(self, pointers, mask, *rest, **named)

    def store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any, **named: Any) -> Any:
        launches[-1].touch("write", _access(now[0], pointers, mask))
        return stock_store(self, pointers, value, mask, *rest, **named)

    def dot(self: Any, left: Any, right: Any, *rest: Any, **named: Any) -> Any:
        launches[-1].flops += 2 * left.data.shape[0] * left.data.shape[1] * right.data.shape[1]
        return stock_dot(self, left, right, *rest, **named)

    def place(self: Any, *index: int) -> None:
        now[0] = next(program)
        stock_place(self, *index)

    def call(self: Any, *arguments: Any, **named: Any) -> Any:
        tensors = [value for value in (*arguments, *named.values()) if isinstance(value, torch.Tensor)]
        launches.append(Launch(self.fn.__name__, tensors, halt))
        return stock_call(self, *arguments, **named)

    changed = {"create_masked_load": load, "create_masked_store": store, "create_dot": dot, "set_grid_idx": place}
    with mock.patch.multiple(builder, **changed), mock.patch.object(executor, "__call__", call):
        yield launches
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

    with mock.patch.multiple(builder, set_grid_dim=size, set_grid_idx=place):
        yield
