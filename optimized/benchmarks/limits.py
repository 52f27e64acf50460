"""What the hardware allows: a dense product of the same active FLOPs, or one stream of the weights that are touched.

The limit of a measurement is the later of the two. It is generous to the machine: the dense product has the N = T·K rows of one matrix in
blocks that stay in a cache, a backward counts as two more forwards, whose products libraries are best at, and nobody routes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .shapes import MODES, Problem
from .timing import Candidate, Times

STREAM_BYTES = 1 << 27
HEAP_BYTES = 31 << 20
"""glibc gives what is smaller than the largest piece that has come back from the system, up to 32 MiB, from pages that it keeps. oneDNN
allocates its results anew; on fresh pages each time the limit would be half of what the machine can do."""
BLOCK_ROWS = 2048  # with more at once the result leaves every cache, and its pages are new each time
PRODUCTS = {"torch.mm": "dense, torch.mm", "oneDNN": "dense, oneDNN prepacked"}
STREAM = "stream of 128 MiB"


def active_flops(problem: Problem, mode: str) -> int:
    """2 · 3·N·D·F multiplications and additions, three times as many with the backward."""
    return (1 if mode == MODES[0] else 3) * 2 * problem.rows * problem.shape.expert_elements


def streamed_bytes(problem: Problem, mode: str) -> int:
    """The weights of the touched experts once; with the backward they are read twice and their gradients written once."""
    once = problem.touched * problem.shape.expert_elements * problem.up.element_size()
    return once if mode == MODES[0] else 3 * once


@cache
def _stream() -> Tensor:
    return torch.ones(STREAM_BYTES // 4)


def candidates(problem: Problem, most_rows: int = BLOCK_ROWS) -> dict[str, Candidate]:
    """The dense products of a forward by each library that is there, and the stream, to be timed with the others.

    most_rows   of a block; what a cache holds on a CPU, all where there is no such cache
    """
    up_MD, down_DF, rows = problem.up.detach()[0], problem.down.detach()[0], min(problem.rows, most_rows)
    x_ND, hidden_NF = (torch.randn(rows, width).to(up_MD.dtype) for width in (problem.shape.d_model, problem.shape.width))
    makers = {PRODUCTS["torch.mm"]: _plain, PRODUCTS["oneDNN"]: _packed}
    products = {name: make(x_ND, hidden_NF, up_MD, down_DF) for name, make in makers.items()}
    blocks = [rows] * (problem.rows // rows) + [problem.rows % rows] * (problem.rows % rows > 0)

    def all_blocks(product: Callable[[int], object]) -> Callable[[], object]:
        return lambda: [product(block) for block in blocks]

    return {name: Candidate(all_blocks(p)) for name, p in products.items() if p is not None} | {STREAM: Candidate(_stream().sum)}


def _plain(x_ND: Tensor, hidden_NF: Tensor, up_MD: Tensor, down_DF: Tensor) -> Callable[[int], object]:
    up_DM, down_FD = up_MD.T.contiguous(), down_DF.T.contiguous()
    pre_NM, out_ND = x_ND.new_empty(len(x_ND), len(up_MD)), torch.empty_like(x_ND)

    def product(rows: int) -> None:
        torch.mm(x_ND[:rows], up_DM, out=pre_NM[:rows])
        torch.mm(hidden_NF[:rows], down_FD, out=out_ND[:rows])

    return product


def _packed(x_ND: Tensor, hidden_NF: Tensor, up_MD: Tensor, down_DF: Tensor) -> Callable[[int], object] | None:
    """oneDNN with weights in its own order, which PyTorch has for inference only; None where this build has it not."""
    try:
        operators = torch.ops.mkldnn
        up, down = (operators._reorder_linear_weight(weight, None) for weight in (up_MD, down_DF))
        operators._linear_pointwise(x_ND, up, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    torch.empty(HEAP_BYTES, dtype=torch.uint8)

    def product(rows: int) -> None:
        operators._linear_pointwise(x_ND[:rows], up, None, "none", [], "")
        operators._linear_pointwise(hidden_NF[:rows], down, None, "none", [], "")

    return product


def limit(problem: Problem, mode: str, times: Times) -> tuple[str, list[float]]:
    """(what bounds, seconds round by round) from the times of `candidates`: the better library, or the stream where it takes longer."""
    middle = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    best = min((name for name in PRODUCTS.values() if name in times), key=middle.__getitem__)
    passes = 1 if mode == MODES[0] else 3
    share = streamed_bytes(problem, mode) / STREAM_BYTES
    if share * middle[STREAM] > passes * middle[best]:
        return "stream of the touched weights", [share * value for value in times[STREAM]]
    return best, [passes * value for value in times[best]]
