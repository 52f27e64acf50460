"""The product's launchers as differentiable pieces, for the rungs between the loop and the fused pass.

Places behind the last bound belong to dropped assignments: no kernel writes or reads their rows, so no piece may either.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..kernels.launch import Schedule


def schedule_of(expert_TK: Tensor, keep_TK: Tensor, up: Tensor) -> Schedule:
    """Who goes where, sorted on the device: three launches, and nobody waits."""
    from ..kernels import launch
    from ..kernels.blocks import blocks_of

    heights = (blocks_of(kernel, up.dtype, launch.precision_of(up.dtype)).rows for kernel in ("up", "product"))
    return launch.sort_by_expert(expert_TK, keep_TK, len(up), *heights)


def slots_of(schedule: Schedule, tokens: int) -> int:
    """K."""
    return len(schedule.order) // max(tokens, 1)


def sum_of_copies(rows_ND: Tensor, schedule: Schedule, tokens: int, dtype: torch.dtype) -> Tensor:
    """What a gather's backward is: each token's rows added up, without the dropped."""
    from ..kernels import launch

    return launch.combine(rows_ND, rows_ND.new_ones(tokens, slots_of(schedule, tokens)), schedule, dtype)[0]


class Gather(torch.autograd.Function):
    """x [T, D] → rows [T·K, D] in expert order, written to memory."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, schedule: Schedule) -> Tensor:
        """One launch."""
        ctx.schedule, ctx.tokens, ctx.dtype = schedule, len(x_TD), x_TD.dtype
        return x_TD[schedule.order // max(slots_of(schedule, len(x_TD)), 1)]

    @staticmethod
    def backward(ctx: Any, drows_ND: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        """The sum of the copies."""
        return sum_of_copies(drows_ND.contiguous(), ctx.schedule, ctx.tokens, ctx.dtype), None


class GroupedProduct(torch.autograd.Function):
    """rows [T·K, I] in expert order, weight [E, O, I], bias [E, O] or None → [T·K, O]: every expert's product in one launch."""

    @staticmethod
    def forward(ctx: Any, rows_NI: Tensor, weight: Tensor, bias: Tensor | None, schedule: Schedule) -> Tensor:
        """One launch."""
        from ..kernels import launch

        ctx.save_for_backward(rows_NI, weight, bias)
        ctx.schedule = schedule
        return launch.expert_product(rows_NI, weight.mT, bias, schedule)

    @staticmethod
    def backward(ctx: Any, dout_NM: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Two launches: the rows' gradient, and both of the expert's."""
        from ..kernels import launch

        rows_NI, weight, bias = ctx.saved_tensors
        dout_NM = dout_NM.contiguous()
        drows_NI = launch.expert_product(dout_NM, weight, None, ctx.schedule)
        dweight, dbias = launch.weight_gradient(dout_NM, rows_NI, weight, bias, ctx.schedule, gather="neither", slots=1)
        return drows_NI, dweight, None if bias is None else dbias, None


class GatheredProduct(torch.autograd.Function):
    """x [T, D], weight [E, O, D], bias [E, O] or None → [T·K, O]: the rows are gathered as they are multiplied, in both directions."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor, bias: Tensor | None, schedule: Schedule) -> Tensor:
        """One launch; x is saved, its copies never exist."""
        from .linear import project

        x_TD = x_TD.contiguous()
        ctx.save_for_backward(x_TD, weight, bias)
        ctx.schedule = schedule
        return project(x_TD, weight.contiguous(), bias, schedule)

    @staticmethod
    def backward(ctx: Any, dout_NM: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """Three launches: the rows' gradient, the sum of the copies, the expert's gradients."""
        from ..kernels import launch

        x_TD, weight, bias = ctx.saved_tensors
        dout_NM, slots = dout_NM.contiguous(), slots_of(ctx.schedule, len(x_TD))
        drows_ND = launch.expert_product(dout_NM, weight, None, ctx.schedule)
        dx_TD = sum_of_copies(drows_ND, ctx.schedule, len(x_TD), x_TD.dtype)
        dweight, dbias = launch.weight_gradient(dout_NM, x_TD, weight, bias, ctx.schedule, gather="right", slots=slots)
        return dx_TD, dweight, None if bias is None else dbias, None


class Combine(torch.autograd.Function):
    """rows [T·K, D] in expert order, gate [T, K] → y [T, D] in the dtype of the rows, summed slot by slot in fp32."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, gate_TK: Tensor, schedule: Schedule) -> Tensor:
        """One launch."""
        from ..kernels import launch

        ctx.save_for_backward(rows_ND, gate_TK)
        ctx.schedule = schedule
        return launch.combine(rows_ND, gate_TK.contiguous(), schedule, rows_ND.dtype)[0]

    @staticmethod
    def backward(ctx: Any, dy_TD: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        """drows = g dy and dg = ⟨dy, rows⟩, in stock PyTorch; 0 where an assignment was dropped."""
        rows_ND, gate_TK = ctx.saved_tensors
        order_N, bounds_P = ctx.schedule.order.long(), ctx.schedule.bounds
        dropped_N = torch.arange(len(order_N), device=order_N.device) >= bounds_P[-1]
        dout_ND = dy_TD[order_N // max(gate_TK.shape[1], 1)]
        drows_ND = (gate_TK.flatten()[order_N][:, None] * dout_ND).masked_fill(dropped_N[:, None], 0).to(rows_ND.dtype)
        dgate_N = (dout_ND.float() * rows_ND.float()).sum(1).masked_fill(dropped_N, 0)
        return drows_ND, torch.empty_like(gate_TK).flatten().index_copy(0, order_N, dgate_N.to(gate_TK.dtype)).view(gate_TK.shape), None
