"""Figures about what passes through the layer, from Python's side: gradients back to the logits, rows to their experts
and back, tokens to other ranks."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import numpy as np
from routings import ROUTERS, example_routing, routed, slots_per_expert

from reference import cost, example
from reference.config import CapacityConfig, GatingConfig
from reference.dispatch import combine_forward, dispatch_forward, one_hot_slots
from reference.gating import gates_backward, gates_forward, top_k
from reference.scores import SCORE_FUNCTIONS

Json = dict[str, Any]


def gradients_data() -> Json:
    """Words, experts and logits of the running example."""
    return {"words": example.WORDS, "experts": example.EXPERTS, "logits": example_routing().logits.round(1)}


def gradients_case(state: Json, data: Json) -> Json:
    """What `gradients.js` must compute for a state: one token's way from the cotangents of its gates to those of its logits."""
    (function, normalize), count = ROUTERS[state["router"]], state["topK"]
    scores_TE, scores = SCORE_FUNCTIONS[function].forward(np.array(data["logits"])[[state["word"]]])
    expert_TK = top_k(scores_TE, count)
    gate_TK, gates = gates_forward(scores_TE, expert_TK, GatingConfig(top_k=count, normalize=normalize))
    dgate_TK = np.array([state["dgate"][:count]], float)
    dscores_TE = gates_backward(dgate_TK, gates)
    dlogits_TE = SCORE_FUNCTIONS[function].backward(dscores_TE, scores)
    found = {"scores": scores_TE, "expert": expert_TK, "gate": gate_TK, "dgate": dgate_TK, "dscores": dscores_TE, "dlogits": dlogits_TE}
    return {name: array[0] for name, array in found.items()}


def gradients_states(data: Json) -> list[Json]:
    """Every word under every router, one expert or two; cotangents that differ, that agree, and that are 0."""
    places = itertools.product(range(len(data["words"])), (1, 2), ROUTERS, ([-1.0, 0.0], [0.3, -0.8], [0.5, 0.5], [0.0, 0.0]))
    return [{"word": word, "topK": top_k, "router": router, "dgate": dgate} for word, top_k, router, dgate in places]


def dispatch_data() -> Json:
    """Words, experts and logits of the running example, and the expert that a reader can make more or less wanted."""
    return gradients_data() | {"pulled": 0, "topK": example.CONFIG.gating.top_k}


def dispatch_case(state: Json, data: Json) -> Json:
    """What `dispatch.js` must compute for a state: the sort, and how much the einsum pads. A factor of 0 is no limit."""
    logits_TE = np.array(data["logits"])
    logits_TE[:, data["pulled"]] += state["pull"]
    (tokens, experts), top_k = logits_TE.shape, data["topK"]
    limit = CapacityConfig("per_assignment" if state["factor"] else "none", factor=state["factor"])
    routing = routed(logits_TE, GatingConfig(top_k=top_k, normalize="sum"), limit)
    slots = slots_per_expert(state, top_k, tokens, experts) if state["factor"] else int(routing.load.max())
    rows_ND, where = dispatch_forward(np.eye(tokens), routing.expert, routing.keep, experts)
    weight_TN, _ = combine_forward(np.eye(len(rows_ND)), routing.gate, where)
    slot_TKEC = one_hot_slots(routing.expert, routing.keep, experts, slots)
    return {
        "token": where.token_N, "slot": where.slot_N, "bounds": where.bounds_P, "gate": weight_TN.sum(0), "load": routing.load,
        "capacity": slots, "padding": int((slot_TKEC.sum((0, 1)) == 0).sum()), "entries": slot_TKEC.size,
        "integers": where.token_N.size + where.slot_N.size + where.bounds_P.size,
        "dropped": [{"token": t, "slot": k} for t, k in np.argwhere(~routing.keep).tolist()],
    }  # fmt: skip


def dispatch_states(data: Json) -> list[Json]:
    """Every pull from an expert that nobody wants to one that takes all, under every limit, at every step of both views."""
    drawn = [(0, "sort", -1), (1, "sort", 2), (1, "einsum", -1), (2, "einsum", 0), (3, "einsum", 2), (3, "sort", -1)]
    return [
        {"pull": pull, "factor": factor, "step": step, "view": view, "word": word}
        for pull, factor, (step, view, word) in itertools.product(range(-4, 5), (0, 0.5, 1, 1.5, 2), drawn)
    ]


def crossings_data() -> Json:
    """The running example as one layer whose tokens and experts lie on several ranks; gates travel in fp32."""
    config = example.CONFIG
    sizes = {"topK": config.gating.top_k, "factor": config.capacity.factor, "dModel": config.d_model}
    return gradients_data() | sizes | {"gateBytes": np.dtype(np.float32).itemsize, "codeBytes": cost.CODE_BYTES}


def crossings_case(state: Json, data: Json) -> Json:
    """What `crossings.js` must compute for a state; apart: as if every assignment were a token of its own."""
    logits_TE, ranks, top_k = np.array(data["logits"]), state["ranks"], state["topK"]
    tokens, experts = logits_TE.shape
    limit = CapacityConfig("per_assignment", factor=data["factor"])
    routing = routed(logits_TE, GatingConfig(top_k=top_k, normalize="sum"), limit)
    rank_T, owner_E = np.arange(tokens) * ranks // tokens, np.arange(experts) * ranks // experts
    sizes = {"ranks": ranks, "d_model": state["dModel"], "itemsize": state["itemsize"], "gate_itemsize": data["gateBytes"]}
    volume = partial(cost.all_to_all_volume, owner_E=owner_E, **sizes)
    sent = volume(routing.expert, routing.keep, rank_T)
    apart = volume(routing.expert.reshape(-1, 1), routing.keep.reshape(-1, 1), rank_T.repeat(top_k))
    return {"home": rank_T, "owner": owner_E, "kept": int(routing.keep.sum()), "apart": int(apart.dispatch.sum()), **sent._asdict()}


def crossings_states(data: Json) -> list[Json]:
    """Every number of ranks and of experts per token, each all-to-all, wide and narrow rows."""
    ways = cost.AllToAll._fields
    return [
        {"ranks": ranks, "topK": top_k, "way": way, "dModel": width, "itemsize": itemsize}
        for ranks, top_k, way, (width, itemsize) in itertools.product((1, 2, 4), (1, 2, 3, 4), ways, ((data["dModel"], 4), (7168, 1)))
    ]
