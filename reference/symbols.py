"""The symbols of the equations: what they mean, and their names in the code. `notation.LETTERS` has the capital letters of shapes."""

from __future__ import annotations

import re
from typing import NamedTuple

from .notation import EQUATIONS


class Symbol(NamedTuple):
    """pattern: where an equation has it; meaning: in words; name: in the code, or "" where it has none."""

    pattern: str
    meaning: str
    name: str = ""


SYMBOLS = {
    r"x_t": Symbol(r"(?<![a-z\\])x_\{?t|\bx\b", "the vector of token t", "x_TD"),
    r"y_t": Symbol(r"\by_\{?t", "what the layer makes of token t", "y_TD"),
    r"z_{te}": Symbol(r"\bz(\^|_)", "the logit of token t for expert e", "logits_TE"),
    r"s_{te}": Symbol(r"(?<![a-z])s_\{t", "the score of token t for expert e, which a score function makes of the logit", "scores_TE"),
    r"p_{te}": Symbol(r"(?<![a-z])p_\{t", "the score as a share, so that those of a token sum to 1", "probability_TE"),
    r"c_{te}": Symbol(
        r"(?<![a-z])c_\{t[ei]", "what the choice compares: the score and, where there is one, the correction bias", "choice_TE"
    ),
    r"e_{tk}": Symbol(r"(?<![a-z])e_\{t'?(k|1|j)|e_\{t, e_", "the expert that token t chose k-th", "expert_TK"),
    r"g_{tk}": Symbol(r"(?<![a-z])g_(\{t[k2j]|t )", "the gate of token t's k-th choice", "gate_TK"),
    r"\lambda": Symbol(r"\\lambda", "a constant factor", "gating.scale"),
    r"\mathcal{G}_g": Symbol(r"mathcal\{G\}_g", "the experts of group g"),
    r"f_{\text{cap}}": Symbol(r"f_\{\\text\{cap", "the capacity factor", "capacity.factor"),
    r"C": Symbol(r"(?<![A-Za-z\\])C(?![A-Za-z])", "the capacity, how many assignments of one group an expert accepts", "slots_B"),
    r"\prec": Symbol(r"\\prec", "“is served before”"),
    r"\pi_{tk}": Symbol(r"\\pi_\{tk", "the place of an assignment in its expert's queue, from 0", "position_TK"),
    r"B(t)": Symbol(r"(?<![A-Za-z])B\(t", "the group of tokens that token t is in", "group_T"),
    r"r_n": Symbol(r"(?<![a-z])r_(n|\{ecd)", "a row, the n-th in the order of the experts", "rows_ND"),
    r"o_n": Symbol(r"(?<![a-z])o_\{?(n|ecd)", "what the expert of row n answers", "out_ND"),
    r"\beta_e": Symbol(r"\\beta_", "where the rows of expert e begin", "bounds_P"),
    r"\operatorname{FFN}_e": Symbol(r"FFN\}_", "the network of expert e"),
    r"\ell_e": Symbol(r"(?<!hat)(?<!bar)\\ell", "the load of expert e, its assignments before any drop", "load_E"),
    r"\bar\ell": Symbol(r"\\bar\\ell", "the mean load"),
    r"f_e": Symbol(r"(?<![a-z])f'?'?_(e|g|\{be)", "the share of the load that expert e has"),
    r"P_e": Symbol(r"(?<![A-Za-z])P'?_(e|g|\{be)", "the importance of expert e, the mean of its scores as shares", "importance_E"),
    r"b_e": Symbol(r"(?<![a-z])b_e", "the correction bias of expert e", "router.correction_bias"),
    r"\gamma": Symbol(r"\\gamma", "the step of the bias", "balance.bias_rate"),
    r"\mathcal{L}": Symbol(r"\\mathcal\{L\}", "the loss, before its weight"),
}
"""LaTeX → symbol, in the order of the way through the layer; equations of costs and measures have symbols of their own, in LOCAL."""

