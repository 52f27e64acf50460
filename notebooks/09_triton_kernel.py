# needs: torch, triton
# environment: TRITON_INTERPRET=1
# %% [markdown]
# # 09 · Your first Triton kernel, in the interpreter
#
# A kernel is a function that a GPU runs thousands of times at once, each time on another piece of the work. Triton's interpreter runs the
# same function on any CPU, one piece after the other: slow, and good for learning. The first cell sets `TRITON_INTERPRET=1`. Two ideas
# are new: **a program owns a tile, and a mask says which of it is real**, and **a tile never crosses experts**.
#
# Before each result, write down what you expect, and only then run the cell.
#
# Read along: {{docs/chapters/ladder.md}} · the project's own kernels: {{optimized/kernels/products.py}} · before this:
# [08](08_dispatch.ipynb)

# %%
import importlib

import numpy as np
import torch
import triton
import triton.language as tl

from notebooks import plots
from notebooks.checks import check
from notebooks.exercises.grouped_product import launched, tile_table
from reference.dispatch import dispatch_forward
from reference.gating import top_k
from reference.proof.equal import compare

TOKENS, WIDTH, HIDDEN, EXPERTS, K = 24, 40, 24, 4, 2
rng = np.random.default_rng(0)
x_TD = rng.standard_normal((TOKENS, WIDTH)).astype(np.float32)
expert_TK = top_k(np.array([1.0, 0.3, 0.0, -1.0]) + rng.standard_normal((TOKENS, EXPERTS)), K)
rows_ND, where = dispatch_forward(x_TD, expert_TK, np.ones(expert_TK.shape, bool), EXPERTS)
print("rows of each expert:", np.diff(where.bounds_P).tolist())

# %% [markdown]
# ## 1 · Programs, blocks, masks
#
# `@triton.jit` makes a kernel of a function. A launch says in square brackets how many *programs* there are, and every program runs the
# same lines. What differs is `tl.program_id(0)`, from which it computes *which* elements are its own: a block of them, one for each *lane*.
# A block has a power of two of lanes (`tl.constexpr`: known before the kernel is compiled), whether or not there is something for each; a
# **mask** switches off the others. An array arrives as the address of its first element, and `tl.load` and `tl.store` take address + index.
#
# **Predict.** 10 numbers, blocks of 4: how many programs are launched? Which lanes of the last one are masked?


