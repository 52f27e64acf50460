"""The planted faults, one for each line of defence in the kernels and their launchers, in the order of the source."""

from __future__ import annotations

from .plant import Fault

SCHEDULE = (
    Fault(
        "a dropped assignment counts as kept", "keep decides the bucket", "schedule",
        "tl.where(kept & (expert >= 0)", "tl.where((expert >= 0)", "integers", "drops", "integers", fast=True,
    ),
    Fault(
        "an id ≥ E is taken for an expert", "ids above the last expert are dropped", "schedule",
        "& (expert >= 0) & (expert < E)", "& (expert >= 0)", "integers", "wild", "bounds",
    ),
    Fault(
        "a negative id is taken for an expert", "ids below 0 are dropped", "schedule",
        "& (expert >= 0) & (expert < E)", "& (expert < E)", "integers", "wild", "bounds",
    ),
    Fault(
        "ids are cut to 32 bits before they are compared", "int64 ids are compared as they are", "schedule",
        "expert = tl.load(EXPERT + at, mask=inside, other=0)", "expert = tl.load(EXPERT + at, mask=inside, other=0).to(tl.int32)",
        "integers", "wild", "integers",
    ),
    Fault(
        "ids are loaded without a mask", "the last block of assignments is ragged", "schedule",
        "tl.load(EXPERT + at, mask=inside, other=0)", "tl.load(EXPERT + at)", "integers", "many-tokens", "bounds", fast=True,
    ),
    Fault(
        "the histogram counts what lies behind the last assignment", "the histogram's mask", "schedule",
        "tl.histogram(bucket, BUCKETS, mask=inside)", "tl.histogram(bucket, BUCKETS)", "integers", "many-tokens", "integers",
    ),
    Fault(
        "the histogram is off by a block", "each block has its own row of counts", "schedule",
        "tl.store(HISTOGRAM + block.to(tl.int64) * BUCKETS", "tl.store(HISTOGRAM + (block + 1).to(tl.int64) * BUCKETS",
        "integers", "many-tokens", "bounds", fast=True,
    ),
    Fault(
        "the number of tiles is rounded down", "a ragged last tile is a tile", "schedule",
        "tiles = (rows + BLOCK_ROWS - 1) // BLOCK_ROWS", "tiles = rows // BLOCK_ROWS", "integers", "many-tokens", "integers", fast=True,
    ),
    Fault(
        "tiles overlap by a row", "tiles follow each other at their height", "schedule",
        "(tile[:, None] - start[None, :]) * BLOCK_ROWS", "(tile[:, None] - start[None, :]) * (BLOCK_ROWS - 1)",
        "memory", "drops grouped", "race",
    ),
    Fault(
        "the dropped assignments' tiles count as an expert's", "tiles behind the experts are marked", "schedule",
        "tl.sum(tl.where(bucket < E, tiles, 0), 0)", "tl.sum(tiles, 0)", "integers", "drops", "integers",
    ),
    Fault(
        "the prefix over blocks includes the block itself", "an exclusive prefix", "schedule",
        "rows[None, :] + tl.cumsum(counts, 0) - counts", "rows[None, :] + tl.cumsum(counts, 0)", "integers", "drops", "bounds",
    ),
    Fault(
        "the prefix forgets earlier chunks", "the carry from chunk to chunk", "schedule",
        "        rows += tl.sum(counts, 0)\n", "        rows = tl.sum(counts, 0)\n", "integers", "long", "integers",
    ),
    Fault(
        "the first bound is not written", "an exclusive prefix starts at 0", "schedule",
        "    tl.store(BOUNDS, 0)\n", "", "integers", "drops", "bounds", fast=True,
    ),
    Fault(
        "the bounds are those of one expert earlier", "a bound is the end of its expert", "schedule",
        "tl.store(BOUNDS + 1 + bucket, end, mask=bucket < E)", "tl.store(BOUNDS + 1 + bucket, end - rows, mask=bucket < E)",
        "integers", "drops", "integers",
    ),
    Fault(
        "one bound too many", "the mask of the bounds", "schedule",
        "end, mask=bucket < E)\n    write_tiles(end", "end, mask=bucket <= E)\n    write_tiles(end", "integers", "drops", "bounds",
    ),
    Fault(
        "an assignment counts itself among those before it", "an exclusive rank", "schedule",
        "(tl.cumsum(own, axis=0) - own) * own", "tl.cumsum(own, axis=0) * own", "integers", "drops", "bounds",
    ),
    Fault(
        "the sort is not stable", "ranks ascend with the assignment", "schedule",
        "(tl.cumsum(own, axis=0) - own) * own", "(tl.sum(own, axis=0)[None, :] - tl.cumsum(own, axis=0)) * own",
        "integers", "drops", "integers", fast=True,
    ),
    Fault(
        "every block starts where the first one does", "each block's own prefix", "schedule",
        "tl.load(START + block.to(tl.int64) * BUCKETS + bucket", "tl.load(START + bucket", "memory", "many-tokens plain", "bounds",
    ),
    Fault(
        "the permutation is not inverted", "the backward's places are the inverse of the saved order", "schedule",
        "tl.store(PLACE + tl.load(ORDER + place, mask=inside, other=0), place, mask=inside)",
        "tl.store(PLACE + place, tl.load(ORDER + place, mask=inside, other=0), mask=inside)",
        "integers", "restored", "integers", fast=True,
    ),
    Fault(
        "the inverse is written behind the last place", "the restored block's mask", "schedule",
        "other=0), place, mask=inside)", "other=0), place)", "memory", "off-tile-widths plain", "race",
    ),
)  # fmt: skip

