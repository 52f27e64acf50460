"""The three products along the rows: up-projection with its activation, a product per expert, the gradient at the activation.

A program owns one tile of rows, which never crosses experts, and one tile of columns. The sum over the depth runs in fp32 from the first
to the last column of the operands in steps of BLOCK_DEPTH, whatever else is in the tile: a row's result is a function of that row, the
expert and the block sizes alone.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def locate(TILES, count, columns, GROUP: tl.constexpr):
    """(row tile, column tile) of this program, GROUP row tiles at a time so that their operands stay in the L2 cache.

    A program with nothing to do gets a row tile ≥ count or a column tile ≥ columns.
    """
    program = tl.program_id(0)
    first = program // (GROUP * columns) * GROUP
    height = tl.maximum(tl.minimum(count - first, GROUP), 1)
    inner = program % (GROUP * columns)
    return first + inner % height, inner // height


@triton.jit
def load_tile(at, rows_inside, columns_inside, depth, left, DEPTH_IS_EVEN: tl.constexpr, DEPTH_AXIS: tl.constexpr):
    """An operand's tile at the pointers `at`, 0 where a row, a column or a depth lies outside; `left` is what remains of the depth."""
    if DEPTH_IS_EVEN:
        inside = rows_inside[:, None] if DEPTH_AXIS == 1 else columns_inside[None, :]
    elif DEPTH_AXIS == 1:
        inside = rows_inside[:, None] & (depth < left)[None, :]
    else:
        inside = (depth < left)[:, None] & columns_inside[None, :]
    return tl.load(at, mask=inside, other=0.0)


@triton.jit
def project_up_kernel(
    X, UP, UP_BIAS, HIDDEN, PRE, ORDER, BOUNDS, TILES, D, F, E, assignments, stride_x, stride_expert,
    ACTIVATION: tl.constexpr, GATED: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr, DEPTH_IS_EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """pre = x[token] W_upᵀ + b and h = act(pre) for the rows of one expert; the gather is part of the loads.

    Grid: (max_tiles · ⌈F / BLOCK_COLUMNS⌉). A program owns BLOCK_ROWS rows of one expert and BLOCK_COLUMNS columns of F (both halves of a
    gated first matrix). Tiles behind the experts' hold dropped assignments, whose PRE is set to 0.
    X [T, D] float, UP [E, M, D] and UP_BIAS [E, M] or None in the compute dtype, ORDER [T·K], BOUNDS [E + 1], TILES of `scan_kernel`
    → HIDDEN [T·K, F] and PRE [T·K, M] or None in the compute dtype. M = 2F where gated, else F.
    Equals: the first half of `reference.experts.ffn_forward` on `dispatch_forward`'s rows.
    Rounds at: x to the compute dtype, products accumulated in fp32, PRE and HIDDEN once each when stored.
    Limits: BLOCK_ROWS · M and BLOCK_COLUMNS · D < 2³¹.
    """
    columns = tl.cdiv(F, BLOCK_COLUMNS)
    live = tl.load(TILES)
    count = live if PRE is None else tl.load(TILES + 1)
    tile, column_tile = locate(TILES, count, columns, GROUP)
    if (tile >= count) | (column_tile >= columns):
        return
    expert = tl.load(TILES + 2 + 2 * tile)
    first_row = tl.load(TILES + 3 + 2 * tile)
    row = tl.arange(0, BLOCK_ROWS)
    lane = tl.arange(0, BLOCK_COLUMNS)
    column = column_tile * BLOCK_COLUMNS + lane
    column_inside = column < F
    M = 2 * F if GATED else F
    if PRE is not None:
        pre_at = PRE + first_row.to(tl.int64) * M + row[:, None] * M + column[None, :]
    if tile >= live:
        if PRE is not None:
            dropped = (first_row + row < assignments)[:, None] & column_inside[None, :]
            nothing = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), PRE.dtype.element_ty)
            tl.store(pre_at, nothing, mask=dropped)
            if GATED:
                tl.store(pre_at + F, nothing, mask=dropped)
        return
    row_inside = first_row + row < tl.load(BOUNDS + expert + 1)
    token = tl.load(ORDER + first_row + row, mask=row_inside, other=0) // K
    depth = tl.arange(0, BLOCK_DEPTH)
    x_at = X + token.to(tl.int64)[:, None] * stride_x + depth[None, :]
    first_column = (column_tile * BLOCK_COLUMNS).to(tl.int64) * D
    w_at = UP + expert.to(tl.int64) * stride_expert + first_column + lane[None, :] * D + depth[:, None]
    half = tl.cast(F, tl.int64) * D
    up = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    gate_proj = up
    for step in range(0, tl.cdiv(D, BLOCK_DEPTH)):
        left = D - step * BLOCK_DEPTH
        x = load_tile(x_at, row_inside, column_inside, depth, left, DEPTH_IS_EVEN, 1).to(UP.dtype.element_ty)
        w = load_tile(w_at, row_inside, column_inside, depth, left, DEPTH_IS_EVEN, 0)
        if GATED:
            gate_proj = tl.dot(x, w, gate_proj, input_precision=PRECISION)
            w = load_tile(w_at + half, row_inside, column_inside, depth, left, DEPTH_IS_EVEN, 0)
        up = tl.dot(x, w, up, input_precision=PRECISION)
        x_at += BLOCK_DEPTH
        w_at += BLOCK_DEPTH
    if UP_BIAS is not None:
        bias_at = UP_BIAS + expert.to(tl.int64) * M + column
        if GATED:
            gate_proj += tl.load(bias_at, mask=column_inside, other=0.0).to(tl.float32)[None, :]
            bias_at += F
        up += tl.load(bias_at, mask=column_inside, other=0.0).to(tl.float32)[None, :]
    inside = row_inside[:, None] & column_inside[None, :]
    if PRE is not None:
        if GATED:
            tl.store(pre_at, gate_proj.to(PRE.dtype.element_ty), mask=inside)
            pre_at += F
        tl.store(pre_at, up.to(PRE.dtype.element_ty), mask=inside)
    hidden_at = HIDDEN + first_row.to(tl.int64) * F + row[:, None] * F + column[None, :]
    tl.store(hidden_at, ACTIVATION(gate_proj, up).to(HIDDEN.dtype.element_ty), mask=inside)


