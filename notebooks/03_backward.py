# %% [markdown]
# # 03 · Write the backward pass and check it
#
# Choosing the best experts is a step: nudge a logit and nothing happens, until suddenly another expert is chosen. How does a router learn
# through that? Two ideas are new: **the gate carries the gradient**, and **a derivative written by hand is checked by differences**.
#
# Before each result, write down what you expect, and only then run the cell.
#
# Read along: {{docs/chapters/gradients.md}} · before this: [02](02_gating_orders.ipynb)

# %%
import numpy as np

from notebooks import plots
from notebooks.checks import check
from notebooks.prints import numbers
from reference import example, moe_backward, moe_forward
from reference.config import GatingConfig
from reference.dispatch import combine_backward
from reference.gating import gates_backward, gates_forward, top_k
from reference.scores import logits_backward, logits_forward, softmax_backward, softmax_forward

CAT = 1
GATING = GatingConfig(top_k=2, normalize="sum")
x_TD, params, config = example.inputs(), example.params(), example.CONFIG
logits_TE, _ = logits_forward(x_TD, params["router.weight"])
expert_TK = top_k(logits_TE, 2)
numbers({"logits of cat": logits_TE[CAT]}, example.EXPERTS)
print("chosen:", ", ".join(example.EXPERTS[expert] for expert in expert_TK[CAT]))

# %% [markdown]
# ## 1 · What the choice lets through
#
# **Predict.** Raise the logit of “action” from far below to far above the other three. Where is the gate of “thing” flat, and where does it
# fall? Two other gates jump: which, and at what logit?

# %%
value = np.linspace(-3, 5, 401)
moved_TE = np.repeat(logits_TE[[CAT]], len(value), axis=0)
moved_TE[:, 2] = value
moved_TK = top_k(moved_TE, 2)
moved_gate_TK, _ = gates_forward(softmax_forward(moved_TE)[0], moved_TK, GATING)
gate_TE = np.zeros_like(moved_TE)
np.put_along_axis(gate_TE, moved_TK, moved_gate_TK, axis=1)
by_name = {name: gate_TE[:, expert] for expert, name in enumerate(example.EXPERTS)}
plots.curves(value, by_name, "logit of “action”", "gate", "the gates of “cat”")
enters = value[(moved_TK == 2).any(1)][0]
rival = np.sort(np.delete(logits_TE[CAT], 2))[-2]
print(f"chosen from {enters:.2f} on (steps of 0.02)")
print(f"the logit that it must beat is {rival:.2f}")

# %% [markdown]
# As long as “action” is not chosen, its logit moves nothing: **an expert that was not tried teaches nothing**. Where it overtakes
# “place”, one gate drops to 0 and the other jumps up from 0, and a jump has no derivative. Once chosen, its gate is a smooth function
# of its logit, and this is all that a router learns from.
#
# ## 2 · A derivative by differences
#
# Any derivative can be measured: move one number a little forwards and a little backwards, and divide the change by the distance. Here it
# is for the function logits → gates. How much the loss changes with each gate is given: the gates' **cotangent**, `dgate_TK`. Each gate's
# change times its cotangent, added up, is the change of the loss.

# %%
STEP = 1e-5


def gates_of(logits_TE: np.ndarray) -> np.ndarray:
    """The gates for the choices made above, whatever the logits are now."""
    return gates_forward(softmax_forward(logits_TE)[0], expert_TK, GATING)[0]


def by_differences(function, point: np.ndarray, cotangent: np.ndarray) -> np.ndarray:
    """Central differences of Σ cotangent · function(point) in each number of the point."""
    gradient = np.zeros_like(point)
    for index in np.ndindex(point.shape):
        moved = np.zeros_like(point)
        moved[index] = STEP
        change = function(point + moved) - function(point - moved)
        gradient[index] = (cotangent * change).sum() / (2 * STEP)
    return gradient


