# %% [markdown]
# # 05 · Capacity, drops and padding
#
# Hardware likes arrays of fixed shape, so each expert gets a buffer of C places. Whatever C is, it is wrong for most experts: some
# overflow, some stay empty. Two ideas are new: **the capacity factor trades drops against empty places**, and **a place in the queue
# decides who is dropped**, so it matters who stands in it: padding must not.
#
# Before each result, write down what you expect, and only then run the cell.
#
# Read along: {{docs/chapters/capacity.md}} · before this: [04](04_collapse_and_rescue.ipynb)

# %%
import numpy as np

from notebooks import plots
from notebooks.checks import check
from notebooks.prints import sentence
from reference.balancing import drop_rate_by_position
from reference.capacity import group_capacity, keep_within_capacity, queue_order
from reference.config import CapacityConfig, GatingConfig
from reference.gating import gates_forward, top_k
from reference.proof import bugs
from reference.scores import softmax_forward
from reference.tokens import Draws, token_info

TOKENS, EXPERTS, K = 256, 8, 2
rng = np.random.default_rng(0)
popularity_E = -np.log(np.arange(1, EXPERTS + 1))
logits = {
    "even": rng.standard_normal((TOKENS, EXPERTS)),
    "skewed": popularity_E + 0.7 * rng.standard_normal((TOKENS, EXPERTS)),
}
chosen = {name: top_k(logits_TE, K) for name, logits_TE in logits.items()}
for name, expert_TK in chosen.items():
    print(f"{name:>6} load:", np.bincount(expert_TK.ravel(), minlength=EXPERTS).tolist())

# %% [markdown]
# Two routers and one sequence of 256 tokens. The first one loves all experts alike; the second one is as uneven as words are: expert 0 is
# wanted by most.
#
# ## 1 · How many places?
#
# The even share is K · T / E = 64; the **capacity factor** multiplies it ({{reference.capacity.per_assignment}}).
#
# **Predict.** With factor 1 there are exactly as many places as assignments. For each router: is anything dropped? Are places left empty?

# %%
everyone = token_info(TOKENS)


def kept(expert_TK, gate_TK, config: CapacityConfig, tokens=everyone) -> tuple:
    """(which assignments find a place [T, K], the capacity), as the reference decides it."""
    capacity = group_capacity(config, K, EXPERTS, tokens, training=True)
    order_N = queue_order(gate_TK, config.order, Draws(None), training=True)
    wanted_TK = np.repeat(tokens.real_T[:, None], K, axis=1)
    keep_TK = keep_within_capacity(expert_TK, wanted_TK, capacity, order_N, tokens)
    return keep_TK, int(capacity[0])


gate = {}
for name, expert_TK in chosen.items():
    scores_TE, _ = softmax_forward(logits[name])
    gate[name], _ = gates_forward(scores_TE, expert_TK, GatingConfig(top_k=K, normalize="sum"))
    config = CapacityConfig("per_assignment", factor=1.0)
    keep_TK, capacity = kept(expert_TK, gate[name], config)
    dropped, empty = (~keep_TK).sum(), EXPERTS * capacity - keep_TK.sum()
    places = EXPERTS * capacity
    print(f"{name:>6} {dropped:3} dropped, {empty:3} of {places} places free")
load_E = np.bincount(chosen["skewed"].ravel(), minlength=EXPERTS)
plots.load(load_E, capacity, [str(expert) for expert in range(EXPERTS)])

# %% [markdown]
# At factor 1 as many places stay free as assignments are dropped, each where the other is not.
#
# **Predict.** Sketch two shares for the skewed router as the factor grows from 0 to 4, that of the assignments that are dropped and that of
# the places that stay empty: which curve falls to 0, and where? (Its loads stand above. How many places does expert 0 need?) What share of
# the places is empty at that point? The cell tries factors in steps of 1/8.

