"""Block sizes, warps and stages of each kernel, by what it runs on; a launcher reads them here and nowhere else.

The rows for a GPU are choices that compile without register spills; none of them was timed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from triton.runtime import driver

from .interpreter import is_interpreting


class Blocks(NamedTuple):
    """rows, columns, depth of a block; warps and pipeline stages; group: row tiles that share operands in the L2 cache."""

    rows: int
    columns: int
    depth: int = 0
    warps: int = 4
    stages: int = 2
    group: int = 8

    def launch(self) -> dict[str, int]:
        """The two launch options."""
        return {"num_warps": self.warps, "num_stages": self.stages}


Family = Mapping[str, Blocks]

# Columns: "up", "product", "activation", "weight", one for each kernel with a matrix product.
HALF: dict[str, Family] = {
    "sm80": {
        "up": Blocks(128, 64, 64, 8, 3), "product": Blocks(128, 128, 64, 8, 3),
        "activation": Blocks(64, 64, 64, 8, 3), "weight": Blocks(128, 128, 64, 8, 3),
    },
    "sm89": {
        "up": Blocks(128, 64, 64, 8, 2), "product": Blocks(128, 64, 64, 8, 3),
        "activation": Blocks(64, 64, 64, 8, 3), "weight": Blocks(128, 64, 32, 8, 3),
    },
    "sm90": {
        "up": Blocks(64, 128, 64, 8, 4), "product": Blocks(128, 128, 64, 8, 4),
        "activation": Blocks(64, 64, 64, 8, 3), "weight": Blocks(128, 128, 64, 8, 4),
    },
    "sm100": {
        "up": Blocks(64, 128, 64, 8, 4), "product": Blocks(128, 128, 64, 8, 4),
        "activation": Blocks(64, 64, 64, 8, 3), "weight": Blocks(128, 128, 64, 8, 4),
    },
    "amd": {
        "up": Blocks(128, 64, 64, 8, 2), "product": Blocks(128, 128, 64, 8, 2),
        "activation": Blocks(128, 64, 32, 8, 2), "weight": Blocks(128, 64, 32, 8, 2),
    },
}  # fmt: skip
TF32 = {name: Blocks(128, 64, 32, 8, 3) for name in ("up", "product", "weight")}
TF32["activation"] = Blocks(64, 64, 32, 8, 2)
# On sm100 the taller tile leaves a lane 64 registers, some of which spill.
TF32_OF: dict[str, Family] = {"sm100": {**TF32, "product": Blocks(64, 64, 32, 8, 3), "weight": Blocks(64, 64, 32, 8, 3)}}
IEEE = {"up": Blocks(64, 64, 16, 8, 2), "product": Blocks(64, 64, 16, 8, 2),
        "activation": Blocks(64, 32, 16, 8, 2), "weight": Blocks(64, 64, 16, 8, 2)}  # fmt: skip
INTERPRETED = {name: Blocks(32, 32, 32) for name in ("up", "product", "activation", "weight")}
ELEMENTWISE = {"route": Blocks(4, 0, 0, 4), "combine": Blocks(8, 256, 0, 4)}
INTERPRETED_ELEMENTWISE = {"route": Blocks(32, 0), "combine": Blocks(32, 32)}

# One-hot counters of the sort: assignments of a block times buckets, in registers and shared memory.
COUNTERS = 8192

_replaced: list[Mapping[str, Blocks]] = []


@contextlib.contextmanager
def using(**blocks: Blocks) -> Iterator[None]:
    """Inside the block these rows replace the tables': `using(up=Blocks(64, 64, 32))`."""
    _replaced.append(blocks)
    try:
        yield
    finally:
        _replaced.pop()


def family() -> str:
    """Which row of the tables fits the device that Triton compiles for, or "interpreter"."""
    if is_interpreting():
        return "interpreter"
    target: Any = driver.active.get_current_target()
    if target.backend != "cuda":
        return "amd"
    arch = int(target.arch)
    # 12.x has the shared memory of 8.9, not that of 10.0.
    return "sm90" if arch == 90 else "sm100" if 100 <= arch < 120 else "sm80" if arch in (80, 87) else "sm89"


def blocks_of(kernel: str, dtype: torch.dtype, precision: str) -> Blocks:
    """The blocks of a kernel for operands of this dtype; precision "ieee" or "tf32" matters in fp32."""
    for blocks in reversed(_replaced):
        if kernel in blocks:
            return blocks[kernel]
    name = family()
    if name == "interpreter":
        return {**INTERPRETED, **INTERPRETED_ELEMENTWISE}[kernel]
    if kernel in ELEMENTWISE:
        return ELEMENTWISE[kernel]
    if dtype == torch.float32:
        return (TF32_OF.get(name, TF32) if precision == "tf32" else IEEE)[kernel]
    return HALF[name][kernel]


def sort_block(buckets: int) -> int:
    """Assignments that one program of the sort takes: as many as keep the counters within COUNTERS, 16 … 512."""
    return max(16, min(512, COUNTERS // buckets))


def scan_chunk(buckets: int) -> int:
    """Blocks, or tiles, that the scan looks at in one step: with twice as many, Triton 3.6 or 3.9 runs out of registers for some E."""
    return max(4, min(16, COUNTERS // 4 // buckets))


def power_of_2(count: int, least: int = 1) -> int:
    """The smallest power of two ≥ count and ≥ least."""
    return max(least, 1 << max(count - 1, 0).bit_length())
