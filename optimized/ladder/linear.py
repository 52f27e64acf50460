"""The product's up-projection without its activation: what remains of the kernel is a product that gathers."""

# pyright: reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..kernels import launch
from ..kernels.blocks import blocks_of


@triton.jit
def unchanged(gate_proj, up):
    """h = u."""
    return up.to(tl.float32)


def project(x_TD: Tensor, weight: Tensor, bias: Tensor | None, schedule: launch.Schedule) -> Tensor:
    """x [T, D] and weight [E, O, D], contiguous, and bias [E, O] or None → [T·K, O] in expert order. One launch."""
    assignments, (experts, rows, width) = len(schedule.order), weight.shape
    precision = launch.precision_of(weight.dtype)
    blocks = blocks_of("up", weight.dtype, precision)
    out_NM = weight.new_empty(assignments, rows)
    if assignments:
        launch.project_up_kernel[launch._grid(schedule, rows, blocks)](
            x_TD, weight, bias, out_NM, None, schedule.order, schedule.bounds, schedule.tiles[blocks.rows],
            width, rows, experts, assignments, x_TD.stride(0), weight.stride(0),
            ACTIVATION=unchanged, GATED=False, K=assignments // len(x_TD), **launch._depth(blocks, width, precision),
        )  # fmt: skip
    return out_NM