PRODUCTS = (
    Fault(
        "the last group of tiles is as tall as the others", "a ragged last group", "products",
        "tl.maximum(tl.minimum(count - first, GROUP), 1)", "GROUP", "experts", "one-expert float32", "poison",
    ),
    Fault(
        "a program without a tile goes on", "the grid is an upper bound", "products",
        "    if (tile >= count) | (column_tile >= columns):\n        return\n    expert = tl.load(TILES + 2 + 2 * tile)\n"
        "    first_row = tl.load(TILES + 3 + 2 * tile)\n    row = tl.arange(0, BLOCK_ROWS)\n    row_inside = first_row + row < "
        "tl.load(BOUNDS + expert + 1)\n    lane",
        "    expert = tl.load(TILES + 2 + 2 * tile)\n"
        "    first_row = tl.load(TILES + 3 + 2 * tile)\n    row = tl.arange(0, BLOCK_ROWS)\n    row_inside = first_row + row < "
        "tl.load(BOUNDS + expert + 1)\n    lane",
        "memory", "off-tile-widths plain", "bounds", fast=True,
    ),
    Fault(
        "the depth has no mask", "a depth that no block divides", "products",
        "    if DEPTH_IS_EVEN:\n        inside = rows", "    if True:\n        inside = rows",
        "experts", "off-tile-widths float32", "bounds",
        fast=True,
    ),
    Fault(
        "the depth's mask admits one too many", "the depth ends where it ends", "products",
        "(depth < left)[None, :]", "(depth <= left)[None, :]", "memory", "off-tile-widths plain", "bounds",
    ),
    Fault(
        "a dropped assignment's saved row is not written", "what is saved for a dropped assignment is 0", "products",
        "            tl.store(pre_at, nothing, mask=dropped)\n", "", "isolation", "saved", "exact zero",
    ),
    Fault(
        "a tile of rows reaches into the next expert", "the row mask of a tile", "products",
        "    row_inside = first_row + row < tl.load(BOUNDS + expert + 1)\n    token = ",
        "    row_inside = first_row + row <= tl.load(BOUNDS + expert + 1)\n    token = ", "memory", "drops grouped", "race", fast=True,
    ),
    Fault(
        "the assignment is taken for its token", "K assignments per token", "products",
        "mask=row_inside, other=0) // K\n", "mask=row_inside, other=0)\n", "memory", "drops grouped", "bounds",
    ),
    Fault(
        "the first matrix is read with the wrong stride", "the stride of a row of W_up", "products",
        "lane[None, :] * D + depth[:, None]", "lane[None, :] * F + depth[:, None]", "experts", "swiglu-bias float32", "parity", fast=True,
    ),
    Fault(
        "the second half is looked for D columns down", "the halves of a gated matrix lie F rows apart", "products",
        "half = tl.cast(F, tl.int64) * D", "half = tl.cast(D, tl.int64) * D", "memory", "swiglu-bias plain", "bounds",
    ),
    Fault(
        "gate and up are swapped", "gate rows first", "products",
        "tl.store(hidden_at, ACTIVATION(gate_proj, up)", "tl.store(hidden_at, ACTIVATION(up, gate_proj)",
        "experts", "swiglu-bias float32", "parity", fast=True,
    ),
    Fault(
        "the saved halves are one and the same", "both halves are saved", "products",
        "tl.store(pre_at, gate_proj.to(PRE", "tl.store(pre_at, up.to(PRE", "experts", "swiglu-bias float32", "parity",
    ),
    Fault(
        "the up bias is left out", "the bias before the activation", "products",
        "    if UP_BIAS is not None:\n", "    if False:\n", "experts", "gelu-bias float32", "parity", fast=True,
    ),
    Fault(
        "the up half gets the gate half's bias", "the bias has two halves", "products",
        "            bias_at += F\n", "", "experts", "swiglu-bias float32", "parity",
    ),
    Fault(
        "columns behind F are written", "the column mask of the hidden layer", "products",
        "tl.store(hidden_at, ACTIVATION(gate_proj, up).to(HIDDEN.dtype.element_ty), mask=inside)",
        "tl.store(hidden_at, ACTIVATION(gate_proj, up).to(HIDDEN.dtype.element_ty), mask=row_inside[:, None] & (column >= 0)[None, :])",
        "memory", "off-tile-widths plain", "bounds", fast=True,
    ),
    Fault(
        "only the last step of the depth counts", "the sum over the depth", "products",
        "out = tl.dot(a, w, out, input_precision=PRECISION)", "out = tl.dot(a, w, input_precision=PRECISION)",
        "experts", "swiglu-bias float32", "parity", fast=True,
    ),
    Fault(
        "the sum runs in the operands' dtype", "sums in fp32", "products",
        "out = tl.dot(a, w, out, input_precision=PRECISION)",
        "out = tl.dot(a, w, out, input_precision=PRECISION).to(tl.float16).to(tl.float32)",
        "experts", "swiglu-bias float32", "parity", fast=True,
    ),
    Fault(
        "the down bias is that of another expert", "each expert's bias", "products",
        "tl.load(BIAS + expert.to(tl.int64) * outer + column", "tl.load(BIAS + column", "experts", "gelu-bias float32", "parity",
    ),
    Fault(
        "rows are written without a mask", "the row mask of the output", "products",
        "tl.store(out_at, out.to(OUT.dtype.element_ty), mask=row_inside[:, None] & column_inside[None, :])",
        "tl.store(out_at, out.to(OUT.dtype.element_ty), mask=(row >= 0)[:, None] & column_inside[None, :])",
        "memory", "drops plain", "race",
    ),
    Fault(
        "every tile of columns adds the bias's part of the gate's gradient", "one tile adds ⟨dy, b⟩", "products",
        "        if column_tile == 0:\n            dgate += row_dot_bias",
        "        if column_tile >= 0:\n            dgate += row_dot_bias",
        "experts", "gelu-bias float32", "parity",
    ),
    Fault(
        "the gate's gradient lacks the bias's part", "the gate scales the bias too", "products",
        "        if column_tile == 0:\n            dgate += row_dot_bias", "        if column_tile < 0:\n            dgate += row_dot_bias",
        "experts", "gelu-bias float32", "parity",
    ),
    Fault(
        "tiles of columns add up in one row without an atomic", "each column tile has its own row of parts", "products",
        "tl.store(DGATE + column_tile.to(tl.int64) * assignments + first_row + row, dgate, mask=row_inside)",
        "tl.store(DGATE + first_row + row, tl.load(DGATE + first_row + row, mask=row_inside, other=0.0) + dgate, mask=row_inside)",
        "memory", "off-tile-widths plain", "race", fast=True,
    ),
    Fault(
        "the gate is applied twice", "dW_down is made of g h", "products",
        "(gate * hidden).to(WEIGHTED", "(gate * gate * hidden).to(WEIGHTED", "experts", "drops float32", "parity", fast=True,
    ),
    Fault(
        "the gate does not reach the activation's gradient", "dpre = act'(g dh)", "products",
        "BACKWARD(gate_proj, up, gate * dhidden)", "BACKWARD(gate_proj, up, dhidden)", "experts", "drops float32", "parity",
    ),
    Fault(
        "the two halves of the gradient are swapped", "gate rows first, in the gradient too", "products",
        "dgate_proj, dup = BACKWARD(", "dup, dgate_proj = BACKWARD(", "experts", "swiglu-bias float32", "parity",
    ),
    Fault(
        "a token's place in memory does not fit into its integer", "64 bits where a token is multiplied by a stride", "products",
        "x_at = X + token.to(tl.int64)[:, None]", "x_at = X + token[:, None]", "far", "products", "far addresses", fast=True,
    ),
    Fault(
        "an expert's place in memory does not fit into its integer", "64 bits where an expert is multiplied by a stride", "products",
        "w_at = UP + expert.to(tl.int64) * stride_expert", "w_at = UP + expert * stride_expert", "far", "products", "far addresses",
    ),
    Fault(
        "a row's place in the hidden layer does not fit into its integer", "64 bits where a row is multiplied by the width", "products",
        "hidden_at = HIDDEN + first_row.to(tl.int64) * F", "hidden_at = HIDDEN + first_row * F", "far", "rows", "far addresses", fast=True,
    ),
    Fault(
        "a row's place in the output does not fit into its integer", "64 bits where a row is multiplied by the width", "products",
        "out_at = OUT + first_row.to(tl.int64) * outer", "out_at = OUT + first_row * outer", "far", "rows", "far addresses",
    ),
)  # fmt: skip