# %%
factors, shares = np.linspace(0.125, 4, 32), {}
for name, expert_TK in chosen.items():
    configs = [CapacityConfig("per_assignment", factor=float(factor)) for factor in factors]
    results = [kept(expert_TK, gate[name], config) for config in configs]
    dropped = np.array([(~keep_TK).mean() for keep_TK, _ in results])
    empty = np.array([1 - keep_TK.sum() / (EXPERTS * places) for keep_TK, places in results])
    shares |= {f"dropped, {name}": dropped, f"empty, {name}": empty}
    needed = np.bincount(expert_TK.ravel()).max() / (K * TOKENS / EXPERTS)
    enough = int(np.argmin(dropped))
    print(f"{name:>6}: the busiest expert needs {needed:.2f};")
    print(f"        nothing is dropped from {factors[enough]:.3f} on,")
    print(f"        where {empty[enough]:.0%} of the places are empty")
title = "assignments dropped, and places empty"
plots.curves(factors, shares, "capacity factor", "share", title)

# %% [markdown]
# An empty place is computed like any other. Even a fair router needs a factor above 1, for chance is not even; a skewed one pays for its
# favourite expert with empty places at all others. Layers that sort rows ([08](08_dispatch.ipynb)) need no buffers and pay nothing.
#
# ## 2 · Who is dropped?
#
# Three orders of service ({{reference.capacity.choice_major}}, {{reference.capacity.token_major}},
# {{reference.capacity.by_probability}}): all first choices before all second ones, token after token, or the largest gate first.
#
# **Predict.** The skewed router, factor 1. Cut the sequence into eight parts. In which part do most drops lie, under each order? And
# under which order is the most weight (the sum of the gates) lost? The table counts what is dropped, and how much of it first choices.

# %%
orders = ("choice_major", "token_major", "probability")
by_part = {}
print("             dropped  firsts  weight lost")
for order in orders:
    config = CapacityConfig("per_assignment", factor=1.0, order=order)
    keep_TK, _ = kept(chosen["skewed"], gate["skewed"], config)
    asked_TK = np.ones_like(keep_TK)
    by_part[order] = drop_rate_by_position(asked_TK, keep_TK, np.arange(TOKENS), 8)
    lost = gate["skewed"][~keep_TK].sum() / TOKENS
    print(f"{order:>12} {(~keep_TK).sum():7} {(~keep_TK[:, 0]).sum():7} {lost:12.0%}")
parts = [f"part {part}" for part in range(1, 9)]
plots.bars(parts, by_part, "share of assignments dropped, by part of the sequence", "dropped")

# %% [markdown]
# All three drop the same number: how many is a matter of C, who is a matter of the queue. Token after token, the first quarter loses
# nothing and the end pays. With all first choices first, the end pays too, and the beginning loses some *second* choices: they stand
# behind the first choices of words that come later. The third order treats all positions much alike and drops the least weight, but
# whether a word is served depends on words that come *after* it, which a model that writes from left to right may not know.
#
# ## 3 · The queue without loops (exercise)
#
# In notebook 01 you served the queue with two loops. Machines do it with one cumulative sum: write the queue as a one-hot matrix with a
# row for each assignment and a column for each expert; the running count down a column says how many came before.
#
# Return for each assignment how many assignments to the same expert stand before it: 0 for the first. All first choices stand before
# all second ones. **Padding** (where `real_T` is False) does not stand in the queue; give it position 0.
#
# **Predict.** If padding did stand in the queue, which words would suffer: those before it or those behind it?
#
# <details><summary>Hint 1</summary><code>expert_TK.T.ravel()</code> lists all first choices, then all second ones. Undo it at the end
# with <code>.reshape(K, T).T</code>.</details>
# <details><summary>Hint 2</summary><code>np.eye(experts, dtype=int)[queue_N]</code> is the one-hot matrix. Which of its rows must be 0?
# </details>
# <details><summary>Hint 3</summary>A cumulative sum counts the assignment itself, too.</details>


# %% EXERCISE
def positions(expert_TK: np.ndarray, real_T: np.ndarray) -> np.ndarray:
    """How many assignments to the same expert stand before each one, [T, K] int."""
    raise NotImplementedError


