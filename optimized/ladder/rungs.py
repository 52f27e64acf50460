"""The ladder as a table, from the bottom up; the last rung and the one beside it are the product's own backends."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .. import native_backend, triton_backend
from . import gathered, grouped, loop, padded, sorted


@dataclass(frozen=True)
class Rung:
    """name; apply_experts, the second seam; backend: the row of `optimized.backends` whose tools it needs; saves: what it does without."""

    name: str
    apply_experts: Callable
    backend: str
    saves: str


RUNGS = (
    Rung("loop", loop.apply_experts, "torch", "nothing: the equation as it is written"),
    Rung("padded batch", padded.apply_experts, "torch", "the loop: a handful of launches, whatever E is"),
    Rung("sorted", sorted.apply_experts, "torch", "the padding: as many rows as were asked for"),
    Rung("grouped product", grouped.apply_experts, "triton", "the second loop, and waiting for the device"),
    Rung("fused gather", gathered.apply_experts, "triton", "K copies of the input"),
    Rung("fused activation", triton_backend.apply_experts, "triton", "the passes between the products; the hidden layer is not saved"),
    Rung("native, beside it", native_backend.apply_experts, "native", "on a CPU: every intermediate, row by row, in the cache"),
)
