"""Launchers: from tensors to kernels, without waiting for the device and without reading a value.

Grids are upper bounds that the shapes alone give, so the same calls run on meta tensors, under CUDA graphs and in the interpreter.
Inputs may have any strides; what a kernel reads row by row is made contiguous here.
"""

# pyright: reportArgumentType=false, reportCallIssue=false
# A kernel's compile-time arguments are annotated as what they are inside it, and `num_warps` is nobody's parameter.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from reference.config import GatingConfig, require

from .activations import ACTIVATIONS, Activation
from .blocks import Blocks, blocks_of, power_of_2, scan_chunk, sort_block
from .gathers import combine_kernel, weight_gradient_kernel
from .products import activation_gradient_kernel, expert_product_kernel, project_up_kernel
from .routing import GROUP_SCORES, NORMALIZERS, SCORES, route_backward_kernel, route_kernel
from .schedule import histogram_kernel, restore_kernel, scan_kernel, scatter_kernel

MOST_SLOTS = 16
MOST_EXPERTS = 2048


class Schedule(NamedTuple):
    """Where every row lies.

    order   [T·K] int32, the assignment t·K + k in each place of expert order, dropped ones last;  place: its inverse
    bounds  [E + 1] int32: expert e owns the places bounds[e] … bounds[e + 1] − 1
    tiles   by their height in rows: [most_tiles + 1, 2] int32, (tiles of experts, all tiles), then (expert, first row) of each
    """

    order: Tensor
    place: Tensor
    bounds: Tensor
    tiles: dict[int, Tensor]


