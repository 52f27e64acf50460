# %% [markdown]
# # 08 · Dispatch as sorting
#
# The router has decided. Now every token must get to its experts and back, with no loop over tokens and nothing computed that nobody
# asked for. Two ideas are new: **dispatch is a stable sort**, described by three small arrays of integers, and **its inverse turns a
# scatter into a gather**.
#
# Before each result, write down what you expect, and only then run the cell.
#
# Read along: {{docs/chapters/dispatch.md}} · before this: [07](07_language_model.ipynb)

# %%
import numpy as np

from notebooks import plots
from notebooks.checks import check
from notebooks.prints import sentence
from reference import MoEConfig, dispatch, init_params
from reference.config import ExpertsConfig
from reference.dispatch import combine_forward, dispatch_backward, dispatch_forward
from reference.experts import experts_forward
from reference.gating import top_k
from reference.proof import bugs

TOKENS, WIDTH, EXPERTS, K = 10, 8, 4, 2
rng = np.random.default_rng(0)
config = MoEConfig(WIDTH, experts=ExpertsConfig(EXPERTS, 6, "relu"))
params = init_params(config, rng)
x_TD = rng.standard_normal((TOKENS, WIDTH))
expert_TK = top_k(rng.standard_normal((TOKENS, EXPERTS)), K)
gate_TK = rng.dirichlet(np.ones(K), TOKENS)
keep_TK = np.ones(expert_TK.shape, bool)
keep_TK[3, 1] = keep_TK[9, 0] = False
for token in range(4):
    experts, kept = expert_TK[token].tolist(), keep_TK[token].tolist()
    print(f"token {token} → experts {experts}, kept {kept}")

# %% [markdown]
# ## 1 · The loop that everybody understands
#
# For each token and each of its choices: send the token through the expert, weigh the result, add it up.
#
# **Predict.** 10 tokens, K = 2, two assignments dropped. How many products of a *vector* with an expert's matrices does this loop make?
# On a machine that is fast at products of *matrices*, what is wrong with it?


# %%
def run_expert(expert: int, rows_ND: np.ndarray) -> np.ndarray:
    """Expert number `expert` on some rows."""
    bounds_P = np.where(np.arange(EXPERTS + 1) > expert, len(rows_ND), 0)
    return experts_forward(rows_ND, bounds_P, params, config.experts)[0]


looped_TD, products = np.zeros_like(x_TD), 0
for token in range(TOKENS):
    for slot in range(K):
        if keep_TK[token, slot]:
            out_ND = run_expert(expert_TK[token, slot], x_TD[[token]])
            looped_TD[token] += gate_TK[token, slot] * out_ND[0]
            products += 1
print(products, "products of one row")

# %% [markdown]
# Each of them reads all numbers of an expert's matrices to use them for a single row.
#
# ## 2 · Sort
#
# List the kept assignments token by token: above stands the token, below it the expert.

# %%
token_N, slot_N = np.nonzero(keep_TK)
expert_N = expert_TK[token_N, slot_N]
print("token ", *token_N)
print("expert", *expert_N)
print("rows of each expert:", np.bincount(expert_N, minlength=EXPERTS).tolist())

# %% [markdown]
# Now sort this list by expert, in such a way that entries of the same expert stay in the order in which they stand. Each entry becomes a
# **row**: a copy of the token. Rows are counted from 0.
#
# **Predict.** In which rows will token 0's two copies be afterwards? Where do expert 2's rows begin?

# %%
by_expert_N = np.argsort(expert_N, kind="stable")
print("token ", *token_N[by_expert_N])
print("expert", *expert_N[by_expert_N])
print("token 0 in rows", np.flatnonzero(token_N[by_expert_N] == 0).tolist())
print("expert 2 from row", int(np.argmax(expert_N[by_expert_N] == 2)))
orders = (np.arange(len(token_N)), by_expert_N)
plots.moves(token_N, expert_N, ("before sorting", "after sorting"), orders)

# %% [markdown]
# Left, tokens are in order and experts mixed; right, each expert's rows are neighbours, and inside an expert the tokens still run
# downwards. That is what **stable** means.
#
# ## 3 · The three arrays (exercise)
#
# Everything about dispatch is said by `token_N` (whose copy a row is), `slot_N` (which of its choices) and `bounds_P`: expert e owns the
# rows from `bounds[e]` up to `bounds[e + 1]`, so there are P = E + 1 bounds. Return these three arrays.
#
# **Predict.** What are the bounds of an expert that nobody chose?
#
# <details><summary>Hint 1</summary><code>np.nonzero(keep_TK)</code> lists token by token, which is the order to keep.</details>
# <details><summary>Hint 2</summary>Bounds are a running sum of the counts, with a 0 in front. <code>np.bincount</code> must not stop at
# the last expert that was chosen: <code>minlength</code>.</details>