ACTIVATIONS = (
    Fault(
        "the sigmoid has the wrong sign", "σ(z) = 1 / (1 + exp(−z))", "activations",
        "1.0 / (1.0 + tl.exp(-z))", "1.0 / (1.0 + tl.exp(z))", "experts", "drops float32", "parity", fast=True,
    ),
    Fault(
        "the derivative of SwiGLU has the wrong sign", "1 + a (1 − σ)", "activations",
        "dhidden * up * share * (1.0 + gate_proj * (1.0 - share))", "dhidden * up * share * (1.0 - gate_proj * (1.0 - share))",
        "experts", "drops float32", "parity",
    ),
    Fault(
        "GELU is not the exact one", "Φ by erf", "activations",
        "return 0.5 * (1.0 + tl.math.erf(u * INVERSE_ROOT_2))", "return sigmoid(1.702 * u)", "experts", "gelu-bias float32", "parity",
    ),
    Fault(
        "the derivative of GELU lacks the density", "Φ(u) + u φ(u)", "activations",
        "dup = dhidden * (normal_cdf(up) + up * tl.exp(-0.5 * up * up) * INVERSE_ROOT_2PI)", "dup = dhidden * normal_cdf(up)",
        "experts", "gelu-bias float32", "parity",
    ),
    Fault(
        "ReLU's gradient passes where the layer is off", "du = dh where u > 0", "activations",
        "    dup = tl.where(up > 0, dhidden, 0.0)\n", "    dup = tl.where(up > -1.0, dhidden, 0.0)\n", "experts", "relu float32", "parity",
    ),
)  # fmt: skip