def ceil_div(size: int, block: int) -> int:
    """⌈size / block⌉."""
    return -(-size // block)


def precision_of(dtype: torch.dtype) -> str:
    """ "tf32" for fp32 operands where `torch.set_float32_matmul_precision` allows it, else "ieee"."""
    return "tf32" if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else "ieee"


def most_tiles(assignments: int, experts: int, rows: int) -> int:
    """An upper bound of Σ_e ⌈rows_e / rows⌉ over the experts and the dropped ones, whatever the load is."""
    return assignments // rows + min(assignments, experts + 1)


def _check_size(assignments: int, experts: int) -> None:
    require(assignments < 2**31, f"{assignments} assignments do not fit into 32-bit places; split the batch")
    require(experts <= MOST_EXPERTS, f"{experts} experts; the sort counts at most {MOST_EXPERTS}")


def _tables(
    like: Tensor, assignments: int, experts: int, heights: tuple[int, ...]
) -> tuple[dict[int, Tensor], tuple[Any, ...], dict[str, int]]:
    """Empty tables of tiles by height; they and their sizes as a kernel's arguments; the heights as its compile-time ones."""
    tables = {rows: like.new_empty((most_tiles(assignments, experts, rows) + 1, 2), dtype=torch.int32) for rows in heights}
    require(1 <= len(tables) <= 2, f"tiles of {len(tables)} heights are asked for; one schedule has one or two")
    first, second = heights[0], heights[-1]
    other = tables[second] if second != first else None
    arguments = (tables[first], other), (len(tables[first]) - 1, 0 if other is None else len(other) - 1)
    return tables, arguments, {"BLOCK_ROWS": first, "OTHER_ROWS": second}


def sort_by_expert(expert_TK: Tensor, keep_TK: Tensor, experts: int, *heights: int) -> Schedule:
    """The kept assignments in expert order, and tiles of one or two heights: expert [T, K] int, keep [T, K] bool. Three launches."""
    expert, keep = expert_TK.contiguous().long(), keep_TK.contiguous().view(torch.uint8)
    assignments = expert.numel()
    _check_size(assignments, experts)
    buckets = power_of_2(experts + 1, 16)
    block = sort_block(buckets)
    blocks = ceil_div(assignments, block)
    tables, (tiles, sizes), rows = _tables(expert, assignments, experts, heights)
    order, place, bounds = (expert.new_empty(size, dtype=torch.int32) for size in (assignments, assignments, experts + 1))
    counts, start = (expert.new_empty((blocks, buckets), dtype=torch.int32) for _ in range(2))
    if blocks:
        histogram_kernel[(blocks,)](expert, keep, counts, assignments, experts, BUCKETS=buckets, BLOCK=block)
    scan_kernel[(1,)](counts, start, bounds, *tiles, blocks, *sizes, experts, BUCKETS=buckets, CHUNK=scan_chunk(buckets), **rows)
    if blocks:
        scatter_kernel[(blocks,)](expert, keep, start, bounds, order, place, assignments, experts, BUCKETS=buckets, BLOCK=block)
    return Schedule(order, place, bounds, tables)


def restore_schedule(order: Tensor, bounds: Tensor, *heights: int) -> Schedule:
    """The schedule of a forward pass again, with tiles of one or two heights. One launch."""
    assignments, experts = len(order), len(bounds) - 1
    buckets, block = power_of_2(experts + 1, 16), 512
    tables, (tiles, sizes), rows = _tables(order, assignments, experts, heights)
    place = torch.empty_like(order)
    restore_kernel[(ceil_div(assignments, block) + 1,)](
        order, bounds, place, *tiles, assignments, *sizes, experts, BUCKETS=buckets, BLOCK=block, CHUNK=scan_chunk(buckets), **rows
    )
    return Schedule(order, place, bounds, tables)


def _depth(blocks: Blocks, size: int, precision: str) -> dict[str, Any]:
    """The block sizes and what depends on the depth that is summed over."""
    return {
        "PRECISION": precision, "DEPTH_IS_EVEN": size % blocks.depth == 0, "GROUP": blocks.group,
        "BLOCK_ROWS": blocks.rows, "BLOCK_COLUMNS": blocks.columns, "BLOCK_DEPTH": blocks.depth, **blocks.launch(),
    }  # fmt: skip


def _grid(schedule: Schedule, columns: int, blocks: Blocks) -> tuple[int]:
    return ((len(schedule.tiles[blocks.rows]) - 1) * ceil_div(columns, blocks.columns),)


def _heights(dtype: torch.dtype, *kernels: str) -> tuple[int, ...]:
    return tuple(blocks_of(name, dtype, precision_of(dtype)).rows for name in kernels)


def _activation(name: str) -> Activation:
    require(name in ACTIVATIONS, f"activation is {name!r}; the kernels have {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]


def project_up(
    x_TD: Tensor, up: Tensor, up_bias: Tensor | None, schedule: Schedule, activation: str, *, slots: int, save: bool
) -> tuple[Tensor, Tensor | None]:
    """(hidden [T·K, F], pre [T·K, M] where `save`, else None) in expert order, in the dtype of `up`. One launch."""
    function, assignments = _activation(activation), len(schedule.order)
    experts, rows, width = up.shape
    hidden_width = rows // 2 if function.gated else rows
    precision = precision_of(up.dtype)
    blocks = blocks_of("up", up.dtype, precision)
    hidden, pre = up.new_empty(assignments, hidden_width), up.new_empty(assignments, rows) if save else None
    if assignments:
        project_up_kernel[_grid(schedule, hidden_width, blocks)](
            x_TD, up, up_bias, hidden, pre, schedule.order, schedule.bounds, schedule.tiles[blocks.rows],
            width, hidden_width, experts, assignments, x_TD.stride(0), up.stride(0),
            ACTIVATION=function.forward, GATED=function.gated, K=slots, **_depth(blocks, width, precision),
        )  # fmt: skip
    return hidden, pre


def expert_product(rows_NI: Tensor, weight: Tensor, bias: Tensor | None, schedule: Schedule) -> Tensor:
    """rows [T·K, I] times each one's expert's matrix: weight [E, I, O], of any strides, bias [E, O] or None → [T·K, O]. One launch."""
    precision = precision_of(weight.dtype)
    blocks = blocks_of("product", weight.dtype, precision)
    _, inner, outer = weight.shape
    out = rows_NI.new_empty(len(rows_NI), outer)
    if len(rows_NI):
        expert_product_kernel[_grid(schedule, outer, blocks)](
            rows_NI,
            weight,
            bias,
            out,
            schedule.bounds,
            schedule.tiles[blocks.rows],
            inner,
            outer,
            *weight.stride(),
            **_depth(blocks, inner, precision),
        )
    return out


def combine(
    rows_ND: Tensor, gate_TK: Tensor, schedule: Schedule, dtype: torch.dtype, *, parts: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """(y [T, D], None), the weighted sum of each token's rows; with the gate gradient's `parts`: (dx [T, D], dgate [T, K]). One launch."""
    tokens, slots = gate_TK.shape
    width = rows_ND.shape[1]
    blocks = blocks_of("combine", dtype, "ieee")
    out = rows_ND.new_empty(tokens, width, dtype=dtype)
    dgate = None if parts is None else torch.empty_like(gate_TK)
    if tokens:
        grid = (ceil_div(tokens, blocks.rows) * ceil_div(width, blocks.columns),)
        combine_kernel[grid](
            rows_ND, gate_TK if parts is None else None, schedule.place, schedule.bounds, out, parts, dgate,
            tokens, width, len(schedule.bounds) - 1, 0 if parts is None else len(parts),
            K=slots, BLOCK_ROWS=blocks.rows, BLOCK_COLUMNS=blocks.columns, num_warps=blocks.warps,
        )  # fmt: skip
    return out, dgate


class ActivationGradient(NamedTuple):
    """dpre [T·K, M]; weighted, gate · hidden [T·K, F] or None; parts of the gates' gradient [column tiles, T·K] fp32 by place."""

    dpre: Tensor
    weighted: Tensor | None
    parts: Tensor


def activation_gradient(
    dy_TD: Tensor, gate_TK: Tensor, down: Tensor, down_bias: Tensor | None, pre: Tensor, schedule: Schedule, activation: str,
    *, weights: bool,
) -> ActivationGradient:  # fmt: skip
    """The backward from dy to the layer before its activation. One launch."""
    function, assignments = _activation(activation), len(schedule.order)
    _, width, hidden_width = down.shape
    precision = precision_of(down.dtype)
    blocks = blocks_of("activation", down.dtype, precision)
    dpre, weighted = torch.empty_like(pre), down.new_empty(assignments, hidden_width) if weights else None
    parts = pre.new_empty(ceil_div(hidden_width, blocks.columns), assignments, dtype=torch.float32)
    if assignments:
        activation_gradient_kernel[_grid(schedule, hidden_width, blocks)](
            dy_TD, down, down_bias, pre, gate_TK, dpre, weighted, parts, schedule.order, schedule.bounds, schedule.tiles[blocks.rows],
            width, hidden_width, assignments, dy_TD.stride(0), down.stride(0),
            ACTIVATION=function.forward, BACKWARD=function.backward, GATED=function.gated, K=gate_TK.shape[1],
            **_depth(blocks, width, precision),
        )  # fmt: skip
    return ActivationGradient(dpre, weighted, parts)


def weight_gradient(
    left: Tensor, right: Tensor, like: Tensor, bias_like: Tensor | None, schedule: Schedule,
    *, gather: str, slots: int, gate: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(gradient [E, O, I], bias gradient [E, O], or [0] without bias): Σ leftᵀ right over each expert's rows. One launch.

    left [·, O], right [·, I]: the one that `gather` names ("left" or "right") is indexed by token, the other by place.
    gate: by assignment, multiplied onto left in the bias gradient.
    """
    precision = precision_of(like.dtype)
    blocks = blocks_of("weight", like.dtype, precision)
    experts, outer, inner = like.shape
    dweight = like.new_empty(like.shape)
    dbias = like.new_empty(0 if bias_like is None else bias_like.shape)
    grid = (ceil_div(outer, blocks.rows) * ceil_div(inner, blocks.columns), experts)
    weight_gradient_kernel[grid](
        left, right, None if bias_like is None else gate, dweight, None if bias_like is None else dbias, schedule.order, schedule.bounds,
        outer, inner, left.stride(0), right.stride(0), GATHER_LEFT=gather == "left", GATHER_RIGHT=gather == "right", K=slots,
        PRECISION=precision, BLOCK_ROWS=blocks.rows, BLOCK_COLUMNS=blocks.columns, BLOCK_DEPTH=blocks.depth, **blocks.launch(),
    )  # fmt: skip
    return dweight, dbias


def experts_forward(
    x: Tensor, expert: Tensor, gate: Tensor, keep: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, activation: str, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, pre, order, bounds) of `operators.FORWARD_SCHEMA` in six launches: the sort's three, up, down, combine."""
    x, gate, up, down = (tensor.contiguous() for tensor in (x, gate, up, down))
    up_bias, down_bias = (bias if bias is None else bias.contiguous() for bias in (up_bias, down_bias))
    schedule = sort_by_expert(expert, keep, len(up), *_heights(up.dtype, "up", "product"))
    hidden, pre = project_up(x, up, up_bias, schedule, activation, slots=gate.shape[1], save=save)
    rows = expert_product(hidden, down.mT, down_bias, schedule)
    y, _ = combine(rows, gate, schedule, x.dtype)
    return y, up.new_empty(0, up.shape[1]) if pre is None else pre, schedule.order, schedule.bounds


def experts_backward(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
    pre: Tensor, order: Tensor, bounds: Tensor, activation: str, weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The six gradients of `operators.BACKWARD_SCHEMA` in six launches: schedule, activation, two weights, rows, combine."""
    dy, x, gate, up, down = (tensor.contiguous() for tensor in (dy, x, gate, up, down))
    down_bias = down_bias if down_bias is None else down_bias.contiguous()
    slots = gate.shape[1]
    schedule = restore_schedule(order, bounds, *_heights(up.dtype, "activation", "product"))
    gradient = activation_gradient(dy, gate, down, down_bias, pre, schedule, activation, weights=weights)
    dup, ddown, dup_bias, ddown_bias = (up.new_empty(0) for _ in range(4))
    if weights:
        dup, dup_bias = weight_gradient(gradient.dpre, x, up, up_bias, schedule, gather="right", slots=slots)
        assert gradient.weighted is not None
        ddown, ddown_bias = weight_gradient(dy, gradient.weighted, down, down_bias, schedule, gather="left", slots=slots, gate=gate)
    drows = expert_product(gradient.dpre, up, None, schedule)
    dx, dgate = combine(drows, gate, schedule, x.dtype, parts=gradient.parts)
    assert dgate is not None
    return dx, dgate, dup, ddown, dup_bias, ddown_bias


def _lanes(experts: int, gating: GatingConfig) -> dict[str, int]:
    return {"K": gating.top_k, "LANES": power_of_2(experts, 16), "SLOTS": power_of_2(gating.top_k)}


def route(
    logits_TE: Tensor, correction_bias: Tensor | None, real_T: Tensor, function: str, gating: GatingConfig
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(scores [T, E], expert [T, K] int64, gate [T, K], load [E] int64) of logits [T, E] fp32. One launch.

    real_T [T] bool: False for padding, which is not counted in the load.
    """
    tokens, experts = logits_TE.shape
    logits, real = logits_TE.contiguous(), real_T.contiguous().view(torch.uint8)
    bias = correction_bias if correction_bias is None else correction_bias.contiguous()
    blocks = blocks_of("route", torch.float32, "ieee")
    programs, lanes = ceil_div(tokens, blocks.rows), _lanes(experts, gating)
    scores, gate = logits.new_empty(tokens, experts), logits.new_empty(tokens, gating.top_k)
    expert = logits.new_empty(tokens, gating.top_k, dtype=torch.int64)
    counts = logits.new_empty(programs, lanes["LANES"], dtype=torch.uint8)  # a block has fewer than 256 tokens
    if tokens:
        route_kernel[(programs,)](
            logits, bias, real, scores, expert, gate, counts, tokens, experts, gating.eps, gating.scale,
            SCORE=SCORES[function].forward, NORMALIZE=NORMALIZERS[gating.normalize].forward, GROUP_SCORE=GROUP_SCORES[gating.group_score],
            GROUPS=gating.groups, TOP_GROUPS=gating.top_groups, GROUP_SIZE=experts // gating.groups,
            GROUP_LANES=power_of_2(gating.groups), BLOCK=blocks.rows, num_warps=blocks.warps, **lanes,
        )  # fmt: skip
    return scores, expert, gate, counts[:, :experts].sum(0, dtype=torch.int64)


def route_backward(
    dscores_TE: Tensor | None, dgate_TK: Tensor | None, scores_TE: Tensor, expert_TK: Tensor, function: str, gating: GatingConfig
) -> Tensor:
    """dlogits [T, E] of `route`; a cotangent may be None. One launch."""
    tokens, experts = scores_TE.shape
    dscores, dgate = (tensor if tensor is None else tensor.contiguous() for tensor in (dscores_TE, dgate_TK))
    blocks = blocks_of("route", torch.float32, "ieee")
    dlogits = torch.empty_like(scores_TE)
    if tokens:
        route_backward_kernel[(ceil_div(tokens, blocks.rows),)](
            dscores, dgate, scores_TE, expert_TK, dlogits, tokens, experts, gating.eps, gating.scale,
            SCORE_BACKWARD=SCORES[function].backward, NORMALIZE_BACKWARD=NORMALIZERS[gating.normalize].backward,
            BLOCK=blocks.rows, num_warps=blocks.warps, **_lanes(experts, gating),
        )  # fmt: skip
    return dlogits
