# needs: torch, rich, safetensors
# %% [markdown]
# # 07 · A tiny MoE language model: train, look inside, generate
#
# Everything so far was one layer. Here are several in a Transformer that reads real text byte by byte: *attention* lets a byte see those
# before it, then a feed-forward or MoE layer works on each byte alone, and so on, layer after layer. You train a small one, then
# open one that was trained for longer and ask what its experts have become experts *in*. Two ideas are new: **bits per byte**, and
# **specialization measured against chance**.
#
# Before each result, write down what you expect, and only then run the cell.
#
# Read along: {{docs/chapters/specialization.md}} · the text: {{reference/text.py}} · the model:
# {{reference/autograd/transformer.py}} · before this: [06](06_bias_controller.ipynb)

# %%
import textwrap
from dataclasses import replace

import numpy as np
import torch

from notebooks import plots
from notebooks.checks import check
from optimized.tour import read_committed
from reference.autograd import routing_to_numpy
from reference.autograd.sampling import sample
from reference.autograd.tour_model import TOUR_MODEL, TOUR_TRAIN
from reference.autograd.training import heldout_bits, train
from reference.specialization import domain_expert_share, measure, mutual_information
from reference.text import decode, encode, heldout_windows, load_corpus

torch.set_num_threads(1)
corpus = load_corpus()
for domain in corpus.domains:
    lines = [line.strip() for line in decode(corpus.heldout[domain][:1000]).split("\n")]
    example = next(line for line in lines if len(line) > 10)
    size = corpus.train[domain].size / 1e6
    print(f"{domain}: {size:.1f} MB to learn from, such as")
    print("   ", textwrap.shorten(example, 40, placeholder=" …"))

# %% [markdown]
# Nothing was downloaded: this is Python's own library, its own documentation, and arithmetic ({{reference.text.load_corpus}}).
#
# ## 1 · Bits per byte
#
# A language model says how likely each next byte is. $-\log_2$ of the probability that it gave to the byte which then came, averaged over a
# text, is how many **bits per byte** it needs: a perfect compressor that asks the model would store the text in that many.
#
# **Predict.** How many bits does a model need that finds all 256 bytes equally likely? And one that knows only how frequent each byte is?

# %%
by_frequency = {}
for domain in corpus.domains:
    count_V = np.bincount(corpus.train[domain], minlength=256) + 1
    bits_V = -np.log2(count_V / count_V.sum())
    by_frequency[domain] = bits_V[corpus.heldout[domain]].mean()
    frequent = by_frequency[domain]
    print(f"{domain:>10} all alike {np.log2(256):.1f}, by frequency {frequent:.1f}")

# %% [markdown]
# ## 2 · Train
#
# The layer is DeepSeek-V3's at a very small size: 16 experts, of which each byte chooses 4, and a *shared* one that every byte goes
# through; sigmoid scores, and a bias that evens the load, as in notebook 06. A token is a byte here. 120 steps take some seconds.
#
# **Predict.** Will 120 steps beat the frequencies? In which domain by most?

# %%
gating = replace(TOUR_MODEL.moe.gating, groups=1, top_groups=1)
balance = replace(TOUR_MODEL.moe.balance, bias_rate=0.01)
small = replace(
    TOUR_MODEL,
    moe=replace(TOUR_MODEL.moe, d_model=64, gating=gating, balance=balance),
    attention=replace(TOUR_MODEL.attention, heads=2, kv_heads=1),
    layers=2,
    dense_width=128,
)
settings = replace(TOUR_TRAIN, steps=120, length=64, lr=8e-3, warmup=20)
settings = replace(settings, log_every=2, evaluate_every=0)
result = train(small, settings, corpus, progress=False)
step = np.array([row["step"] for row in result.log])
bits = np.array([row["ce"] for row in result.log]) / np.log(2)
by_model = {"this model": bits, "all bytes alike": np.full(len(step), 8.0)}
plots.curves(step, by_model, "step", "bits per byte", "bits per byte while training")
trained = heldout_bits(result.model, corpus, 64, count=16, batch=16)
print("bits per byte on text it has never seen:")
for domain, value in trained.items():
    print(f"{domain:>10}: {value:.1f}, by frequency {by_frequency[domain]:.1f}")

# %% [markdown]
# **Predict.** The bias starts at 0. Does the load even out in 120 steps (MaxVio, as in notebook 06)? Was any expert ever without a token?

# %%
violation = np.array([row["max_vio"]["1"] for row in result.log])
dead = [row["dead_experts"] for row in result.log]
by_layer = {"layer 1": violation}
plots.curves(step, by_layer, "step", "MaxVio", "the busiest expert above the mean")
print(f"MaxVio {violation[0]:.1f} at the start, {violation[-5:].mean():.1f} at the end")
print(f"unused experts: at most {max(dead)}, at the end {dead[-1]}")

