"""What the hardware allows: a dense product of the same active FLOPs, or one stream of the weights that are touched.

The limit of a measurement is the later of the two. It is generous to the machine: the dense product has all N = T·K rows at once and one
matrix, which stays in a cache; and no layer is charged for its router.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .shapes import MODES, Problem
from .timing import Candidate, Times

STREAM_BYTES = 1 << 27
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


def candidates(problem: Problem, mode: str) -> dict[str, Candidate]:
    """The dense products by each library that is there, and the stream, to be timed with the others."""
    shape, rows = problem.shape, problem.rows
    up_MD, down_DF = problem.up.detach()[0], problem.down.detach()[0]
    x_ND, dpre_NM, hidden_NF = (torch.randn(rows, width).to(up_MD.dtype) for width in (shape.d_model, 2 * shape.width, shape.width))
    products = {PRODUCTS["torch.mm"]: _plain(x_ND, dpre_NM, hidden_NF, up_MD, down_DF, mode)}
    packed = _packed(x_ND, dpre_NM, hidden_NF, up_MD, down_DF, mode)
    if packed is not None:
        products[PRODUCTS["oneDNN"]] = packed
    return {name: Candidate(step) for name, step in products.items()} | {STREAM: Candidate(_stream().sum)}


def _plain(x_ND: Tensor, dpre_NM: Tensor, hidden_NF: Tensor, up_MD: Tensor, down_DF: Tensor, mode: str) -> Callable[[], object]:
    up_DM, down_FD = up_MD.T.contiguous(), down_DF.T.contiguous()
    pre_NM, out_ND, dhidden_NF = torch.empty_like(dpre_NM), torch.empty_like(x_ND), torch.empty_like(hidden_NF)
    dup_MD, ddown_DF = torch.empty_like(up_MD), torch.empty_like(down_DF)

    def step() -> None:
        torch.mm(x_ND, up_DM, out=pre_NM)
        torch.mm(hidden_NF, down_FD, out=out_ND)
        if mode != MODES[0]:
            torch.mm(x_ND, down_DF, out=dhidden_NF)
            torch.mm(dpre_NM, up_MD, out=out_ND)
            torch.mm(dpre_NM.T, x_ND, out=dup_MD)
            torch.mm(x_ND.T, hidden_NF, out=ddown_DF)

    return step


def _packed(x_ND: Tensor, dpre_NM: Tensor, hidden_NF: Tensor, up_MD: Tensor, down_DF: Tensor, mode: str) -> Callable[[], object] | None:
    """oneDNN with weights in its own order, which PyTorch has for inference only; None where this build has it not."""
    try:
        operators = torch.ops.mkldnn
        up, down, up_back, down_back = (
            operators._reorder_linear_weight(w, None) for w in (up_MD, down_DF, up_MD.T.contiguous(), down_DF.T.contiguous())
        )
        operators._linear_pointwise(x_ND, up, None, "none", [], "")
    except (AttributeError, RuntimeError):
        return None
    dup_MD, ddown_DF = torch.empty_like(up_MD), torch.empty_like(down_DF)

    def step() -> None:
        operators._linear_pointwise(x_ND, up, None, "none", [], "")
        operators._linear_pointwise(hidden_NF, down, None, "none", [], "")
        if mode != MODES[0]:
            operators._linear_pointwise(x_ND, down_back, None, "none", [], "")
            operators._linear_pointwise(dpre_NM, up_back, None, "none", [], "")
            torch.mm(dpre_NM.T, x_ND, out=dup_MD)
            torch.mm(x_ND.T, hidden_NF, out=ddown_DF)

    return step


def limit(problem: Problem, mode: str, times: Times) -> tuple[str, list[float]]:
    """(what bounds, seconds round by round) from the times of `candidates`: the better library, or the stream where it takes longer."""
    middle = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
    best = min((name for name in PRODUCTS.values() if name in times), key=middle.__getitem__)
    share = streamed_bytes(problem, mode) / STREAM_BYTES
    if share * middle[STREAM] > middle[best]:
        return "stream of the touched weights", [share * value for value in times[STREAM]]
    return best, times[best]