GATHERS = (
    Fault(
        "the last slot wins", "K rows are added", "gathers",
        "        out += rows\n", "        out = rows\n", "experts", "drops float32", "parity", fast=True,
    ),
    Fault(
        "a dropped assignment's row is read", "dropped rows are never computed", "gathers",
        "used = token_inside & (place < kept)", "used = token_inside & (place >= 0)", "experts", "drops float32", "poison", fast=True,
    ),
    Fault(
        "a dropped assignment's gate is multiplied in", "0 times a NaN is a NaN", "gathers",
        "rows *= tl.load(GATE + token * K + slot, mask=used, other=0.0)",
        "rows *= tl.load(GATE + token * K + slot, mask=token_inside, other=0.0)",
        "isolation", "gate", "NaN isolation", fast=True,
    ),
    Fault(
        "the gates are those of the next slot", "each slot has its own gate", "gathers",
        "rows *= tl.load(GATE + token * K + slot,",
        "rows *= tl.load(GATE + token * K + (slot + 1) % K,", "experts", "drops float32", "parity",
    ),
    Fault(
        "the first part of the gate's gradient is lost", "every column tile has a part", "gathers",
        "for part in range(0, parts):", "for part in range(1, parts):", "experts", "drops float32", "parity",
    ),
    Fault(
        "the gate's gradient is stored by place", "the gate's gradient is by assignment", "gathers",
        "tl.store(DGATE + token * K + slot, dgate", "tl.store(DGATE + place, dgate", "experts", "drops float32", "parity",
    ),
    Fault(
        "every column tile writes the gate's gradient", "one tile writes it", "gathers",
        "            if column_tile == 0:\n                dgate", "            if column_tile >= 0:\n                dgate",
        "memory", "off-tile-widths plain", "race",
    ),
    Fault(
        "tokens behind the last are written", "the token mask", "gathers",
        "mask=token_inside[:, None] & column_inside[None, :])\n\n", "mask=(token >= 0)[:, None] & column_inside[None, :])\n\n",
        "memory", "off-tile-widths plain", "bounds",
    ),
    Fault(
        "a place's row does not fit into its integer", "64 bits where a place is multiplied by the width", "gathers",
        "rows_at = ROWS + place.to(tl.int64)[:, None] * D", "rows_at = ROWS + place[:, None] * D", "far", "rows", "far addresses",
    ),
    Fault(
        "an expert without rows writes nothing", "the gradient of an empty expert is exactly 0", "gathers",
        "    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)\n",
        "    if tl.load(BOUNDS + expert) == end:\n        return\n    dweight = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)\n",
        "experts", "empty-experts float32", "poison", fast=True,
    ),
    Fault(
        "the sum over the rows reaches into the next expert", "the row mask of the weight gradient", "gathers",
        "        inside = place < end\n", "        inside = place < end + 1\n", "experts", "swiglu-bias float32", "parity", fast=True,
    ),
    Fault(
        "the weight gradient is added up in the operands' dtype", "sums over the rows in fp32", "gathers",
        "right.to(kind), dweight, input_precision=PRECISION)",
        "right.to(kind), dweight, input_precision=PRECISION).to(tl.float16).to(tl.float32)",
        "experts", "drops float32", "parity",
    ),
    Fault(
        "the down bias's gradient lacks the gate", "db_down = Σ g dy", "gathers",
        "weighted *= tl.load(GATE + assignment, mask=inside, other=0.0).to(tl.float32)[None, :]", "weighted *= 1.0",
        "experts", "gelu-bias float32", "parity",
    ),
    Fault(
        "columns behind the last of the weight gradient are written", "the column mask of the weight gradient", "gathers",
        "mask=row_inside[:, None] & column_inside[None, :])\n    if DBIAS",
        "mask=row_inside[:, None] & (column >= 0)[None, :])\n    if DBIAS",
        "memory", "off-tile-widths plain", "bounds",
    ),
)  # fmt: skip