# %% [markdown]
# **Predict.** Say the loss falls when the first gate of “cat” rises (its cotangent is −1). Which two of the four logits get a gradient,
# with which signs, and how do their sizes compare?

# %%
dgate_TK = np.zeros((len(x_TD), 2))
dgate_TK[CAT] = [-1, 0]
measured_TE = by_differences(gates_of, logits_TE, dgate_TK)
gate_TK = gates_of(logits_TE)
numbers({"gradient": measured_TE[CAT]}, example.EXPERTS, 3)
print("product of the two gates:", (gate_TK[CAT, 0] * gate_TK[CAT, 1]).round(3))

# %% [markdown]
# Equal and opposite, and as large as the product of the gates: gradient descent raises “thing” and lowers “action”, most when the router
# is undecided.
#
# ## 3 · Write it by hand (exercise)
#
# Forwards: $s = \mathrm{softmax}(z)$, then $g_k = s_{e_k} / \sum_j s_{e_j}$ over the chosen experts $e_1 \dots e_K$. Backwards, in the
# opposite order:
#
# 1. from the gates to the chosen scores: every chosen score is in the sum that divides, so each gate depends on all of them;
# 2. from the chosen scores to all scores: what was not chosen gets 0;
# 3. from the scores to the logits: every logit moves every score.
#
# For the way forwards you may call `softmax_forward`, as `gates_of` does; its first result is the scores.
#
# The choice `expert_TK` is given and does not move. Below, $dg$ is short for the cotangent of $g$, and so for $s$ and $z$.
#
# **Predict.** Before you write: what must each row of the result sum to? (What happens to the gates when all logits rise together?)
#
# <details><summary>Hint 1</summary>
#
# Step 1, with $S$ the sum of the chosen scores: $ds_{e_k} = (dg_k - \sum_j dg_j\, g_j) / S$.
#
# </details>
# <details><summary>Hint 2</summary>Step 2: <code>np.put_along_axis(array, index, values, axis=1)</code> writes into the chosen
# columns.</details>
# <details><summary>Hint 3</summary>
#
# Step 3: $dz_e = s_e\, (ds_e - \sum_j ds_j\, s_j)$, the sum over all experts.
#
# </details>


# %% EXERCISE
def router_backward(dgate_TK, logits_TE, expert_TK) -> np.ndarray:
    """dlogits [T, E] of softmax → chosen scores → divided by their sum."""
    raise NotImplementedError


# %% SOLUTION
def router_backward(dgate_TK, logits_TE, expert_TK) -> np.ndarray:
    """dlogits [T, E] of softmax → chosen scores → divided by their sum."""
    scores_TE, _ = softmax_forward(logits_TE)
    chosen_TK = np.take_along_axis(scores_TE, expert_TK, axis=1)
    total = chosen_TK.sum(1, keepdims=True)
    gate_TK = chosen_TK / total
    dchosen_TK = (dgate_TK - (dgate_TK * gate_TK).sum(1, keepdims=True)) / total
    dscores_TE = np.zeros_like(scores_TE)
    np.put_along_axis(dscores_TE, expert_TK, dchosen_TK, axis=1)
    return scores_TE * (dscores_TE - (dscores_TE * scores_TE).sum(1, keepdims=True))


# %%
check("router_backward", router_backward)

# %% [markdown]
# The reference has the three steps in two functions ({{reference.gating.gates_backward}}, {{reference.scores.softmax_backward}}), and
# this notebook goes on with them.
#
# **Predict.** How close will the hand-written derivative come to the differences: to 3 digits, to 8, to 16?

# %%
rng = np.random.default_rng(0)
dgate_TK = rng.standard_normal(expert_TK.shape)
scores_TE, softmax = softmax_forward(logits_TE)
_, gates = gates_forward(scores_TE, expert_TK, GATING)
dlogits_TE = softmax_backward(gates_backward(dgate_TK, gates), softmax)
distance = np.abs(dlogits_TE - by_differences(gates_of, logits_TE, dgate_TK)).max()
for bound in (1e-3, 1e-8, 1e-16):
    print(f"within {bound:.0e} of the differences: {bool(distance < bound)}")