# %%
@triton.jit
def double_kernel(X, Y, WHO, count, BLOCK: tl.constexpr):
    """y = 2 x, and who computed it."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    tl.store(Y + at, 2 * tl.load(X + at, mask=inside, other=0.0), mask=inside)
    tl.store(WHO + at, tl.program_id(0), mask=inside)


x, y = torch.arange(10.0), torch.full((12,), -1.0)
who = torch.full((12,), -1, dtype=torch.int32)
double_kernel[(triton.cdiv(10, 4),)](x, y, who, 10, BLOCK=4)
for name, values in (("y", y.int()), ("who", who)):
    print(f"{name:>3}:", *(f"{value:2}" for value in values.tolist()))

# %% [markdown]
# `who` is the program that computed a number. The last two places were there, and nobody touched them.
#
# ## 2 · Can the interpreter be trusted?
#
# **Predict.** In bfloat16, the 16-bit number of notebook 06, what is 1 + 1? What is it in Triton's interpreter, which stores a bfloat16 as
# the 16-bit integer of its bits? (1.0 is the bit pattern 0x3F80.)


# %%
@triton.jit
def add_kernel(X, Y, OUT):
    """out = x + y, one number each."""
    tl.store(OUT, tl.load(X) + tl.load(Y))


def one_plus_one() -> float:
    """1 + 1 in bfloat16, by a kernel."""
    one, out = torch.ones(1, dtype=torch.bfloat16), torch.zeros(1, dtype=torch.bfloat16)
    add_kernel[(1,)](one, one, out)
    return out.item()


print(f"as the interpreter is: 1 + 1 = {one_plus_one():.1e}")
importlib.import_module("optimized.kernels.interpreter").repair()
print(f"repaired:              1 + 1 = {one_plus_one():.1e}")

# %% [markdown]
# It adds the *bits* as integers, 0x3F80 + 0x3F80 = 0x7F00, which are those of a huge number, and says nothing. The project calls
# {{optimized.kernels.interpreter.repair}}, which mends this arithmetic, before it trusts any number from the interpreter.
#
# ## 3 · Gather: dispatch as a kernel
#
# One program for each row: it reads which token its row is a copy of, and copies.
#
# **Predict.** WIDTH is 40, and a block must be a power of two. How many lanes does each program have, how many are masked?


# %%
@triton.jit
def gather_kernel(X, TOKEN, ROWS, D, BLOCK: tl.constexpr):
    """rows[n] = x[token[n]]. Grid: (N); a program owns one row."""
    row = tl.program_id(0)
    token = tl.load(TOKEN + row)
    column = tl.arange(0, BLOCK)
    inside = column < D
    values = tl.load(X + token * D + column, mask=inside, other=0.0)
    tl.store(ROWS + row * D + column, values, mask=inside)


x, token = torch.from_numpy(x_TD), torch.from_numpy(where.token_N)
lanes = triton.next_power_of_2(WIDTH)
gathered = torch.full(rows_ND.shape, float("nan"))
gather_kernel[(len(rows_ND),)](x, token, gathered, WIDTH, BLOCK=lanes)
print(f"{lanes} lanes, {lanes - WIDTH} of them masked")
print("the reference's rows, to the bit:", bool(np.array_equal(gathered.numpy(), rows_ND)))

# %% [markdown]
# That was {{reference.dispatch.dispatch_forward}} as a kernel.
#
# ## 4 · Tiles that respect experts
#
# Now the product: $\mathrm{out} = \mathrm{rows} \cdot W_e$, with expert $e$'s matrix for expert $e$'s rows. A program owns a **tile** of
# the result, 16 rows and 16 columns. If tiles simply cut the rows into pieces of 16, one tile would need two matrices. So each expert
# begins a tile of its own, and its last one is partly empty.
#
# **Predict.** From the rows of each expert printed above: how many tiles are there? How many lanes along the rows are wasted?

# %%
tiles = tile_table(where.bounds_P)
spans = [(int(expert), int(first), int(where.bounds_P[expert + 1])) for expert, first in tiles]
print("(expert, first row) of each tile:")
print(*((expert, first) for expert, first, _ in spans))
print(f"{len(tiles)} tiles, {16 * len(tiles)} lanes for {len(rows_ND)} rows")
plots.tiles(spans, 16, EXPERTS)

# %% [markdown]
# The hatched part of a tile lies over the *next* expert's rows. A store without a mask would overwrite them. The table runs
# backwards on purpose: a GPU promises no order, and in this one the damage shows.
#
# ## 5 · The grouped product (exercise)
#
# The programs form a grid: `tl.program_id(0)` says which tile of rows, `tl.program_id(1)` which block of columns. TILES holds the table
# above, (expert, first row) of every tile, and BOUNDS is `bounds_P` of notebook 08: expert $e$'s rows end before BOUNDS[$e$ + 1]. This is
# how the kernel begins: the tile's expert, its rows and columns, and which of them are real.
#
# ```python
# expert = tl.load(TILES + 2 * tl.program_id(0))
# row = tl.load(TILES + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK_ROWS)
# column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
# row_inside = row < tl.load(BOUNDS + expert + 1)
# column_inside = column < F
# total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
# ```
#
# Copy these lines into the cell with `raise NotImplementedError`, in its place, and write the rest. D need not be a multiple of
# BLOCK_DEPTH.
#
# - ROWS is [N, D], WEIGHT is [E, D, F], OUT is [N, F], all one row after the other in memory.
# - Walk along the depth in steps of BLOCK_DEPTH: load a tile of ROWS, a tile of WEIGHT, and add their product.
# - Store once, at the end.
#
# **Predict.** Which *three* masks does the kernel need, and what would happen without each?
#
# <details><summary>Hint 1</summary>Element (n, d) of ROWS is at <code>ROWS + n * D + d</code>; element (e, d, f) of WEIGHT at
# <code>WEIGHT + (e * D + d) * F + f</code>. A tile of addresses: <code>row[:, None] * D + depth[None, :]</code>.</details>
# <details><summary>Hint 2</summary><code>total = tl.dot(a, b, total, input_precision="ieee")</code> adds a product to the total;
# "ieee" forbids a GPU to round the operands to fewer bits first.</details>
# <details><summary>Hint 3</summary>In the last step some depths lie beyond D: load 0 there, from both operands, with
# <code>mask=…, other=0.0</code>.</details>


# %% EXERCISE
@triton.jit
def grouped_kernel(
    ROWS, WEIGHT, OUT, BOUNDS, TILES, D, F,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """out = rows · W_e. Grid: (tiles, ⌈F / BLOCK_COLUMNS⌉); a program owns a tile."""
    raise NotImplementedError


# %% SOLUTION
@triton.jit
def grouped_kernel(
    ROWS, WEIGHT, OUT, BOUNDS, TILES, D, F,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_DEPTH: tl.constexpr,
):  # fmt: skip
    """out = rows · W_e. Grid: (tiles, ⌈F / BLOCK_COLUMNS⌉); a program owns a tile."""
    expert = tl.load(TILES + 2 * tl.program_id(0))
    row = tl.load(TILES + 2 * tl.program_id(0) + 1) + tl.arange(0, BLOCK_ROWS)
    column = tl.program_id(1) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)
    row_inside = row < tl.load(BOUNDS + expert + 1)
    column_inside = column < F
    total = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for start in range(0, D, BLOCK_DEPTH):
        depth = start + tl.arange(0, BLOCK_DEPTH)
        rows_at = ROWS + row[:, None] * D + depth[None, :]
        weight_at = WEIGHT + (expert * D + depth[:, None]) * F + column[None, :]
        rows_real = row_inside[:, None] & (depth < D)[None, :]
        weight_real = (depth < D)[:, None] & column_inside[None, :]
        rows = tl.load(rows_at, mask=rows_real, other=0.0)
        weight = tl.load(weight_at, mask=weight_real, other=0.0)
        total = tl.dot(rows, weight, total, input_precision="ieee")
    out_at = OUT + row[:, None] * F + column[None, :]
    tl.store(out_at, total, mask=row_inside[:, None] & column_inside[None, :])


# %%
check("grouped_product", launched(grouped_kernel))

# %% [markdown]
# Before it calls the checker, {{notebooks.exercises.grouped_product.launched}} makes of your kernel a function of arrays: it allocates OUT,
# makes the table of tiles and launches the kernel once.
#
# The three masks: without that of the rows a tile overwrites the next expert's, without that of the columns it runs on into the next row of
# OUT, and without that of the depth it adds products of numbers that belong to other rows.
#
# ## 6 · What “equal” means
#
# Your kernel adds in another order than NumPy, so the last bits differ. The checker asks {{reference.proof.equal.compare}}: is the error,
# measured from the truth in fp64, at most about twice that of a plain fp32 product? That is only worth something if it also says no.
#
# **Predict.** Here is the project's own kernel on our rows, and four wrong results made from it. Which of the five does the comparison
# accept?

# %%
weight_EDF = rng.standard_normal((EXPERTS, WIDTH, HIDDEN)) / np.sqrt(WIDTH)
weight_EDF = weight_EDF.astype(np.float32)


def by_expert(rows_ND: np.ndarray, weight_EDF: np.ndarray) -> np.ndarray:
    """rows · W_e, expert after expert, in the precision of the arguments."""
    slices = [slice(where.bounds_P[e], where.bounds_P[e + 1]) for e in range(EXPERTS)]
    return np.concatenate([rows_ND[own] @ weight_EDF[e] for e, own in enumerate(slices)])


truth_NF = by_expert(rows_ND.astype(np.float64), weight_EDF.astype(np.float64))
eager_NF = by_expert(rows_ND, weight_EDF)

# %%
launch = importlib.import_module("optimized.kernels.launch")
blocks = importlib.import_module("optimized.kernels.blocks")
height = blocks.blocks_of("product", torch.float32, "ieee").rows
keep_TK = torch.ones(expert_TK.shape, dtype=torch.bool)
schedule = launch.sort_by_expert(torch.from_numpy(expert_TK), keep_TK, EXPERTS, height)
rows, weight = torch.from_numpy(rows_ND), torch.from_numpy(weight_EDF)
found_NF = launch.expert_product(rows, weight, None, schedule).numpy()
order_N = np.arange(len(rows_ND))
order_N[[0, 20]] = 20, 0
results = {
    "the kernel": found_NF,
    "zeros": 0 * found_NF,
    "2 % too large": 1.02 * found_NF,
    "sign turned": -found_NF,
    "two rows swapped": found_NF[order_N],
}
for name, result_NF in results.items():
    passed = compare("out", result_NF, truth_NF, eager_NF, "float32").passed
    print(f"{name:>16}: {'accepted' if passed else 'rejected'}")

# %% [markdown]
# Published tests of such kernels have accepted zeros ({{docs/chapters/equal.md}}). A test that cannot fail proves nothing.
#
# Try, with a pencil: tiles of 32 rows instead of 16. How many are there, how many lanes are wasted, and what do you gain?
#
# This is the last notebook. {{docs/chapters/ladder.md}} goes on from here, one rung at a time, to the kernels that the fast track uses.