# %% [markdown]
# ## 3 · A model that was trained for longer
#
# The repository holds a larger sibling, with its log: 4 layers, counted from 0, the first of them without experts, and 4,000 steps
# ({{reference/autograd/tour_model.py}}).
#
# **Predict.** How many bits per byte does it need? Which of the three domains can *not* be learned much further, however long one
# trains? (What is random in it?)

# %%
model, record = read_committed()
step = np.array([row["step"] for row in record["log"]])
curve = np.array([row["ce"] for row in record["log"]]) / np.log(2)
smooth = np.convolve(curve, np.ones(10) / 10, "valid")
by_model, title = {"mean of ten": smooth}, "the committed model while it was trained"
plots.curves(step[9:], by_model, "step", "bits per byte", title)
longer = heldout_bits(model, corpus, 256, count=8, batch=8)
print("bits per byte on text it has never seen:")
for domain, value in longer.items():
    print(f"{domain:>10}: {value:.1f}, the small model {trained[domain]:.1f}")

# %% [markdown]
# The operands of the arithmetic are drawn at random; no model can know them, and only what stands behind the “=” can be learned. That is
# why this model, which is far better at code, has gained so little there.
#
# ## 4 · Who goes where?
#
# Take text of the three domains that was held back from the training, and count, for each domain, how its assignments are spread over the
# 16 experts ({{reference.specialization.domain_expert_share}}).
#
# **Predict.** If experts did not care about domains, every cell would be 1/16 = 0.06. Will some expert be for arithmetic alone? In the
# first MoE layer or in the last one?

# %%
WINDOWS, LENGTH = 8, 128
windows = [heldout_windows(corpus, domain, LENGTH, WINDOWS) for domain in corpus.domains]
tokens_BS = torch.from_numpy(np.concatenate(windows))
with torch.no_grad():
    _, aux = model.eval()(tokens_BS)
routings = {layer: routing_to_numpy(routing) for layer, routing in aux.routing.items()}
label_T = np.repeat(np.arange(3), WINDOWS * LENGTH)
sequence_T = np.repeat(np.arange(3 * WINDOWS), LENGTH)
shares = {}
for layer, routing in routings.items():
    shares[layer] = domain_expert_share(routing.expert, label_T, 16)
names = [f"{domain} {layer}" for layer in routings for domain in corpus.domains]
all_shares = np.concatenate([*shares.values()])
title = "share of each expert in a domain's assignments"
plots.table(all_shares, names, title, "expert", "domain and layer", "share")
print("the expert that each domain uses most")
for layer, share_VE in shares.items():
    busiest = zip(corpus.domains, share_VE.argmax(1), strict=True)
    print(f"layer {layer}:", ", ".join(f"{domain} {expert}" for domain, expert in busiest))

# %% [markdown]
# Some cells stand out and none is empty: every expert serves every domain.
#
# ## 5 · How much is that? (exercise)
#
# Count with one number: how many **bits does an expert tell about the domain**? Give each token a label, the number of its domain. With
# $p(v, e)$ the share of all assignments that have label $v$ and expert $e$, and its sums $p(v) = \sum_e p(v, e)$ and
# $p(e) = \sum_v p(v, e)$,
#
# $$I = \sum_{v,e} p(v,e) \log_2 \frac{p(v,e)}{p(v)\,p(e)}$$
#
# Each of a token's K assignments counts once. `label_T[t]` is the label of token t, and `expert_TK[t]` are its experts.
#
# **Predict.** What is $I$ if each of the three domains, equally frequent, had its own experts? If experts did not care?
#
# <details><summary>Hint 1</summary><code>np.add.at(table, (label_T[:, None], expert_TK), 1)</code> counts every assignment in a table
# with a row for each label and a column for each expert. Divide it by its sum.</details>
# <details><summary>Hint 2</summary>Cells that are 0 contribute 0, but for NumPy 0 times the logarithm of 0 is NaN. Sum over the others
# only.</details>