print("every row sums to 0:", bool(np.allclose(dlogits_TE.sum(1), 0, atol=1e-14)))

# %% [markdown]
# The differences are what is inexact: their own error is of the size of the step squared, $10^{-10}$, plus that of rounding divided by the
# step, $10^{-16} / 10^{-5}$.
#
# ## 4 · One expert per token
#
# **Predict.** With K = 1 and a division by the sum (`sum` below), what is the gate of “cat”? What then is the gradient of every logit? And
# if nobody divides (`none`)?

# %%
best_TK, ones_TK = top_k(logits_TE, 1), np.ones((len(x_TD), 1))
for normalize in ("sum", "none"):
    gating = GatingConfig(top_k=1, normalize=normalize)
    gate_TK, gates = gates_forward(scores_TE, best_TK, gating)
    dlogits_TE = softmax_backward(gates_backward(ones_TK, gates), softmax)
    largest = np.abs(dlogits_TE).max()
    print(f"{normalize:>4}: gate {gate_TK[CAT, 0]:.3f}, largest gradient {largest:.3f}")

# %% [markdown]
# A single gate divided by itself is 1 whatever the logits are: the task teaches such a router nothing. This is why the Switch
# Transformer, which chooses one expert, leaves its score as it is (A of notebook 02).
#
# ## 5 · The whole layer
#
# Training begins with $dy$, the cotangent of the layer's output: the direction in which the loss grows. A gate's cotangent is how far its
# expert's output points that way, $dg = \langle dy, \mathrm{out} \rangle$ ({{reference.dispatch.combine_backward}}). From there it is your
# function, and then the router's matrix ({{reference.scores.logits_backward}}).
#
# **Predict.** The running example drops one assignment, the second choice of “sat”. What cotangent does its gate get?

# %%
output, cache = moe_forward(x_TD, params, config, training=True)
dy_TD = rng.standard_normal(output.y.shape)
_, dgate_TK = combine_backward(dy_TD, cache.apply.combine)
print("cotangents of sat's gates:", dgate_TK[2].round(3))

# %% [markdown]
# **Predict.** Taken back step by step to the router's matrix, is this the gradient that {{reference.layer.moe_backward}} gives?
# Do differences of the whole layer agree with it?

# %%
_, gates = gates_forward(scores_TE, expert_TK, GATING)
dlogits_TE = softmax_backward(gates_backward(dgate_TK, gates), softmax)
_, dweight, _ = logits_backward(dlogits_TE, logits_forward(x_TD, params["router.weight"])[1])
_, dparams = moe_backward(dy_TD, cache, dloss=0.0)  # 0: without notebook 04's balance loss
same = bool(np.allclose(dweight, dparams["router.weight"], rtol=0, atol=1e-14))
print("same as the layer's own gradient:", same)


def y_of(weight: np.ndarray) -> np.ndarray:
    """The layer's output for another router matrix, with the choices and drops made above."""
    moved = params | {"router.weight": weight}
    return moe_forward(x_TD, moved, config, training=True, replay=output.routing)[0].y


distance = np.abs(dweight - by_differences(y_of, params["router.weight"], dy_TD)).max()
print("within 1e-8 of the differences:", bool(distance < 1e-8))

# %% [markdown]
# `replay` holds the choices fixed while the weights move; without it a difference could step over an edge of the choice and measure a jump.
# {{tests/test_gradients.py}} does what you did for every setting, parameter and loss of the reference.
#
# Try: in section 2, set `dgate_TK[CAT] = [1, 1]`, a cotangent that is the same for both gates. Why is the gradient 0?
#
# **Next:** [04 · watch a router collapse, then rescue it](04_collapse_and_rescue.ipynb)