ROUTING = (
    Fault(
        "ties go to the highest id", "ties to the lowest id", "routing",
        "tl.min(tl.where(open_ & (ranked == best[:, None]), lane[None, :], LANES), 1)",
        "tl.max(tl.where(open_ & (ranked == best[:, None]), lane[None, :], -1), 1)", "router", "ties", "integers", fast=True,
    ),
    Fault(
        "a NaN is compared", "NaN is never better than a number", "routing",
        "open_ & (value == value)", "open_", "isolation", "logits", "NaN isolation", fast=True,
    ),
    Fault(
        "padded lanes share in the softmax", "E is no power of two", "routing",
        "exp = tl.where(inside, tl.exp(logits - peak[:, None]), 0.0)", "exp = tl.exp(logits - peak[:, None])",
        "router", "deepseek-v2", "parity", fast=True,
    ),
    Fault(
        "padded lanes can be chosen", "the lanes behind E are closed", "routing",
        "open_ = tl.zeros((BLOCK, LANES), tl.int1) | lane_inside", "open_ = tl.zeros((BLOCK, LANES), tl.int1) | (lane >= 0)[None, :]",
        "router", "padded", "integers",
    ),
    Fault(
        "an expert is chosen twice", "a chosen lane is closed", "routing",
        "        open_ = open_ & (lane[None, :] != expert[:, None])\n", "", "router", "ties", "integers",
    ),
    Fault(
        "the correction bias leaks into the gates", "the bias is for the choice alone", "routing",
        "score = tl.sum(tl.where(own, scores, 0.0), 1)", "score = tl.sum(tl.where(own, choice, 0.0), 1)",
        "router", "deepseek-v3", "parity", fast=True,
    ),
    Fault(
        "padding counts in the load", "only real tokens are counted", "routing",
        "load += tl.sum((own & real[:, None]).to(tl.int32), 0)", "load += tl.sum((own & token_inside[:, None]).to(tl.int32), 0)",
        "router", "deepseek-v3", "integers", fast=True,
    ),
    Fault(
        "a group is judged by its best expert twice", "the two best of a group", "routing",
        "others = own & (lane[None, :] != at[:, None])", "others = own", "router", "deepseek-v3", "integers",
    ),
    Fault(
        "one group too few is open", "the number of open groups", "routing",
        "for _ in range(0, TOP_GROUPS):", "for _ in range(1, TOP_GROUPS):", "router", "deepseek-v2", "integers",
    ),
    Fault(
        "the scale is left out of the backward", "dg is scaled as g was", "routing",
        "mask=slot_inside, other=0.0) * scale\n", "mask=slot_inside, other=0.0)\n", "router", "deepseek-v2", "parity",
    ),
    Fault(
        "the softmax's backward lacks the mean", "s ⊙ (ds − Σ ds s)", "routing",
        "return scores * (dscores - tl.sum(dscores * scores, 1)[:, None])", "return scores * dscores", "router", "gshard", "parity",
    ),
    Fault(
        "logits are loaded without the lanes' mask", "a row ends at E", "routing",
        "logits = tl.load(LOGITS + in_row, mask=token_inside[:, None] & lane_inside, other=0.0)",
        "logits = tl.load(LOGITS + in_row, mask=token_inside[:, None], other=0.0)", "router", "deepseek-v3", "bounds",
    ),
)  # fmt: skip