# %% SOLUTION
def positions(expert_TK: np.ndarray, real_T: np.ndarray) -> np.ndarray:
    """How many assignments to the same expert stand before each one, [T, K] int."""
    tokens, slots = expert_TK.shape
    queue_N, real_N = expert_TK.T.ravel(), np.tile(real_T, slots)
    own_NE = np.eye(expert_TK.max(initial=0) + 1, dtype=int)[queue_N] * real_N[:, None]
    before_NE = np.cumsum(own_NE, axis=0) - own_NE
    return (before_NE * own_NE).sum(1).reshape(slots, tokens).T


# %%
check("positions", positions)

# %% [markdown]
# The reference sorts instead of summing, which needs no [N, E] matrix ({{reference.capacity.position_in_expert}}).
#
# ## 4 · Padding
#
# A batch holds sequences of different lengths; the short ones are filled up. All padding has the same vector, so all of it wants the same
# experts.
#
# **Predict.** Put 64 tokens of padding in front of the 256 words, all of which want experts 0 and 1. The capacity counts words only. How
# many more assignments of words are dropped if the padding is queued like words, and how many if it is masked?

# %%
skewed_TK = chosen["skewed"]
longer_TK = np.concatenate([np.tile([0, 1], (64, 1)), skewed_TK])
longer_gate_TK = np.concatenate([np.full((64, K), 0.5), gate["skewed"]])
pad_mask = np.arange(len(longer_TK)) < 64
config = CapacityConfig("per_assignment", factor=1.0)
alone_TK, capacity = kept(skewed_TK, gate["skewed"], config)
words = token_info(len(longer_TK), pad_mask=pad_mask)
masked_TK, _ = kept(longer_TK, longer_gate_TK, config, words)
order_N = queue_order(longer_gate_TK, config.order, Draws(None), training=True)
all_real, all_TK = token_info(len(longer_TK)), np.ones_like(masked_TK)
queued_TK = keep_within_capacity(longer_TK, all_TK, np.array([capacity]), order_N, all_real)
fates = {
    "no padding": alone_TK,
    "padding masked": masked_TK[64:],
    "padding queued": queued_TK[64:],
}
for name, keep_TK in fates.items():
    print(f"{name:>14}: {(~keep_TK).sum()} dropped")
unchanged = bool(np.array_equal(alone_TK, masked_TK[64:]))
print("masked, no word's fate changes:", unchanged)

# %% [markdown]
# Queued padding takes all places of expert 0, and of expert 1 what the first choices have left. This has shipped. The museum has it, and
# beside it the other way to get a queue wrong, a count that starts anew for the second choices. (“near:” stands before a paper whose text
# invites the mistake, where no report of it was found.)
#
# **Predict.** Its first check has one expert with two places, and three words that all want it; then the same three words behind two
# tokens of padding. Which words does the wrong code keep? And how many assignments can an expert of capacity 5 end up with under the second
# mistake?

# %%
for name in ("padding eats capacity", "second choices from zero"):
    bug = bugs.get(name)
    print("mistake:", name)
    sentence(f"seen in: {bug.seen}")
    sentence(f"caught: {bug.symptom()}")

# %% [markdown]
# ## 5 · Groups
#
# Capacity holds inside a **group**, here one sequence. Two sequences in one batch are two queues.
#
# **Predict.** Both halves of our 256 tokens become sequences of their own, with a capacity of half the size each. Is the number of drops
# exactly the same as before? May a word's fate now depend on the other sequence?

# %%
group_ids = np.arange(TOKENS) // 128
groups = token_info(TOKENS, group_ids=group_ids)
apart_TK, capacity = kept(skewed_TK, gate["skewed"], config, groups)
first_TK, _ = kept(skewed_TK[:128], gate["skewed"][:128], config, token_info(128))
print(f"one group: {(~alone_TK).sum()} dropped")
print(f"two groups of capacity {capacity}: {(~apart_TK).sum()} dropped")
alike = bool(np.array_equal(apart_TK[:128], first_TK))
print("the first one as if it were alone:", alike)

# %% [markdown]
# Smaller groups drop a little more, for in a small group chance is less even. They are also what makes the layer's result independent of
# the rest of the batch, apart from rounding.
#
# Try: `CapacityConfig("per_token", …)` in section 1, the Switch Transformer's formula, which leaves out K. What does its factor 1 mean with
# K = 2?
#
# **Next:** [06 · balance by bias: a controller](06_bias_controller.ipynb)
