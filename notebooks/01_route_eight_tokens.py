# %% [markdown]
# # 01 · Route eight tokens by hand
#
# A Mixture-of-Experts layer sends each token to a few of its experts. Here you route the eight words of one sentence through four
# experts and can follow every number with a pencil. Two ideas are new: **the router's choice** and **capacity**.
#
# A *token* is a vector that stands for a piece of text, here for a word. An *expert* is a small network that makes another vector of it:
# two matrices, and between them what is negative becomes 0. With T tokens, E experts and K choices for each token, we have T = 8, E = 4
# and K = 2 here.
#
# Before each result, write down what you expect, and only then run the cell.
#
# The example: {{reference/example.py}} · next to read: {{docs/chapters/capacity.md}}
#
# Such a link opens a file of the project; on the site it opens a page. A chapter is best read there: in its file, figures and equations
# are only named, in double braces. `make site` builds the site and serves it.

# %%
import numpy as np

from notebooks import plots
from notebooks.checks import check
from notebooks.prints import numbers
from reference import example, moe_forward
from reference.capacity import group_capacity
from reference.dispatch import combine_forward, dispatch_forward
from reference.experts import experts_forward
from reference.gating import gates_forward, top_k
from reference.scores import logits_forward, softmax_forward
from reference.tokens import token_info

x_TD, params, config = example.inputs(), example.params(), example.CONFIG
numbers(dict(zip(example.WORDS, x_TD, strict=True)), example.EXPERTS)

# %% [markdown]
# Each word is four numbers: how much grammar, thing, action and place is in it. The four experts have the same names.
#
# The last letters of a name are the shape of its array: `x_TD` is T × D, a row of D numbers for each of the T tokens; `expert_TK` will be
# T × K.
#
# ## 1 · Logits
#
# The **router** is what decides where a token goes: one matrix with a row for each expert. A **logit** is the product of that row with the
# word, number times number and all added up ({{reference.scores.logits_forward}}): the larger it is, the better the two fit. Here are the
# row of “action” and the word “sat”.

# %%
weight = params["router.weight"]
print("row of action:", weight[2])
print("sat:          ", x_TD[2])

# %% [markdown]
# **Predict.** What is their product, the logit of “action” for “sat”?

# %%
logits_TE, _ = logits_forward(x_TD, weight)
numbers(dict(zip(example.WORDS, logits_TE, strict=True)), example.EXPERTS)

# %% [markdown]
# ## 2 · The choice
#
# Each token takes the K = 2 experts with the largest logits ({{reference.gating.top_k}}). The best is its first choice. A token together
# with one of its choices is an **assignment**: there are T · K = 16 of them.
#
# **Predict.** Go through the table above: what are the two choices of each word? How often is each expert chosen altogether?

# %%
expert_TK = top_k(logits_TE, config.gating.top_k)
for word, (first, second) in zip(example.WORDS, expert_TK, strict=True):
    print(f"{word:>7} → {example.EXPERTS[first]}, then {example.EXPERTS[second]}")
load_E = np.bincount(expert_TK.ravel(), minlength=len(example.EXPERTS))
print("How often is each expert chosen?")
print(", ".join(f"{name} {load}" for name, load in zip(example.EXPERTS, load_E, strict=True)))

# %% [markdown]
# ## 3 · The gates
#
# A **gate** says how much a chosen expert counts. Softmax turns each logit z into a score: $e^z$, divided by the sum of all four $e^z$.
# Then the two chosen scores are divided by their sum ({{reference.gating.gates_forward}}).
#
# **Predict.** “sat” and “mat” have different logits and different experts, and yet the same two gates. What must you compare in the table
# to see why?

# %%
scores_TE, _ = softmax_forward(logits_TE)
gate_TK, _ = gates_forward(scores_TE, expert_TK, config.gating)
for token in (2, 5):
    first, second = expert_TK[token]
    gap = logits_TE[token, first] - logits_TE[token, second]
    print(f"{example.WORDS[token]}: gates {gate_TK[token].round(3)}, logits {gap:.1f} apart")

# %% [markdown]
# Only the difference of the two chosen logits matters: the first gate is $1 / (1 + e^{-\text{difference}})$, and the second is the
# rest, up to 1.
#
# ## 4 · Capacity
#
# On real hardware each expert has a fixed number of places, its **capacity**: here $\lceil 1 \cdot K T / E \rceil$, exactly enough if
# all experts were asked for equally often. The 1 is the *capacity factor*, which can be chosen larger. An assignment that finds no place is
# **dropped**: the token goes without that expert.
#
# **Predict.** Compute the capacity. Which expert cannot take everything it is asked for?