LAUNCH = (
    Fault(
        "too few tiles for a ragged load", "an upper bound of the tiles, whatever the load", "launch",
        "return assignments // rows + min(assignments, experts + 1)", "return assignments // rows + 1", "integers", "drops", "bounds",
    ),
    Fault(
        "fp32 is computed as tf32", "fp32 means fp32 unless torch's switch says otherwise", "launch",
        'if dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest" else', "if dtype == torch.float32 else",
        "experts", "drops float32", "parity", fast=True,
    ),
    Fault(
        "the cotangent's strides are assumed", "what is read row by row is contiguous", "launch",
        "    dy, x, gate, up, down = (tensor.contiguous() for tensor in (dy, x, gate, up, down))\n", "",
        "experts", "non-contiguous float32",
        "parity",
    ),
    Fault(
        "the block sizes follow the batch", "a token's bits do not depend on its batch", "launch",
        '    blocks = blocks_of("product", weight.dtype, precision)\n',
        '    blocks = blocks_of("product", weight.dtype, precision)\n'
        "    blocks = blocks._replace(depth=16) if len(rows_NI) > 32 else blocks\n",
        "batch", "experts", "batch invariance", fast=True,
    ),
    Fault(
        "the backward reads a stale activation", "the backward's h is made again from what this forward saved", "launch",
        "return y, up.new_empty(0, up.shape[1]) if pre is None else pre, schedule.order",
        "return y, up.new_empty(0, up.shape[1]) if pre is None else torch.zeros_like(pre), schedule.order",
        "experts", "drops float32", "parity", fast=True,
    ),
    Fault(
        "the inverse permutation is saved", "the backward restores everything from the order", "launch",
        "else pre, schedule.order, schedule.bounds", "else pre, schedule.place, schedule.bounds", "experts", "drops float32", "parity",
    ),
    Fault(
        "the gate is left out of the down bias's gradient", "the launcher hands the gates over", "launch",
        "None if bias_like is None else gate, dweight", "None, dweight", "experts", "gelu-bias float32", "parity",
    ),
)  # fmt: skip

FAULTS = (*SCHEDULE, *PRODUCTS, *ACTIVATIONS, *GATHERS, *ROUTING, *LAUNCH)