@triton.jit
def expert_product_kernel(
    ROWS, WEIGHT, BIAS, OUT, BOUNDS, TILES, inner, outer, stride_expert, stride_inner, stride_outer,
    PRECISION: tl.constexpr, DEPTH_IS_EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """out = rows · W_e (+ b_e) for rows in expert order: the down-projection, and with the strides of W_up the gradient of the rows.

    Grid: (max_tiles · ⌈outer / BLOCK_COLUMNS⌉). A program owns BLOCK_ROWS rows of one expert and BLOCK_COLUMNS columns.
    ROWS [T·K, inner], WEIGHT [E] matrices read by their strides, BIAS [E, outer] or None → OUT [T·K, outer], all in the compute dtype.
    Equals: `hidden @ down.T + bias` and `dpre @ up` of `reference.experts`.
    Rounds at: products accumulated in fp32, OUT once when stored.
    Limits: BLOCK_ROWS · inner, BLOCK_ROWS · outer and a block's reach in WEIGHT < 2³¹.
    """
    columns = tl.cdiv(outer, BLOCK_COLUMNS)
    count = tl.load(TILES)
    tile, column_tile = locate(TILES, count, columns, GROUP)
    if (tile >= count) | (column_tile >= columns):
        return
    expert = tl.load(TILES + 2 + 2 * tile)
    first_row = tl.load(TILES + 3 + 2 * tile)
    row = tl.arange(0, BLOCK_ROWS)
    row_inside = first_row + row < tl.load(BOUNDS + expert + 1)
    lane = tl.arange(0, BLOCK_COLUMNS)
    column = column_tile * BLOCK_COLUMNS + lane
    column_inside = column < outer
    depth = tl.arange(0, BLOCK_DEPTH)
    a_at = ROWS + first_row.to(tl.int64) * inner + row[:, None] * inner + depth[None, :]
    w_at = WEIGHT + expert.to(tl.int64) * stride_expert + (column_tile * BLOCK_COLUMNS).to(tl.int64) * stride_outer
    w_at += lane[None, :] * stride_outer + depth[:, None] * stride_inner
    out = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for step in range(0, tl.cdiv(inner, BLOCK_DEPTH)):
        left = inner - step * BLOCK_DEPTH
        a = load_tile(a_at, row_inside, column_inside, depth, left, DEPTH_IS_EVEN, 1)
        w = load_tile(w_at, row_inside, column_inside, depth, left, DEPTH_IS_EVEN, 0)
        out = tl.dot(a, w, out, input_precision=PRECISION)
        a_at += BLOCK_DEPTH
        w_at += BLOCK_DEPTH * stride_inner
    if BIAS is not None:
        bias = tl.load(BIAS + expert.to(tl.int64) * outer + column, mask=column_inside, other=0.0)
        out += bias.to(tl.float32)[None, :]
    out_at = OUT + first_row.to(tl.int64) * outer + row[:, None] * outer + column[None, :]
    tl.store(out_at, out.to(OUT.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])


@triton.jit
def row_dot_bias(DY, BIAS, token, row_inside, expert, D, stride_dy, BLOCK_ROWS: tl.constexpr, BLOCK_DEPTH: tl.constexpr):
    """⟨dy, b_e⟩ of each row in fp32: what the down bias adds to the gradient of a gate."""
    depth = tl.arange(0, BLOCK_DEPTH)
    total = tl.zeros((BLOCK_ROWS,), tl.float32)
    for first in range(0, D, BLOCK_DEPTH):
        inside = first + depth < D
        dy = tl.load(
            DY + token.to(tl.int64)[:, None] * stride_dy + (first + depth)[None, :], mask=row_inside[:, None] & inside[None, :], other=0.0
        )
        bias = tl.load(BIAS + expert.to(tl.int64) * D + first + depth, mask=inside, other=0.0)
        total += tl.sum(dy.to(tl.float32) * bias.to(tl.float32)[None, :], 1)
    return total


@triton.jit
def activation_gradient_kernel(
    DY, DOWN, DOWN_BIAS, PRE, GATE, DPRE, WEIGHTED, DGATE, ORDER, BOUNDS, TILES, D, F, assignments, stride_dy, stride_expert,
    ACTIVATION: tl.constexpr, BACKWARD: tl.constexpr, GATED: tl.constexpr, K: tl.constexpr, PRECISION: tl.constexpr,
    DEPTH_IS_EVEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """With dh' = dy[token] W_down: dpre = act'(g dh'), the gate's gradient Σ_f dh' h (+ ⟨dy, b⟩), and g h, from which dW_down is made.

    Grid: (max_tiles · ⌈F / BLOCK_COLUMNS⌉). A program owns BLOCK_ROWS rows of one expert and BLOCK_COLUMNS columns of F, and with them one
    entry per row of its own row of DGATE, so that nothing is added atomically. h is computed again from PRE.
    DY [T, D] float, DOWN [E, D, F], DOWN_BIAS [E, D] or None, PRE [T·K, M] in the compute dtype, GATE [T·K] float by assignment
    → DPRE [T·K, M] and WEIGHTED [T·K, F] or None in the compute dtype, DGATE [⌈F / BLOCK_COLUMNS⌉, T·K] fp32 by place.
    Equals: `combine_backward`, then the activation's backward, of the reference.
    Rounds at: dy to the compute dtype, products accumulated in fp32, DPRE and WEIGHTED once each when stored.
    Limits: BLOCK_ROWS · M and BLOCK_DEPTH · F < 2³¹.
    """
    columns = tl.cdiv(F, BLOCK_COLUMNS)
    count = tl.load(TILES)
    tile, column_tile = locate(TILES, count, columns, GROUP)
    if (tile >= count) | (column_tile >= columns):
        return
    expert = tl.load(TILES + 2 + 2 * tile)
    first_row = tl.load(TILES + 3 + 2 * tile)
    row = tl.arange(0, BLOCK_ROWS)
    row_inside = first_row + row < tl.load(BOUNDS + expert + 1)
    assignment = tl.load(ORDER + first_row + row, mask=row_inside, other=0)
    token = assignment // K
    column = column_tile * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    column_inside = column < F
    depth = tl.arange(0, BLOCK_DEPTH)
    dy_at = DY + token.to(tl.int64)[:, None] * stride_dy + depth[None, :]
    w_at = DOWN + expert.to(tl.int64) * stride_expert + depth[:, None] * F + column[None, :]
    dhidden = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for step in range(0, tl.cdiv(D, BLOCK_DEPTH)):
        left = D - step * BLOCK_DEPTH
        dy = load_tile(dy_at, row_inside, column_inside, depth, left, DEPTH_IS_EVEN, 1).to(DOWN.dtype.element_ty)
        w = load_tile(w_at, row_inside, column_inside, depth, left, DEPTH_IS_EVEN, 0)
        dhidden = tl.dot(dy, w, dhidden, input_precision=PRECISION)
        dy_at += BLOCK_DEPTH
        w_at += BLOCK_DEPTH * F
    inside = row_inside[:, None] & column_inside[None, :]
    M = 2 * F if GATED else F
    in_tile = row[:, None] * M + column[None, :]
    pre_at = PRE + first_row.to(tl.int64) * M + in_tile
    gate_proj = tl.load(pre_at, mask=inside, other=0.0).to(tl.float32)
    up = gate_proj
    if GATED:
        up = tl.load(pre_at + F, mask=inside, other=0.0).to(tl.float32)
    hidden = ACTIVATION(gate_proj, up)
    dgate = tl.sum(tl.where(inside, dhidden * hidden, 0.0), 1)
    if DOWN_BIAS is not None:
        if column_tile == 0:
            dgate += row_dot_bias(DY, DOWN_BIAS, token, row_inside, expert, D, stride_dy, BLOCK_ROWS, BLOCK_DEPTH)
    tl.store(DGATE + column_tile.to(tl.int64) * assignments + first_row + row, dgate, mask=row_inside)
    gate = tl.load(GATE + assignment, mask=row_inside, other=0.0).to(tl.float32)[:, None]
    if WEIGHTED is not None:
        weighted_at = WEIGHTED + first_row.to(tl.int64) * F + row[:, None] * F + column[None, :]
        tl.store(weighted_at, (gate * hidden).to(WEIGHTED.dtype.element_ty), mask=inside)
    dgate_proj, dup = BACKWARD(gate_proj, up, gate * dhidden)
    dpre_at = DPRE + first_row.to(tl.int64) * M + in_tile
    if GATED:
        tl.store(dpre_at, dgate_proj.to(DPRE.dtype.element_ty), mask=inside)
        dpre_at += F
    tl.store(dpre_at, dup.to(DPRE.dtype.element_ty), mask=inside)