# %%
slots, tokens = config.gating.top_k, token_info(len(x_TD))
capacity = int(group_capacity(config.capacity, slots, len(load_E), tokens, training=True)[0])
too_many = [example.EXPERTS[expert] for expert in np.flatnonzero(load_E > capacity)]
print("capacity", capacity)
print("asked for more often:", ", ".join(too_many))
plots.load(load_E, capacity, example.EXPERTS)

# %% [markdown]
# ## 5 · Who is dropped? (exercise)
#
# The rule of GShard, a translation model of 2020 ({{docs/architectures/gshard.md}}): **all first choices** are served in the order of the
# sentence, then all second choices. An expert that is full refuses.
#
# **Predict.** Five words ask for “grammar”. Which one is refused?
#
# Write the rule in place of `raise NotImplementedError`, run the cell, and then the one with `check` below it. `expert_TK[t, k]` is choice
# k of token t, 0 being the first; return an array of the same shape, True where the assignment is kept.
#
# <details><summary>Hint 1</summary>Keep one counter for each expert: how many it has accepted so far.</details>
# <details><summary>Hint 2</summary>Two loops. Which one is the outer: the one over tokens, or the one over choices?</details>


# %% EXERCISE
def keep(expert_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    """Which assignments find a place: [T, K] ids → [T, K] bool."""
    raise NotImplementedError


# %% SOLUTION
def keep(expert_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    """Which assignments find a place: [T, K] ids → [T, K] bool."""
    keep_TK = np.zeros(expert_TK.shape, bool)
    accepted = np.zeros(experts, int)
    for slot in range(expert_TK.shape[1]):
        for token in range(len(expert_TK)):
            expert = expert_TK[token, slot]
            if accepted[expert] < capacity:
                keep_TK[token, slot] = True
                accepted[expert] += 1
    return keep_TK


# %%
check("keep", keep)

# %% [markdown]
# Below, the reference does the same ({{reference.capacity.keep_within_capacity}}); this notebook goes on with its result.

# %%
output, _ = moe_forward(x_TD, params, config, training=True)
keep_TK = output.routing.keep
for token, slot in np.argwhere(~keep_TK):
    name = example.EXPERTS[expert_TK[token, slot]]
    print(f"dropped: {name} for “{example.WORDS[token]}”, its choice {slot + 1}")

# %% [markdown]
# ## 6 · Dispatch, experts, combine
#
# The kept assignments are sorted by expert ({{reference.dispatch.dispatch_forward}}): each becomes a *row*, a copy of its token. Each
# expert works on its rows in one go, and a token's output is the sum of its experts' outputs, weighted by the gates
# ({{reference.dispatch.combine_forward}}).
#
# **Predict.** How many rows are there? Which words does “grammar” get, and in what order?

# %%
rows_ND, dispatch = dispatch_forward(x_TD, expert_TK, keep_TK, len(example.EXPERTS))
print(len(rows_ND), "rows")
for expert, name in enumerate(example.EXPERTS):
    own = dispatch.token_N[dispatch.bounds_P[expert] : dispatch.bounds_P[expert + 1]]
    print(f"{name:>8}: " + ", ".join(example.WORDS[token] for token in own))

# %% [markdown]
# **Predict.** “sat” lost its second expert. Its first gate was computed before the drop: does the first expert's part of the output grow
# to make up for it, shrink, or stay as it was?

# %%
out_ND, _ = experts_forward(rows_ND, dispatch.bounds_P, params, config.experts)
y_TD, _ = combine_forward(out_ND, gate_TK, dispatch)
row = int(np.flatnonzero(dispatch.token_N == 2)[0])
print("gate of its first expert:", gate_TK[2, 0].round(3))
print("that expert says", out_ND[row].round(3))
print("sat gets        ", y_TD[2].round(3))

# %% [markdown]
# The first expert's part stays as it was, and the second one's is missing: the gates that count no longer sum to 1. (Some implementations
# divide after the drop instead, and the survivor gets the whole weight: {{docs/architectures/deepspeed_moe.md}}.) A word whose choices were
# all dropped would get 0 from this layer, and would not be lost: a Transformer *adds* the layer's output to its input, x + y, which is
# called a residual connection.
#
# ## 7 · The whole layer is one call
#
# **Predict.** You followed the layer step by step. How large is the difference from {{reference.layer.moe_forward}}?

# %%
print("largest difference:", float(np.abs(output.y - y_TD).max()))

# %% [markdown]
# Change something and predict again: a word's vector, K, the capacity factor, the order in which assignments are served
# (`CapacityConfig(order="token_major")`). The settings: {{reference.config.CapacityConfig}}.
#
# **Next:** [02 · the orders of softmax and top-k](02_gating_orders.ipynb)
