# %% [markdown]
# # 04 · Watch a router collapse, then rescue it
#
# A layer with eight experts can end up using two of them, and nothing in its task forbids it. Here you watch that happen, write the loss
# that prevents it, and meet a case in which the loss comes too late. Two ideas are new: **collapse feeds itself**, and **the balance
# loss multiplies a count that has no gradient with a mean that has one**.
#
# Before each result, write down what you expect, and only then run the cell.
#
# Read along: {{docs/chapters/losses.md}} · the task: {{notebooks/toy.py}} · before this: [03](03_backward.ipynb)

# %%
from dataclasses import replace

import numpy as np

from notebooks import plots
from notebooks.checks import check
from notebooks.prints import sentence
from notebooks.toy import CONFIG, task
from reference import moe_backward, moe_forward
from reference.balancing import dead_experts, max_violation
from reference.config import BalanceConfig
from reference.proof import bugs
from reference.scores import softmax_forward

EXPERTS = CONFIG.experts.count
x_TD, target_TD, start = task(seed=2)
K = CONFIG.gating.top_k
print(f"{len(x_TD)} tokens of {x_TD.shape[1]} numbers, {EXPERTS} experts, K = {K}")
print("even load:", K * len(x_TD) // EXPERTS, "tokens for each expert")

# %% [markdown]
# ## 1 · At the start
#
# There are eight kinds of tokens, and each kind wants a different linear map: enough work for eight experts. The router starts with small
# random numbers.
#
# **Predict.** Nobody has learned anything yet. Is the load roughly even? How many experts get no token at all?

# %%
output, cache = moe_forward(x_TD, start, CONFIG, training=True)
load_E = output.routing.load
print("load:", load_E.tolist())
print("experts without a token:", dead_experts(load_E))

# %% [markdown]
# All tokens have a large part in common, and whichever rows of the router fit that part best win nearly everybody. Real hidden vectors
# are like this, too.
#
# **Predict.** A gradient of the task reaches each expert's matrices through the tokens that it was given. Which experts learn something
# in this step?

# %%
_, gradients = moe_backward((output.y - target_TD) / len(x_TD), cache)
for expert, load in enumerate(load_E):
    learns = bool(np.abs(gradients["experts.up_proj"][expert]).max() > 0)
    what = "learns" if learns else "gradient exactly 0"
    print(f"expert {expert}: {load:3} tokens, {what}")

# %% [markdown]
# An expert without tokens learns nothing, so it gets no better, so it is not chosen. That is the whole mechanism: **collapse feeds
# itself**.
#
# ## 2 · Training
#
# Plain gradient descent ({{reference.layer.moe_forward}}, {{reference.layer.moe_backward}}). `weight` is for later: how much the balance
# loss of section 3 counts, and now it is 0.
#
# **Predict.** Will the experts that start without tokens get some later?


# %%
def train(data: tuple, weight: float, steps: int = 300) -> tuple[dict, np.ndarray, np.ndarray]:
    """(parameters, load [steps, E], error at each step).

    The error is the mean square: 1 for a layer that always says 0.
    """
    x_TD, target_TD, params = data
    config = replace(CONFIG, balance=BalanceConfig((("expert_balance", weight),)))
    loads, errors = [], []
    for _ in range(steps):
        output, cache = moe_forward(x_TD, params, config, training=True)
        loads.append(output.routing.load)
        errors.append(np.mean((output.y - target_TD) ** 2))
        _, gradients = moe_backward((output.y - target_TD) / len(x_TD), cache)
        params = {name: value - 0.04 * gradients[name] for name, value in params.items()}
    return params, np.array(loads), np.array(errors)


collapsed, loads, errors = train((x_TD, target_TD, start), weight=0.0)
print("load:", loads[-1].tolist())
print("experts without a token:", dead_experts(loads[-1]))
plots.shares(loads, "who gets the tokens, without a balance loss")

# %% [markdown]
# Strong blue is a large share of the load. One expert that had no tokens has come by some, as the router's rows moved; a few experts share
# nearly everything all the same, and the empty rows are parameters that are stored and never used.
#
# ## 3 · The balance loss (exercise)
#
# Write a number that is large where the busy experts also have the large scores, and that gradient descent can lower. For each expert take
#
# - **f**: its share of all T · K assignments. It is a count: no gradient.
# - **P**: the mean of its scores over all T tokens, chosen or not. It has a gradient.
#
# The loss is $\mathcal{L} = E \sum_e f_e P_e$. Return it and its gradient with respect to the scores, `[T, E]`.
#
# **Predict.** What does it cost when every expert gets the same number of tokens and the same mean score? And when the same K experts get
# all tokens, with a score of 1/K each?
#
# <details><summary>Hint 1</summary><code>np.bincount(expert_TK.ravel(), minlength=E)</code> counts; f must sum to 1.</details>
# <details><summary>Hint 2</summary>
#
# $f$ does not move, so $\partial \mathcal{L} / \partial P_e = E f_e$; and every score enters its $P_e$ with the factor $1/T$.
#
# </details>


# %% EXERCISE
def balance(scores_TE: np.ndarray, expert_TK: np.ndarray) -> tuple[float, np.ndarray]:
    """(the loss, its gradient with respect to the scores [T, E])."""
    raise NotImplementedError


# %% SOLUTION
def balance(scores_TE: np.ndarray, expert_TK: np.ndarray) -> tuple[float, np.ndarray]:
    """(the loss, its gradient with respect to the scores [T, E])."""
    tokens, experts = scores_TE.shape
    share_E = np.bincount(expert_TK.ravel(), minlength=experts) / expert_TK.size
    loss = experts * (share_E * scores_TE.mean(0)).sum()
    return loss, np.broadcast_to(experts * share_E / tokens, scores_TE.shape)


# %%
check("balance", balance)

# %% [markdown]
# The reference has it as {{reference.balancing.expert_balance_forward}}, and `train` uses that one. Evenly used experts cost
# $E \cdot E \cdot \frac1E \cdot \frac1E = 1$; K experts that have everything cost $E \cdot K \cdot \frac1K \cdot \frac1K = E/K$. Descent
# lowers each expert's scores in proportion to how busy it is; and as the scores of a token sum to 1, those of idle experts rise.
#
# ## 4 · The rescue
#
# One number for the load: **MaxVio**, by how much the busiest expert exceeds the mean load, as a share of that mean
# ({{reference.balancing.max_violation}}). 0 is even; 3 is four times the mean.
#
# **Predict.** Take the collapsed layer and train it for 300 more steps with weight 1. Do the unused experts come back? At once, or one
# after the other? What happens to the error of the task: worse, because the loss disturbs it, or better?

# %%
rescued, more_loads, more_errors = train((x_TD, target_TD, collapsed), weight=1.0)
print("load:", more_loads[-1].tolist())
print(f"MaxVio {max_violation(loads[-1]):.2f} → {max_violation(more_loads[-1]):.2f}")
all_loads = np.concatenate([loads, more_loads])
plots.shares(all_loads, "the balance loss is switched on at the line", mark=len(loads))

# %%
both = {"error": np.concatenate([errors, more_errors])}
steps, title = np.arange(600), "the error of the task"
plots.curves(steps, both, "step", "mean square", title, scale="log", mark=300)
worst, after = more_errors.max(), more_errors[-1]
print(f"error when the loss is switched on {errors[-1]:.3f}")
print(f"at the worst {worst:.3f}, at the end {after:.3f}")

# %% [markdown]
# The jump is the price: tokens are taken from experts that knew them and given to experts that know nothing. Then these learn, too. One
# after the other they come in, and each arrival is a bump. When it is over the error is about where it was: the rescue came late, and
# the new experts have had little time. What would they have done from the start?
#
# ## 5 · How much weight, and from when on?
#
# **Predict.** Now from the first step on, with three different starts: three numbers stand side by side, one for each start. From which
# weight on is every expert used? Which weight gives the smallest error: the largest?

# %%
print("weight  MaxVio       unused error")
for weight in (0.0, 0.1, 1.0, 10.0):
    runs = [train(task(seed), weight) for seed in range(3)]
    violations = [f"{max_violation(loads[-1]):.1f}" for _, loads, _ in runs]
    unused = [str(dead_experts(loads[-1])) for _, loads, _ in runs]
    ends = [f"{errors[-1]:.2f}" for _, _, errors in runs]
    print(f"{weight:6} ", *violations, "", *unused, "", *ends)

# %% [markdown]
# Too little evens little: 0.1 brings some experts in for two of the starts, and changes nothing for the first one. With 1 these two have an
# even load and errors as small as any, and 10 makes them larger again, for then the router listens to the loss instead of the tokens;
# the first start needs 10. A weight is weighed against the gradient of *this* task, so these numbers carry over to no other: the papers use
# 0.02 and less.
#
# ## 6 · Too late
#
# The first of the three starts collapses as far as it can: the same K = 2 experts get everything.
#
# **Predict.** Rescue it as above, with weight 1 for 300 steps: what is the load afterwards? Below it stands the largest score that any
# token gives to an expert outside its best two. What does it say about the gradient that reaches those experts' logits?

# %%
x0_TD, target0_TD, start0 = task(seed=0)
stuck, loads, _ = train((x0_TD, target0_TD, start0), weight=0.0)
_, more_loads, _ = train((x0_TD, target0_TD, stuck), weight=1.0)
print("collapsed:", loads[-1].tolist())
print("rescued:  ", more_loads[-1].tolist())
output, _ = moe_forward(x0_TD, stuck, CONFIG, training=True)
others = np.sort(output.routing.scores, axis=1)[:, :-2]
print(f"largest score outside the best two: {others.max():.0e}")

# %% [markdown]
# The balance loss is as high as it can be, E/K = 4, and its gradient is gone: through a softmax it passes as $s (1 - s)$, and the score
# $s$ is next to 0 for the experts that should rise.
#
# **Predict.** Divide the router's matrix by 20, which changes no choice at all, and rescue again. Does it work now?

# %%
loosened = stuck | {"router.weight": stuck["router.weight"] / 20}
_, more_loads, more_errors = train((x0_TD, target0_TD, loosened), weight=1.0)
load_E = more_loads[-1]
print("load:", load_E.tolist())
print("experts without a token:", dead_experts(load_E))
others = np.sort(softmax_forward(output.routing.logits / 20)[0], axis=1)[:, :-2]
print(f"largest score outside the best two: {others.max():.2f}")

# %% [markdown]
# Most of them come back. So the loss must be there from the beginning, and the logits must stay small. The second is what the **z-loss**
# is for, the mean square of $\log \sum_e e^{z_e}$ over the tokens, where $z_e$ are a token's logits
# ({{reference.balancing.router_z_forward}}).
#
# ## 7 · A trap
#
# **Predict.** A layer with capacity drops what does not fit. Somebody counts f *after* the drop. What does the loss say about a collapsed
# router then?

# %%
bug = bugs.get("counted after the drop")
sentence(f"seen in: {bug.seen}")
sentence(f"caught: {bug.symptom()}")

# %% [markdown]
# After the drop no expert counts more than its capacity, so the counts of a collapsed router are nearly even, and the loss says “as good
# as 1” where E/K would be true.
#
# Try: train for 100 steps with weight 1, then with weight 0 from the parameters that `train` returned. Does the load stay even?
#
# **Next:** [05 · capacity, drops and padding](05_capacity.ipynb)