# %% EXERCISE
def sort_rows(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> tuple:
    """token [N], slot [N], bounds [E + 1] of the kept assignments in expert order."""
    raise NotImplementedError


# %% SOLUTION
def sort_rows(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> tuple:
    """token [N], slot [N], bounds [E + 1] of the kept assignments in expert order."""
    token_N, slot_N = np.nonzero(keep_TK)
    expert_N = expert_TK[token_N, slot_N]
    order_N = np.argsort(expert_N, kind="stable")
    count_E = np.bincount(expert_N, minlength=experts)
    return token_N[order_N], slot_N[order_N], np.concatenate([[0], np.cumsum(count_E)])


# %%
check("sort_rows", sort_rows)

# %% [markdown]
# The reference's is {{reference.dispatch.dispatch_forward}}. An expert that nobody chose begins and ends at the same row.
#
# ## 4 · Experts on slices, and back
#
# Each expert now makes one product with all of its rows ({{reference.experts.experts_forward}}), and the results are weighed and added to
# their tokens ({{reference.dispatch.combine_forward}}).
#
# **Predict.** How many products are there now? Is the result equal to the loop's to the last bit?

# %%
rows_ND, where = dispatch_forward(x_TD, expert_TK, keep_TK, EXPERTS)
out_ND = experts_forward(rows_ND, where.bounds_P, params, config.experts)[0]
sorted_TD, _ = combine_forward(out_ND, gate_TK, where)
rows_E = np.diff(where.bounds_P).tolist()
same = bool(np.allclose(sorted_TD, looped_TD, rtol=0, atol=1e-14))
print("bounds:", where.bounds_P.tolist())
print(f"{EXPERTS} products of {rows_E} rows")
print("equal to the loop up to rounding:", same)

# %% [markdown]
# Equal to the last bit it need not be: a product of many rows may add its terms in another order than a product of one row, and the order
# depends on the processor.
#
# ## 5 · Scatter or gather
#
# Adding to tokens is a **scatter**: two rows may belong to one token.
#
# **Predict.** What is wrong with `y[token_N] += weighted_ND`?

# %%
weighted_ND = gate_TK[where.token_N, where.slot_N][:, None] * out_ND
hasty_TD = np.zeros_like(x_TD)
hasty_TD[where.token_N] += weighted_ND
wrong_T = ~np.isclose(hasty_TD, sorted_TD, rtol=0, atol=1e-14).all(1)
print("wrong tokens:", np.flatnonzero(wrong_T).tolist())
print("kept choices of the others:", keep_TK.sum(1)[~wrong_T].tolist())
sentence(f"in the museum: {bugs.get('last slot wins').mistake}")

# %% [markdown]
# Only tokens with a single row come out right: NumPy reads, adds and writes once for each distinct index. `np.add.at` adds them all. The
# museum's mistake is of the same kind, with gates instead of rows: where both choices of a token are one expert, its two gates are written
# to one place.
#
# The other way: invert the permutation. `row_TK[t, k]` says in which row choice k of token t was computed. Then each token **gathers**
# its K rows and adds them in a fixed order: no two programs write to one place, nobody waits, and the bits are the same every time.
#
# **Predict.** How is the inverse made from `token_N` and `slot_N` in one assignment? What stands where an assignment was dropped?

# %%
row_TK = np.full(expert_TK.shape, -1)
row_TK[where.token_N, where.slot_N] = np.arange(len(where.token_N))
padded_ND = np.concatenate([out_ND, np.zeros((1, WIDTH))])
gathered_TD = (gate_TK[:, :, None] * padded_ND[row_TK]).sum(1)
print("rows of the first four tokens:")
print(row_TK[:4].tolist())
same = bool(np.allclose(gathered_TD, sorted_TD, rtol=0, atol=1e-14))
print("equal to the scatter up to rounding:", same)

# %% [markdown]
# What was dropped keeps the −1. As an index that is the last row, and there `padded_ND` has zeros.
#
# The fast track's kernels do both: they gather rows while they multiply, and gather again to combine ({{optimized/kernels/gathers.py}}).
#
# ## 6 · Backwards
#
# Dispatch copies; its transpose adds the copies up ({{reference.dispatch.dispatch_backward}}).
#
# **Predict.** For any rows $r$, multiply dispatch($x$) with $r$ number by number and add everything up, and likewise $x$ with
# dispatch_backward($r$). The two sums are the same number. Why?

# %%
r_ND = rng.standard_normal(rows_ND.shape)
left, right = (rows_ND * r_ND).sum(), (x_TD * dispatch_backward(r_ND, where)).sum()
print(f"{left:.6f} and {right:.6f}")

# %% [markdown]
# Dispatch is a matrix $M$ of zeros and ones, one row for each row of the list, and dispatch_backward is $M^\top$. For each column both sums
# are $x^\top M^\top r$.
#
# ## 7 · The same with einsums
#
# GShard wrote that matrix down: a tensor [T, K, E, C] of zeros and ones that says which token's which choice sits in which slot of which
# expert ({{reference.dispatch.one_hot_slots}}; C is the capacity). Then dispatch and combine are products with it, which NumPy writes as
# `np.einsum`.
#
# **Predict.** Same result? And how many entries has the tensor for 4,096 tokens, K = 2, 64 experts, with capacity factor 1? How many are
# ones?

# %%
slot_TKEC = dispatch.one_hot_slots(expert_TK, keep_TK, EXPERTS, capacity=max(rows_E))
rows_ECD = dispatch.one_hot_dispatch(x_TD, slot_TKEC)
out_ECD = np.stack([run_expert(expert, rows_ECD[expert]) for expert in range(EXPERTS)])
combined_TD = dispatch.one_hot_combine(out_ECD, gate_TK, slot_TKEC)
same = bool(np.allclose(combined_TD, sorted_TD, rtol=0, atol=1e-14))
print("equal to the sort up to rounding:", same)
tokens, experts = 4096, 64
capacity = K * tokens // experts
print(f"{tokens * K * experts * capacity:,} entries, up to {tokens * K:,} of them 1")
print(f"the sort needs {2 * tokens * K + experts + 1:,} integers")

# %% [markdown]
# The tensor grows with the square of the number of tokens, the sort with the number. This is why the einsum lives in small groups, and
# why everything fast since MegaBlocks sorts.
#
# Try: in section 2, sort with `kind="quicksort"` and look for a difference. Why may you not find one here, and what would a difference
# break?
#
# **Next:** [09 · your first Triton kernel](09_triton_kernel.ipynb)
