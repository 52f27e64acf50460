"""Kernels that gather: rows back to their tokens, and the weight gradients, whose operands are read where they lie."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def sum_of_parts(PARTIAL, place, used, parts, stride, BLOCK: tl.constexpr):
    """Σ over the parts, from the first to the last in fp32, of what lies at each place; 0 where `used` is False."""
    total = tl.zeros((BLOCK,), tl.float32)
    for part in range(0, parts):
        total += tl.load(PARTIAL + tl.cast(part, tl.int64) * stride + place, mask=used, other=0.0)
    return total


@triton.jit
def combine_kernel(
    ROWS, GATE, PLACE, BOUNDS, OUT, PARTIAL, DGATE, T, D, E, parts,
    K: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """out_t = Σ_k g_tk rows[place of (t, k)], slot by slot in fp32.

    In the backward there is no GATE (every weight is 1: the input's gradient) and the first column of programs also sums the parts of
    the gates' gradient, dg_tk = Σ_parts PARTIAL[part, place of (t, k)].
    Grid: (⌈T / BLOCK_ROWS⌉ · ⌈D / BLOCK_COLUMNS⌉). A program owns BLOCK_ROWS tokens and BLOCK_COLUMNS columns.
    ROWS [T·K, D] float, GATE [T·K] float or None, PLACE [T·K] and BOUNDS [E + 1] int32, PARTIAL [parts, T·K] fp32 by place or None
    → OUT [T, D] float, DGATE [T·K] float by assignment or None.
    A dropped assignment is not read, nor is its gate: it adds nothing, and its DGATE is exactly 0.
    Equals: `reference.dispatch.combine_forward`; in the backward `dispatch_backward`, and the dgate of `combine_backward`.
    Rounds at: products and sums in fp32, OUT and DGATE once when stored. Limits: T·K < 2³¹.
    """
    columns = tl.cdiv(D, BLOCK_COLUMNS)
    column_tile = tl.program_id(0) % columns
    token = tl.program_id(0) // columns * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    token_inside = token < T
    column_inside = column < D
    kept = tl.load(BOUNDS + E)
    out = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for slot in tl.static_range(K):
        place = tl.load(PLACE + token * K + slot, mask=token_inside, other=0)
        used = token_inside & (place < kept)
        rows_at = ROWS + place.to(tl.int64)[:, None] * D + column[None, :]
        rows = tl.load(rows_at, mask=used[:, None] & column_inside[None, :], other=0.0).to(tl.float32)
        if GATE is not None:
            rows *= tl.load(GATE + token * K + slot, mask=used, other=0.0).to(tl.float32)[:, None]
        out += rows
        if DGATE is not None:
            if column_tile == 0:
                dgate = sum_of_parts(PARTIAL, place, used, parts, T * K, BLOCK_ROWS)
                tl.store(DGATE + token * K + slot, dgate.to(DGATE.dtype.element_ty), mask=token_inside)
    out_at = OUT + token.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out_at, out.to(OUT.dtype.element_ty), mask=token_inside[:, None] & column_inside[None, :])


@triton.jit
def weight_gradient_kernel(
    LEFT, RIGHT, GATE, DWEIGHT, DBIAS, ORDER, BOUNDS, outer, inner, stride_left, stride_right,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """dW_e = Σ over the expert's rows of leftᵀ right, and db_e = Σ of left (times the gate, where GATE is given).

    Grid: (⌈outer / BLOCK_ROWS⌉ · ⌈inner / BLOCK_COLUMNS⌉, E). A program owns one block of one expert's gradient; the rows come in
    expert order, BLOCK_DEPTH at a time. An expert without rows writes zeros.
    LEFT [·, outer] and RIGHT [·, inner] float, rows in expert order, or tokens where gathered through ORDER; GATE [T·K] float or None
    → DWEIGHT [E, outer, inner] and DBIAS [E, outer] or None in the compute dtype.
    Equals: the gradients of `reference.experts.ffn_backward`.
    Rounds at: operands to the compute dtype, products and sums in fp32, DWEIGHT and DBIAS once when stored.
    Limits: BLOCK_ROWS · inner < 2³¹; E < 2¹⁶.
    """
    columns = tl.cdiv(inner, BLOCK_COLUMNS)
    row_tile = tl.program_id(0) // columns
    column_tile = tl.program_id(0) % columns
    expert = tl.program_id(1)
    row = row_tile * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_inside = row < outer
    column_inside = column < inner
    end = tl.load(BOUNDS + expert + 1)
    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    dbias = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first in range(tl.load(BOUNDS + expert), end, BLOCK_DEPTH):
        place = first + tl.arange(0, BLOCK_DEPTH)
        inside = place < end
        assignment = place
        if GATHER_LEFT or GATHER_RIGHT or GATE is not None:
            assignment = tl.load(ORDER + place, mask=inside, other=0)
        left_row = assignment // K if GATHER_LEFT else place
        right_row = assignment // K if GATHER_RIGHT else place
        left_at = LEFT + left_row.to(tl.int64)[None, :] * stride_left + row[:, None]
        right_at = RIGHT + right_row.to(tl.int64)[:, None] * stride_right + column[None, :]
        left = tl.load(left_at, mask=inside[None, :] & row_inside[:, None], other=0.0)
        right = tl.load(right_at, mask=inside[:, None] & column_inside[None, :], other=0.0)
        if DBIAS is not None:
            weighted = left.to(tl.float32)
            if GATE is not None:
                weighted *= tl.load(GATE + assignment, mask=inside, other=0.0).to(tl.float32)[None, :]
            dbias += tl.sum(weighted, 1)
        kind = DWEIGHT.dtype.element_ty
        dweight = tl.dot(left.to(kind), right.to(kind), dweight, input_precision=PRECISION)
    block_at = DWEIGHT + (expert.to(tl.int64) * outer + row_tile * BLOCK_ROWS) * inner
    dweight_at = block_at + tl.arange(0, BLOCK_ROWS)[:, None] * inner + column[None, :]
    tl.store(dweight_at, dweight.to(DWEIGHT.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])
    if DBIAS is not None:
        if column_tile == 0:
            tl.store(DBIAS + expert.to(tl.int64) * outer + row, dbias.to(DBIAS.dtype.element_ty), mask=row_inside)
