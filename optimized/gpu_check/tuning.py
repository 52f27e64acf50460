"""Which blocks are fastest on this device: a whole training pass with each choice of `optimized.kernels.choices`, one kernel at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from ..benchmarks.shapes import Problem, Shape
from ..benchmarks.timing import Candidate, Spread, interleave
from ..kernels.blocks import Blocks, blocks_of, family, using
from ..kernels.choices import ALTERNATIVES, Choices
from .device import Device
from .peers import ours
from .problems import forward_and_backward, needed_bytes, problem
from .results import Step

KERNELS = ("up", "product", "activation", "weight")
INTERPRETED: Choices = {name: (Blocks(16, 16, 16),) for name in KERNELS}


def choices(kernel: str, dtype: torch.dtype) -> tuple[Blocks, ...]:
    """The table's blocks first, then what may take their place on this device."""
    return blocks_of(kernel, dtype, "ieee"), *ALTERNATIVES.get(family(), INTERPRETED).get(kernel, ())


def with_blocks(step: Callable[[], Any], **blocks: Blocks) -> Callable[[], Any]:
    """The step, with these rows in place of the tables', in its backward too."""

    def run() -> Any:
        with using(**blocks):
            return step()

    return run


def key(shape: Shape, tokens: int) -> str:
    """Name of a problem in the results."""
    return f"{shape.name}, T = {tokens}"


def tune(device: Device, given: Problem, seconds: float) -> dict[str, Any]:
    """Milliseconds of a training pass by kernel and blocks, in the order that they were tried, and the fastest of each kernel."""
    step, found = forward_and_backward(given, ours(given)), {}
    for kernel in KERNELS:
        tried = choices(kernel, given.x.dtype)
        candidates = {str(list(blocks)): Candidate(with_blocks(step, **{kernel: blocks})) for blocks in tried}
        times = interleave(candidates, seconds=seconds, clock=device.clock)
        spread = {name: Spread.of([1e3 * value for value in values])._asdict() for name, values in times.items()}
        best = min(spread, key=lambda name: spread[name]["median"])
        found[kernel] = {"milliseconds": spread, "best": list(tried[list(candidates).index(best)])}
    return found


def best(found: dict[str, Any] | None) -> dict[str, Blocks]:
    """The fastest blocks by kernel, of a result of `tune`; nothing where there is none."""
    return {kernel: Blocks(*entry["best"]) for kernel, entry in (found or {}).items() if isinstance(entry, dict)}


def steps(device: Device, shapes: tuple[Shape, ...], counts: tuple[int, ...], seconds: float) -> Iterator[Step]:
    """Every shape and number of tokens that fits into memory, in bf16."""
    for shape in shapes:
        for tokens in counts:
            yield key(shape, tokens), lambda shape=shape, tokens=tokens: _tuned(device, shape, tokens, seconds)


def _tuned(device: Device, shape: Shape, tokens: int, seconds: float) -> dict[str, Any]:
    if needed_bytes(shape, tokens) > device.free_bytes():
        return {"left out": "it does not fit into memory"}
    return tune(device, problem(device.name, shape, tokens, torch.bfloat16), seconds)
