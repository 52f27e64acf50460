"""The compiled library through ctypes: tensors in, tensors out, no header of PyTorch."""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from .build import UnavailableError, tuned_library_path

ABI = 1
DTYPES = (torch.float32, torch.bfloat16)

_SIZES = ("tokens", "slots", "experts", "d_model", "width", "bf16", "activation", "threads")
_POINTERS = (
    *("x", "expert", "gate", "keep", "up", "down", "up_bias", "down_bias", "packed_up", "packed_down", "order", "bounds", "pre", "y"),
    *("dy", "dx", "dgate", "dup", "ddown", "dup_bias", "ddown_bias"),
)


class Call(ctypes.Structure):
    """`struct moebius_call` of call.h, field by field."""

    _fields_ = [(name, ctypes.c_int64) for name in _SIZES] + [(name, ctypes.c_void_p) for name in _POINTERS]


def make_call(activation: int, threads: int, *, down: Tensor, **tensors: Tensor | None) -> Call:
    """A call over contiguous tensors by the names of call.h; expert [T, K] and down [E, D, F] give the sizes and the dtype.

    The caller keeps the tensors alive. One that is None or empty is passed as NULL.
    """
    pointers: dict[str, int | None] = {
        name: tensor.data_ptr() if tensor is not None and tensor.numel() else None for name, tensor in tensors.items()
    }
    expert = tensors.get("expert")
    tokens, slots = (0, 1) if expert is None else expert.shape
    return Call(tokens, slots, *down.shape, down.dtype is torch.bfloat16, activation, threads, down=down.data_ptr(), **pointers)


class Library:
    """A loaded library. `forward`, `backward` and `pack` take a `Call`; they release Python's lock while they run."""

    def __init__(self, path: Path) -> None:
        """Load a library. Raises UnavailableError where the file is none, or none of this version."""
        try:
            self._c = ctypes.CDLL(str(path))
            self._c.moebius_abi.restype = ctypes.c_int64
            found = self._c.moebius_abi()
        except (OSError, AttributeError) as error:
            raise UnavailableError(f"the compiled library cannot be loaded: {error}") from None
        expected = ABI * 100000 + ctypes.sizeof(Call)
        if found != expected:
            raise UnavailableError(f"the compiled library {path} has the interface {found}, not {expected}")
        self._c.moebius_instruction_set.restype = self._c.moebius_activation.restype = ctypes.c_char_p
        self._c.moebius_activation.argtypes = [ctypes.c_int64]
        self._c.moebius_release.restype = None
        self._c.moebius_sample.argtypes, self._c.moebius_sample.restype = [ctypes.c_void_p, ctypes.c_int64], ctypes.c_uint64
        self.path = path
        self.instruction_set: str = self._c.moebius_instruction_set().decode()
        self.activations: dict[str, int] = {}
        while name := self._c.moebius_activation(len(self.activations)):
            self.activations[name.decode()] = len(self.activations)

    def forward(self, call: Call) -> None:
        """Sort, gather, experts and combine: fills order, bounds, pre and y."""
        self._check(self._c.moebius_forward(ctypes.byref(call)))

    def backward(self, call: Call) -> None:
        """All gradients of a forward whose order, bounds and pre are given."""
        self._check(self._c.moebius_backward(ctypes.byref(call)))

    def pack(self, call: Call) -> tuple[Tensor, Tensor]:
        """Both stacks of weights in the order in which the forward reads them."""
        sizes = (ctypes.c_int64 * 2)()
        self._c.moebius_packed_elements(ctypes.byref(call), sizes)
        dtype = DTYPES[call.bf16]
        packed_up, packed_down = (torch.empty(size, dtype=dtype) for size in sizes)
        no_rows = torch.zeros(call.experts + 1, dtype=torch.int32)
        call.packed_up, call.packed_down, call.bounds = packed_up.data_ptr(), packed_down.data_ptr(), no_rows.data_ptr()
        self._check(self._c.moebius_pack(ctypes.byref(call)))
        return packed_up, packed_down

    def release(self) -> None:
        """Free the workspace that is kept for the next call."""
        self._c.moebius_release()

    def sample(self, at: int, size: int) -> int:
        """A checksum of a few places spread over so many bytes at an address."""
        return self._c.moebius_sample(at, size)

    @staticmethod
    def _check(code: int) -> None:
        if code == 1:
            raise MemoryError("the native experts found no memory for their workspace")
        if code:
            raise ValueError(f"the native experts refused the call with code {code}")


_loading = threading.Lock()


@cache
def _load() -> Library | str:
    try:
        return Library(tuned_library_path())
    except UnavailableError as reason:
        return str(reason)


def load() -> Library:
    """This machine's library, compiled on first use and loaded once per process. Raises UnavailableError, with one reason for good."""
    with _loading:
        loaded = _load()
    if isinstance(loaded, str):
        raise UnavailableError(loaded)
    return loaded
