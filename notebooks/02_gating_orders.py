# %% [markdown]
# # 02 · Gating: the orders of softmax and top-k
#
# Every router turns logits into *which* experts and *how much* of each. Papers differ in the order of the steps. Some of these orders are
# the same function, some are not, and code that mixes them up runs without complaint. Two ideas are new: **when the order matters**, and
# **choosing by one number while weighing by another**.
#
# Before each result, write down what you expect, and only then run the cell.
#
# Read along: {{docs/chapters/gating.md}} · the example: {{reference/example.py}} · before this: [01](01_route_eight_tokens.ipynb)

# %%
import numpy as np

from notebooks import plots
from notebooks.checks import check
from notebooks.prints import numbers, sentence
from reference import example, presets
from reference.config import GatingConfig
from reference.gating import gates_forward, top_k
from reference.proof import bugs
from reference.scores import logits_forward, sigmoid_forward, softmax_forward

SAT = 2
logits_TE, _ = logits_forward(example.inputs(), example.params()["router.weight"])
expert_TK = top_k(logits_TE, 2)
numbers({"logits of sat": logits_TE[SAT]}, example.EXPERTS)

# %% [markdown]
# ## 1 · Softmax first, or top-k first?
#
# In brackets stand published models that do so; later notebooks and the chapters have more about each.
#
# - **A** softmax over all experts, take the two best, leave them as they are (DeepSeekMoE, OLMoE)
# - **B** softmax over all experts, take the two best, divide by their sum (GShard, Qwen3)
# - **C** take the two best logits, softmax over these two (Shazeer 2017, Mixtral, gpt-oss)
#
# Softmax is {{reference.scores.softmax_forward}}, the rest is {{reference.gating.gates_forward}} with three settings.
#
# **Predict.** Which of the three give “sat” the same gates? In which do the gates sum to less than 1?


# %%
def gates_of(scores_TE: np.ndarray, expert_TK: np.ndarray, normalize: str) -> np.ndarray:
    """The gates [T, K] of the chosen experts."""
    config = GatingConfig(top_k=expert_TK.shape[1], normalize=normalize)
    return gates_forward(scores_TE, expert_TK, config)[0]


scores_TE, _ = softmax_forward(logits_TE)
gates = {
    "A softmax, top-k": gates_of(scores_TE, expert_TK, "none"),
    "B … and divide": gates_of(scores_TE, expert_TK, "sum"),
    "C top-k, softmax": gates_of(logits_TE, expert_TK, "softmax"),
}
for name, gate_TK in gates.items():
    print(f"{name:>16}: {gate_TK[SAT].round(3)}, sum {gate_TK[SAT].sum():.3f}")

# %% [markdown]
# B and C agree. Softmax is $e^z$ divided by a total; dividing by the sum of the chosen scores cancels that total, and what is left is
# $e^z$ divided by the sum of the chosen experts' $e^z$. That is C.
#
# **Predict.** Is this an accident of “sat”, or does it hold for a thousand random tokens and any K?

# %%
rng = np.random.default_rng(0)
random_TE = rng.standard_normal((1000, 8))
for count in (1, 2, 4, 8):
    chosen_TK = top_k(random_TE, count)
    b_TK = gates_of(softmax_forward(random_TE)[0], chosen_TK, "sum")
    c_TK = gates_of(random_TE, chosen_TK, "softmax")
    equal = bool(np.abs(b_TK - c_TK).max() < 1e-15)
    print(f"K = {count}: B and C equal to within 1e-15: {equal}")

# %% [markdown]
# ## 2 · What the sum of the gates tells
#
# In A the gates sum to the share that the chosen experts have of all.
#
# **Predict.** Which of the eight words has the largest sum: one with two logits far above the other two, or one with three good experts?

# %%
total_T = gates["A softmax, top-k"].sum(1)
print("           sum   logits, largest first")
for token in np.argsort(-total_T, kind="stable"):
    downwards = np.sort(logits_TE[token].round(1))[::-1]
    print(f"{example.WORDS[token]:>7}: {total_T[token]:.3f}   {downwards}")

# %% [markdown]
# The sum is largest where two logits stand far above the rest, and smallest where a third one is close. So under A an undecided router
# gives its experts less weight; B and C throw this away.
#
# **Predict.** Now add a fourth router: **D** sigmoid of each logit, $\sigma(z) = 1 / (1 + e^{-z})$, take the two best, divide by their sum
# (DeepSeek-V3). Will its two gates for “sat” be closer together than those of B, or further apart?

# %%
sigmoid_TE, _ = sigmoid_forward(logits_TE)
numbers({"sigmoid": sigmoid_TE[SAT]}, example.EXPERTS, 3)
gates["D sigmoid, divide"] = gates_of(sigmoid_TE, expert_TK, "sum")
by_expert = {name: np.zeros(len(example.EXPERTS)) for name in gates}
for name, gate_TK in gates.items():
    by_expert[name][expert_TK[SAT]] = gate_TK[SAT]
    print(f"{name:>17}: {gate_TK[SAT].round(3)}")
plots.gates(by_expert, example.EXPERTS, "sat")

# %% [markdown]
# For positive logits the sigmoid flattens: σ cannot exceed 1, so two good experts count nearly alike.
#
# **Predict.** Add the same number to all four logits of “sat”. Which gates change: those of A, of B, of D?