# %% EXERCISE
def information(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    """How many bits the expert of an assignment tells about its token's label."""
    raise NotImplementedError


# %% SOLUTION
def information(expert_TK: np.ndarray, label_T: np.ndarray) -> float:
    """How many bits the expert of an assignment tells about its token's label."""
    joint_VE = np.zeros((label_T.max() + 1, expert_TK.max() + 1))
    np.add.at(joint_VE, (label_T[:, None], expert_TK), 1 / expert_TK.size)
    independent_VE = joint_VE.sum(1, keepdims=True) * joint_VE.sum(0)
    seen_VE = joint_VE > 0
    ratio_N = joint_VE[seen_VE] / independent_VE[seen_VE]
    return float((joint_VE[seen_VE] * np.log2(ratio_N)).sum())


# %%
check("information", information)

# %% [markdown]
# ## 6 · Against chance
#
# If each of three domains had its own experts, $I$ would be $\log_2 3 = 1.58$ bits; if experts did not care, it would be 0. But from
# finitely many tokens the estimate is above 0 even where there is nothing: some expert always happens to lean somewhere. So deal the labels
# out anew, sequence by sequence, many times, and see what chance alone gives ({{reference.specialization.measure}}).
#
# **Predict.** Of at most 1.58 bits: how many will the real labels have, and how many the shuffled ones, on average and at
# most?

# %%
print("bits      found  by chance  at most")
for layer, routing in routings.items():
    rng = np.random.default_rng(layer)
    found = measure(routing.expert, label_T, rng, group_ids=sequence_T, permutations=100)
    bits, chance, most = found.information, found.null_mean, found.null_high
    print(f"layer {layer} {bits:7.2f} {chance:10.2f} {most:8.2f}")

# %% [markdown]
# More than chance, and far from 1.58. The experts know something about domains, but domains are not what they are for.
#
# **Predict.** Ask the same of another label, the class of the byte: small letter, digit, white space or anything else. More bits or fewer?

# %%
classes = ("abcdefghijklmnopqrstuvwxyz", "0123456789", " \n\t")
own = [np.isin(np.arange(256), encode(text)) for text in classes]
class_V = np.select(own, [0, 1, 2], default=3)
class_T = class_V[tokens_BS.numpy().ravel()]
for layer, routing in routings.items():
    domain, kind = (mutual_information(routing.expert, label) for label in (label_T, class_T))
    print(f"layer {layer}: domain {domain:.2f} bits, class {kind:.2f} bits")

# %% [markdown]
# What a byte *is* counts for more than where it comes from.
#
# **Predict.** Next come the gates of one line, `LINE`, a column for each byte (␣ is a blank). Which columns will look most alike: those of
# neighbours, or those of the same byte at different places, such as the blanks and the two w's?

# %%
LINE = "return w + 2 * w"
with torch.no_grad():
    _, aux = model(torch.from_numpy(encode(LINE))[None])
routing = routing_to_numpy(aux.routing[1])
gate_ES = np.zeros((16, len(LINE)))
np.put_along_axis(gate_ES.T, routing.expert, routing.gate, axis=1)
rows, columns = [str(expert) for expert in range(16)], [*LINE.replace(" ", "␣")]
title = "the gates of each byte in layer 1"
plots.table(gate_ES, rows, title, "byte", "expert", "gate", columns)

# %% [markdown]
# Each column has 4 gates, which sum to 2.5: that is the layer's `scale` (notebook 02, section 6). Both w's have the same four experts, and
# most blanks share two or three, whatever stands beside them.
#
# **Predict.** One line is one line. Take any two bytes of the held-out text, two neighbours, or twice the same byte: how many of their 4
# experts do they have in common on average?

# %%
own_TE = np.zeros((len(label_T), 16))
np.put_along_axis(own_TE, routings[1].expert, 1, axis=1)
byte_T = tokens_BS.numpy().ravel()
shared_TT, other_TT = own_TE @ own_TE.T, ~np.eye(len(byte_T), dtype=bool)
pairs = {
    "any two": other_TT,
    "neighbours": np.eye(len(byte_T), k=1, dtype=bool),
    "the same byte": other_TT & (byte_T[:, None] == byte_T),
}
for name, pair_TT in pairs.items():
    print(f"{name:>13}: {shared_TT[pair_TT].mean():.1f} of 4 experts in common")

# %% [markdown]
# ## 7 · Generate
#
# The model says how likely each next byte is, one is drawn, and so on. `temperature` below 1 makes likely bytes likelier still, and `top_p`
# leaves out the unlikeliest.
#
# **Predict.** What will the committed model get right: spelling, indentation, brackets, sums?

# %%
for prompt in ("def area(width, height):\n", "If the argument is ", "7 + 5 = "):
    written = list(sample(model, prompt.encode(), 100, temperature=0.7, top_p=0.95, seed=1))
    print(f"{'─' * 20}\n{prompt}▸{decode(written, 'replace')}")

# %% [markdown]
# The form is there, the meaning is not: this model has fewer parameters than one expert of one layer of a large one. “▸” is where it
# takes over.
#
# Try: in section 2, train with `bias_rate=0`. Is the load as even? Are the experts *more* specialised when nobody evens them? (For that,
# put `result.model` in place of `model` in section 4, once with the bias and once without.)
#
# **Next:** [08 · dispatch as sorting](08_dispatch.ipynb)