_UNIFORM = "a random number between 0 and 1"
LOCAL: dict[str, dict[str, str]] = {
    "router-logits": {
        "W_{ed}": "the router's matrix, a row for each expert (`router.weight`)",
        "b_e": "a bias, in most routers absent (`router.bias`)",
    },
    "jitter": {"u_{td}": "random factors near 1", r"\varepsilon": "how near (`scores.noise_scale`)"},
    "top-k": {"v_{te}": "what is compared, from the highest down"},
    "group-max": {"q_{tg}": "how good group g is for token t"},
    "group-top2-sum": {"q_{tg}": "how good group g is for token t"},
    "group-limit": {"q_{tg}": "how good group g is for token t", "g(e)": "the group of expert e", "c'_{te}": "what is left to choose from"},
    "gate-sum": {r"\epsilon": "a tiny number against division by 0"},
    "gates": {r"\operatorname{normalize}": "one of the normalizers: as they are, divided by their sum, a softmax"},
    "random-second": {"g_{t2}": "the second gate of token t", r"\theta": "the gate from which on it is always kept", "r_t": _UNIFORM},
    "capacity-none": {"S": "the tokens of the group"},
    "one-hot-slots": {r"\delta": "the tensor of zeros and ones (`slot_TKEC`)", "c": "a slot of an expert"},
    "one-hot-dispatch": {r"\delta": "the tensor of `one-hot-slots`"},
    "one-hot-combine": {r"\delta": "the tensor of `one-hot-slots`"},
    "dispatch": {"t(n)": "whose copy row n is", "e(n)": "the expert of row n, never lower than that before it"},
    "combine": {"n(t, k)": "the row of token t's k-th choice"},
    "act-relu": {"u": "what the first matrix makes", "h": "the hidden units"},
    "act-gelu": {"u": "what the first matrix makes", "h": "the hidden units", r"\Phi": "the normal distribution function"},
    "act-swiglu": {"a, u": "the two halves of what the first matrix makes", "h": "the hidden units", r"\odot": "number by number"},
    "act-relu2": {"u": "what the first matrix makes", "h": "the hidden units"},
    "act-geglu": {
        "a, u": "the two halves of what the first matrix makes",
        "h": "the hidden units",
        r"\Phi": "the normal distribution function",
    },
    "act-clamped-swiglu": {"a, u": "the two halves of what the first matrix makes", "h": "the hidden units"},
    "ffn": {
        r"W_{\text{up}}, W_{\text{down}}": "the two matrices",
        r"\operatorname{act}": "the activation",
        "b": "biases, where a model has them",
    },
    "shared": {"K_s": "how many shared experts, stored as one network of their added width"},
    "shared-sigmoid": {"w": "a vector that is learned (`shared.gate`)", r"\sigma": "the sigmoid"},
    "shared-softmax": {"c_{t0}, c_{t1}": "the two shares of token t", "W, b": "what they are made with, learned"},
    "moe": {r"\operatorname{FFN}_{\text{shared}}": "the shared expert, absent in many models"},
    "loss-first-choice": {"f_e": "the share of the tokens whose *first* choice is expert e"},
    "loss-sequence": {
        "b": r"a sequence, of \(T_b\) tokens",
        "f_e": "",
        "P_e": "",
        "f_{be}": "the share of its choices, counted by scores without bias",
        "P_{be}": "the mean over its tokens",
    },
    "loss-device": {"f'_g": "the mean of the group's f", "P'_g": "the sum of the group's P"},
    "loss-communication": {
        "f_e": "",
        "f''_g": "how much of the tokens is sent to group g",
        "M": "the groups that a token may reach (`gating.top_groups`)",
        "P'_g": "the sum of the group's P",
    },
    "loss-global": {r"\ell^{\text{batch}}_e": "the load over all micro-batches and devices"},
    "bias-centered-sign": {"s_e": "the sign of the violation: 1, 0 or −1"},
    "bias-proportional": {r"\mu": "the step (`balance.bias_rate`)"},
    "load-entropy": {"q_e": "the share of the load that expert e has"},
    "drop-by-position": {
        r"\text{bin}_i": "the tokens of the i-th part of the sequences",
        r"\text{picked}": "1 for an assignment before any drop",
        r"\text{keep}": "1 for one that was kept",
    },
    "mutual-information": {"v": "a label", "p": "shares of the assignments"},
    "permutation-p-value": {"I": "what was measured", "I_i": "the same with labels dealt out at random, for the i-th time of n"},
    "uncertainty-coefficient": {"I": "the mutual information", "H": "the entropy of the expert"},
    "expert-share": {"v": "a label", "p": "shares of the assignments"},
    "position-bin": {"b": "the number of parts", "S_{B(t)}": "the length of token t's sequence", "v_t": "the part that token t is in"},
    "weight-overlap": {"u_{ei}": "the weights of hidden unit i of expert e"},
    "output-overlap": {"o_{et}": "what expert e answers for token t"},
    "disabled-experts": {r"\mathcal{M}_t": "the m best experts of token t, which it has to do without"},
    "masked-increase": {r"\mathcal{L}": "the loss of the model on held-out text"},
    "routing-churn": {r"\mathcal{A}_t, \mathcal{B}_t": "the experts of token t in the two routings"},
    "chance-corrected": {"a": "the agreement", "a_0": "the agreement by chance"},
    "best-relabelling": {r"\pi": "a new name for each expert", "n_{ef}": "tokens that have e in the one routing and f in the other"},
    "layer-parameters": {"3": "the matrices of a network with SwiGLU: gate, up and down"},
    "ffn-parameters": {"3 D F": "gate, up and down", "2 D F": "up and down"},
    "gqa-parameters": {"d_h": "the width of a head", r"H_{\text{kv}}": "the heads that have keys and values of their own"},
    "mla-parameters": {
        "r_q, r_{kv}": "the ranks of the compressed queries, and keys and values",
        "d_h, d_r, d_v": "widths of a head: without position, with position, of values",
    },
    "grouped-output-parameters": {
        "r_q, r_o": "the ranks of the compressed queries and outputs",
        "d_h": "the width of a head",
        "G": "groups of heads",
    },
    "model-parameters": {r"\text{FFN or MoE}": "a layer is one or the other"},
    "flops-per-token": {
        r"P_{\text{active}}": "active parameters, two operations each",
        "w": "the width of all heads",
        "n": "layers of attention, that look back and that see all",
    },
    "experts-touched": {
        r"\tfrac{K}{E}": "the chance that a token picks a given expert",
        "T": "tokens that choose evenly and independently",
    },
    "weight-bytes": {
        "b": "bytes of a number",
        r"P_{\text{resident}}": "what is read for any token",
        r"E_{\text{touched}}": "the experts that are read",
    },
    "activation-bytes": {"b": "bytes of a number"},
    "dense-equal": {
        "F^*": "the width of the twin",
        r"P_{\text{active}}, P_{\text{total}}": "parameters of the mixture's layer, those that a token meets and all",
    },
    "loss-cooperative": {"g_{te}": "the trust in expert e", "o_{te}": "its answer", "y_t": "the target"},
    "loss-expected": {"g_{te}": "the trust in expert e", "o_{te}": "its answer", "y_t": "the target"},
    "loss-competitive": {
        "g_{te}": "the trust in expert e",
        "o_{te}": "its answer",
        "y_t": "the target",
        r"\sigma": "how far off an answer may be",
    },
    "hierarchy-joint": {
        "g_{tg}, g_{t, i \\mid g}": "trust in a group, and in an expert i of it",
        r"\mu_{tgi}": "the answer of that expert",
        "y_t": "the target",
    },
    "hierarchy": {"g_{tg}, g_{t, i \\mid g}": "trust in a group, and in an expert i of it", r"\mu_{tgi}": "the answer of that expert"},
    "hierarchy-em": {"h_{tgi}": "the posterior: how much of the answer expert i of group g accounts for", "y_t": "the target"},
    "all-to-all-volume": {
        "Q_{ij}": "tokens that cross from rank i to rank j",
        "A_{ij}": "the experts that they want there",
        "b": "bytes of a number",
    },
    "router-norm": {r"\tilde x_t": "the token, brought to mean square 1"},
    "router-residual": {"l": "the layer", "V_{ej}": "a matrix for the logits of the layer before"},
    "softcap": {"c": "the largest size that a logit may reach"},
    "box-muller": {"u, v": "uniform random numbers", "n": "a normal one made of them"},
    "noisy-logits": {
        "h_{te}": "the logit with noise",
        "n_{te}": "a normal random number",
        r"\sigma_{te}": "how much noise, learned (`router.noise_weight`)",
    },
    "cv-squared": {"a_e": "any number per expert", r"\bar a": "their mean"},
    "loss-importance": {"I_e": "the sum of the gates of expert e"},
    "smooth-load": {
        r"\theta_{te}": "what the logit must exceed to be chosen",
        r"\sigma_{te}": "the size of the noise",
        r"\Phi": "the normal distribution function",
    },
    "loss-smooth-load": {r"\hat\ell": "the load of `smooth-load`"},
    "penalty-update": {r"\lambda": "the penalty that the loss is multiplied with", r"\alpha": "by how much it changes, more than 1"},
    "choose-gumbel": {"u_{te}": _UNIFORM},
    "expert-choice": {r"\mathcal{E}_t": "the experts that chose token t"},
    "hash-table": {"H": "the table: token id v and slot k to an expert", "V": "the size of the vocabulary"},
    "choose-hash": {"H": "the table of `hash-table`"},
    "unit": {r"\hat x": "the vector, brought to length 1"},
    "soft-logits": {
        "z_{tec}": "the logit of token t for slot c of expert e",
        "s": "a learned number",
        r"\hat x, \hat W": "vectors of length 1",
    },
    "soft-dispatch": {"d_{tec}": "the weight of token t in slot c of expert e", "z_{tec}": "the logit of token t for that slot"},
    "soft-combine": {
        "c_{tec}": "the weight of slot c of expert e in the output of token t",
        "z_{tec}": "the logit of token t for that slot",
    },
    "soft-moe": {"d, c": "the weights of `soft-dispatch` and `soft-combine`"},
    "balanced-assignment": {"a_{te}": "how well token t and expert e fit", "e_t": "the expert of token t"},
    "choose-balanced": {"a_{te}": "how well token t and expert e fit"},
    "sinkhorn-potential": {"c_e": "what is added to the logits of expert e to even the load", "r_t": "what is added to those of token t"},
    "choose-sinkhorn": {"c_e": "the potential of `sinkhorn-potential`"},
    "choose-positive": {r"\mathcal{E}_t": "the experts of token t"},
    "survivors": {r"\text{keep}_{tj}": "whether the assignment was kept"},
    "expert-scale": {r"\rho_e": "a learned factor of expert e"},
    "expert-dropout": {"h": "the hidden units", "p": "the share that is dropped in training", "u_f": _UNIFORM},
    "expert-zero": {"E(x)": "what this expert answers"},
    "expert-copy": {"E(x)": "what this expert answers"},
    "expert-constant": {"E(x)": "what this expert answers", "v": "a learned vector", "W_c": "a learned matrix of two rows"},
    "loss-heterogeneous": {
        "N, Z": "experts with and without a network",
        r"\tau": "load and room of a network in units of another expert's (`network_share`)",
    },
    "capacity-heterogeneous": {"N, Z": "experts with and without a network", r"\tau": "room of a network in units of another expert's"},
    "networks-per-token": {
        "N, Z": "experts with and without a network",
        r"\tau": "load of a network in units of another expert's",
        "K_e": "networks that a token meets on average",
    },
    "order-random": {"u_t": _UNIFORM},
    "lstm-parameters": {"D": "the width"},
    "recycle": {r"\text{free}": "the experts that have places left, n of them", "r_t": _UNIFORM},
}
"""Equation → symbols that it alone has, or that mean something else in it; "" for a common one that it does not have."""

OWN = ("cost", "beginnings", "specialization", "overlap", "redundancy", "churn", "soft")
"""Modules whose equations have symbols of their own only."""


def explained(identifier: str) -> dict[str, str]:
    """LaTeX → meaning of the symbols of an equation, those of the way through the layer first. Raises KeyError for an unknown id."""
    latex, function, _ = EQUATIONS[identifier]
    local = LOCAL.get(identifier, {})
    common = {} if function.split(".")[1] in OWN else SYMBOLS
    found = {
        symbol: row.meaning + (f" (`{row.name}`)" if row.name else "")
        for symbol, row in common.items()
        if re.search(row.pattern, latex) and symbol not in local
    }
    return {symbol: meaning for symbol, meaning in (found | local).items() if meaning}