# %%
shift = np.linspace(-6, 6, 121)
shifted_TE = logits_TE[SAT] + shift[:, None]
best_TK = np.broadcast_to(expert_TK[SAT], (len(shift), 2))
first = {}
routers = {"A": (softmax_forward, "none"), "B": (softmax_forward, "sum")}
routers["D"] = (sigmoid_forward, "sum")
for name, (function, normalize) in routers.items():
    first[name] = gates_of(function(shifted_TE)[0], best_TK, normalize)[:, 0]
    print(f"{name}: first gate from {first[name].min():.3f} to {first[name].max():.3f}")
plots.curves(shift, first, "added to all logits", "gate", "the first gate of “sat”")

# %% [markdown]
# Softmax does not see a common shift, the sigmoid does. Far to the left $\sigma(z)$ behaves like $e^z$, and D becomes B; far to the right
# all scores are near 1, and every chosen expert gets 1/K.
#
# ## 3 · Choose by one number, weigh by another
#
# DeepSeek-V3 keeps its experts evenly loaded with a **correction bias**, a number for each expert: added to the scores for the choice, and
# seen by no gate.
#
# **Predict.** Above stand the sigmoid scores of “sat”, which prefers action and grammar. Give “place” a bias of 0.2: who is chosen now,
# and is the gate of “place” larger than that of “action”?

# %%
bias_E = np.array([0.0, 0.0, 0.0, 0.2])
steered_TK = top_k(sigmoid_TE + bias_E, 2)
steered_gate_TK = gates_of(sigmoid_TE, steered_TK, "sum")
numbers({"scores": sigmoid_TE[SAT], "with bias": sigmoid_TE[SAT] + bias_E}, example.EXPERTS, 3)
for expert, gate in zip(steered_TK[SAT], steered_gate_TK[SAT], strict=True):
    print(f"chosen: {example.EXPERTS[expert]:>6} with gate {gate:.3f}")

# %% [markdown]
# The bias has brought “place” in, and then it is forgotten: the gate of “place” is made of its score alone and stays the smaller one.
#
# ## 4 · Write DeepSeek-V3's gates (exercise)
#
# Given sigmoid scores, a bias and K = `count`:
#
# 1. choose the K experts with the highest score + bias, best first, ties to the lowest id;
# 2. their gates are their **scores**, divided by the sum of the K, times `scale`.
#
# Return both arrays, `[T, K]` each: first the experts, then the gates. The checker knows what released code got wrong here.
#
# <details><summary>Hint 1</summary><code>np.argsort(…, kind="stable")</code> sorts upwards and keeps the order of equals. What must you
# sort so that the best come first?</details>
# <details><summary>Hint 2</summary><code>np.take_along_axis(array, index, axis=1)</code> picks the chosen columns of each row.</details>


# %% EXERCISE
def gates_of_v3(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> tuple:
    """(expert [T, count], gate [T, count]), both arrays."""
    raise NotImplementedError


# %% SOLUTION
def gates_of_v3(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> tuple:
    """(expert [T, count], gate [T, count]), both arrays."""
    expert_TK = np.argsort(-(scores_TE + bias_E), axis=1, kind="stable")[:, :count]
    chosen_TK = np.take_along_axis(scores_TE, expert_TK, axis=1)
    return expert_TK, scale * chosen_TK / chosen_TK.sum(1, keepdims=True)


# %%
check("gates", gates_of_v3)

# %% [markdown]
# ## 5 · The same mistake in the museum
#
# The bug museum keeps real mistakes as small functions, each with the check that catches it. `seen in` names the projects that had it,
# with the number of a report there.
#
# **Predict.** A router that weighs by the *biased* scores: what happens to the gates if every expert gets the same bias, which changes no
# choice?

# %%
bug = bugs.get("biased scores as gates")
sentence(f"seen in: {bug.seen}")
sentence(f"caught: {bug.symptom()}")

# %% [markdown]
# The same number on top of both scores makes them more alike, and so their gates: a bias that was to change nothing has changed how much
# each answer counts.
#
# ## 6 · Who uses what
#
# Each published router is a setting of the same few fields ({{reference.config.GatingConfig}}). Under “scores” stands the function
# that makes scores of logits; `identity` makes none, and the logits themselves are compared, as in C. Then comes K, and what `normalize`
# does with the chosen ones: `none` leaves them, `sum` divides them by their sum, `softmax` is C again.
#
# **Predict.** DeepSeek-V2 chooses 6 of 160 experts by softmax and leaves their scores as they are (A); DeepSeek-V3 divides by the sum (D).
# Both multiply a scale on afterwards. Which of the two needs the larger one?

# %%
print(f"{'router':>15} {'scores':>8} K normalize scale")
for name in ("switch-base-128", "mixtral-8x7b", "deepseek-v2", "deepseek-v3"):
    function, gating = presets.get(name).scores.function, presets.get(name).gating
    print(f"{name:>15} {function:>8} {gating.top_k} {gating.normalize:>9} {gating.scale:5}")

# %% [markdown]
# Six softmax scores out of 160 are small numbers, and the layer's output would be small beside what it is added to. Gates that sum to 1
# need less help.
#
# Try: K = 4, where every expert is chosen: write `top_k(logits_TE, 4)` in the second cell. Which of A, B and C are the same function then,
# and why does D differ?
#
# **Next:** [03 · write the backward pass and check it](03_backward.ipynb)
