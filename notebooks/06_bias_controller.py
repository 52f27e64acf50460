# %% [markdown]
# # 06 · Balance by bias: a controller
#
# The balance loss of [04](04_collapse_and_rescue.ipynb) pulls at the same weights as the task does. DeepSeek-V3 evens the load without
# touching any gradient: a number for each expert is added to the scores *for the choice only*, and a thermostat moves it. Two ideas are
# new: **a controller that sees counts only**, and **its step size**, which is the whole art.
#
# Before each result, write down what you expect, and only then run the cell.
#
# Read along: {{docs/chapters/bias.md}} · before this: [05](05_capacity.ipynb)

# %%
from dataclasses import replace

import numpy as np

from notebooks import plots
from notebooks.checks import check
from notebooks.prints import sentence
from notebooks.toy import CONFIG, task
from reference import moe_backward, moe_forward
from reference.balancing import BIAS_RULES, max_violation, sign_bias_update
from reference.config import BalanceConfig, GatingConfig, MoEConfig, ScoresConfig
from reference.gating import gates_forward, top_k
from reference.proof import bugs
from reference.scores import sigmoid_forward

TOKENS, EXPERTS, K = 512, 8, 2
taste_E = np.linspace(1, -1, EXPERTS)


def scores_of(step: int, taste_E: np.ndarray = taste_E) -> np.ndarray:
    """Sigmoid scores [T, E] of a fresh batch, in which expert 0 is liked best on average."""
    rng = np.random.default_rng(step)
    return sigmoid_forward(taste_E + rng.standard_normal((TOKENS, EXPERTS)))[0]


def load_of(expert_TK: np.ndarray) -> np.ndarray:
    """Assignments for each expert."""
    return np.bincount(expert_TK.ravel(), minlength=EXPERTS)


scores_TE = scores_of(0)
load_E = load_of(top_k(scores_TE, K))
print("load", load_E.tolist())
print(f"mean {TOKENS * K // EXPERTS}, MaxVio {max_violation(load_E):.2f}")

# %% [markdown]
# MaxVio says by how much the busiest expert exceeds the mean ({{reference.balancing.max_violation}}): 0 is perfect.
#
# ## 1 · One step of the thermostat
#
# Who got too little rises by γ, who got too much falls by γ ({{reference.balancing.sign_bias_update}}).
#
# **Predict.** γ = 0.05. Write down the new bias of all eight experts. How large is the change for an expert with five times the mean,
# compared with one just above it?

# %%
bias_E = sign_bias_update(np.zeros(EXPERTS), load_E, 0.05)
for value in np.unique(bias_E):
    print(f"bias {value:+.2f}: experts", np.flatnonzero(bias_E == value).tolist())
print("load", load_of(top_k(scores_TE + bias_E, K)).tolist())

# %% [markdown]
# All steps are equally long, whether an expert has more than twice the mean or just a little more.
#
# **Predict.** Some tokens have changed sides. Take one that chose the same two experts before and after. Have its gates changed?

# %%
before_TK, after_TK = top_k(scores_TE, K), top_k(scores_TE + bias_E, K)
gating = GatingConfig(top_k=K, correction_bias=True, normalize="sum")
same_T = (before_TK == after_TK).all(1)
gate_before_TK, _ = gates_forward(scores_TE, before_TK, gating)
gate_after_TK, _ = gates_forward(scores_TE, after_TK, gating)
unmoved = np.array_equal(gate_before_TK[same_T], gate_after_TK[same_T])
print(f"{(~same_T).sum()} of {TOKENS} tokens choose differently,")
print("or in another order")
print("all other gates exactly as they were:", unmoved)

# %% [markdown]
# The gates are made of the scores, and the scores have not moved. The bias decides who is asked, not how much the answer counts.
#
# ## 2 · The step of many ranks (exercise)
#
# In training, each of R processes, called *ranks*, sees its own part of the batch and counts its own load. Write one step of the bias from
# all of them: `load_RE` holds a row of loads for each rank. The rule is about the **whole** batch, and whoever has just the mean load
# stays.
#
# **Predict.** One rank says expert 0 has too much, another that it has too little. Who wins?
#
# <details><summary>Hint</summary><code>np.sign</code> of what? Think about which of the two is done first, adding the loads or taking
# the sign.</details>


# %% EXERCISE
def bias_step(bias_E: np.ndarray, load_RE: np.ndarray, rate: float) -> np.ndarray:
    """The bias [E] after one step: up by rate below the mean load, down above it."""
    raise NotImplementedError


# %% SOLUTION
def bias_step(bias_E: np.ndarray, load_RE: np.ndarray, rate: float) -> np.ndarray:
    """The bias [E] after one step: up by rate below the mean load, down above it."""
    load_E = load_RE.sum(0)
    return bias_E + rate * np.sign(load_E.mean() - load_E)


# %%
check("bias_step", bias_step)

# %% [markdown]
# Neither rank wins by itself: the loads are added, and the sum of them is above the mean or below it.
#
# ## 3 · How large a step?
#
# A fresh batch at each step, 200 steps, three values of γ. The scores lie between 0 and 1.
#
# **Predict.** Which of 0.001, 0.01 and 0.1 comes to rest near 0 first, which needs nearly all of the 200 steps, and which never settles?


# %%
def control(rate: float, rule: str = "sign", steps: int = 200, taste_of=lambda step: taste_E):
    """(MaxVio before each step [steps], bias before each step [steps, E])."""
    bias_E, violations, biases = np.zeros(EXPERTS), [], []
    for step in range(steps):
        load_E = load_of(top_k(scores_of(step, taste_of(step)) + bias_E, K))
        violations.append(max_violation(load_E))
        biases.append(bias_E)
        bias_E = BIAS_RULES[rule](bias_E, load_E, rate)
    return np.array(violations), np.array(biases)


by_rate = {f"γ = {rate}": control(rate)[0] for rate in (0.001, 0.01, 0.1)}
print("MaxVio     at first step 50 last 20 steps")
for name, violations in by_rate.items():
    at_last = violations[-20:].mean()
    print(f"{name:>9} {violations[0]:9.2f} {violations[50]:7.2f} {at_last:13.2f}")
plots.curves(np.arange(200), by_rate, "step", "MaxVio", "MaxVio under three step sizes")

# %% [markdown]
# Small is slow; large overshoots in every step and swings for ever. In between, what remains is the noise of a finite batch: even a
# perfect bias would not make the loads of 512 random tokens equal.
#
# **Predict.** A bias moves by γ at each step. The scores of the best and the worst expert differ by about 0.4 on average. How many
# steps does γ = 0.01 need to make up for that, if one bias rises and the other one falls?

# %%
violations, biases = control(0.01)
settled, resting_E = int(np.argmax(violations < 0.2)), biases[100:].mean(0)
print(f"MaxVio is below 0.2 first at step {settled}")
print(f"the biases rest from {resting_E.min():.2f} to {resting_E.max():.2f}")
by_expert = {f"expert {expert}": bias for expert, bias in enumerate(biases.T)}
plots.curves(np.arange(200), by_expert, "step", "bias", "the biases, γ = 0.01")

# %% [markdown]
# ## 4 · The world turns round
#
# **Predict.** At step 100 the tokens change their taste: now all like expert 7 best. What does MaxVio do at that step: rise to where it
# was at the start, or higher? Why?


# %%
def turning(step: int) -> np.ndarray:
    """The taste, reversed from step 100 on."""
    return taste_E if step < 100 else taste_E[::-1]


rates = {"sign": 0.01, "proportional": 0.2}
turned = {rule: control(rate, rule, taste_of=turning)[0] for rule, rate in rates.items()}
print("MaxVio       at first  before  step 100")
for rule, violations in turned.items():
    before, at = violations[90:100].mean(), violations[100]
    print(f"{rule:>12} {violations[0]:8.2f} {before:7.2f} {at:9.2f}")
plots.curves(np.arange(200), turned, "step", "MaxVio", "MaxVio, and a turn at step 100")

# %% [markdown]
# Higher: the bias that was a remedy is now added to the new favourite. A controller answers to the past. A rule with steps in
# **proportion** to the violation ({{reference.balancing.proportional_bias_update}}) runs when far away and walks when near; it has a
# scale that must be tuned. Wang et al. 2024, who proposed the bias, compared both and kept the sign.
#
# ## 5 · In training
#
# The task of notebook 04, with the bias instead of the loss: one update after each step of gradient descent
# ({{reference.config.BalanceConfig}}), γ = 0.003, once with softmax and once with sigmoid scores.
#
# **Predict.** Three starts, and so three numbers side by side. Does the bias bring every expert into use? With which scores will one γ do
# better: with softmax scores, which can come as close to 0 as they like, or with sigmoid scores of an undecided router, which lie around ½?


# %%
def train(seed: int, config: MoEConfig, steps: int = 300) -> tuple[np.ndarray, float]:
    """(load at each step [steps, E], the error at the end)."""
    x_TD, target_TD, params = task(seed)
    if config.gating.correction_bias:
        params = params | {"router.correction_bias": np.zeros(EXPERTS)}
    loads = []
    for _ in range(steps):
        output, cache = moe_forward(x_TD, params, config, training=True)
        loads.append(output.routing.load)
        _, gradients = moe_backward((output.y - target_TD) / len(x_TD), cache)
        for name, gradient in gradients.items():
            params = params | {name: params[name] - 0.04 * gradient}
        if config.gating.correction_bias:
            bias_E, rate = params["router.correction_bias"], config.balance.bias_rate
            params["router.correction_bias"] = sign_bias_update(bias_E, loads[-1], rate)
    return np.array(loads), float(np.mean((output.y - target_TD) ** 2))


controlled = BalanceConfig(bias_rule="sign", bias_rate=0.003)
for function in ("softmax", "sigmoid"):
    print(f"{function}  MaxVio       error")
    for name, balance in (("no bias", BalanceConfig()), ("bias", controlled)):
        gating = GatingConfig(top_k=2, normalize="sum", correction_bias=balance is controlled)
        config = replace(CONFIG, scores=ScoresConfig(function), gating=gating, balance=balance)
        runs = [train(seed, config) for seed in range(3)]
        violations = [np.mean([*map(max_violation, loads[-20:])]) for loads, _ in runs]
        texts = [f"{violation:.1f}" for violation in violations]
        print(f"{name:>7} ", *texts, "", *(f"{error:.2f}" for _, error in runs))
plots.shares(runs[0][0], "who gets the tokens: sigmoid scores and a bias, first start")

# %% [markdown]
# (MaxVio is the mean over the last 20 steps.) With sigmoid scores the load is even and the error lower than without. With
# softmax scores the same γ fails on a router that has become sure: a score of 0.00001 needs a bias of nearly 1 to be chosen, and what is
# then chosen has a gate of next to nothing, so it hardly learns. DeepSeek-V3 uses sigmoid scores.
#
# ## 6 · A trap
#
# **Predict.** The model runs in bfloat16, which has 8 bits of precision. A bias stands at 1 and is to rise by 0.001, two hundred times.
# Where does it stand then?

# %%
bug = bugs.get("correction bias in bfloat16")
sentence(f"seen in: {bug.seen}")
sentence(f"caught: {bug.symptom()}")

# %% [markdown]
# Between 1 and 2, bfloat16 has only steps of 1/128, and what rises by less than half a step is rounded back. So the bias is kept in fp32,
# whatever the model computes in.
#
# Try: `TOKENS = 64` in the second cell, and section 3 again. Which γ is best now, and why? And `control(0.01, "centered_sign")`, the rule
# of torchtitan (a library for training): which sum of its biases is always 0?
#
# **Next:** [07 · a tiny MoE language model](07_language_model.ipynb)
