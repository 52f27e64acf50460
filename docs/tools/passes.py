"""Figures about what passes through the layer, from Python's side: gradients on their way back to the logits."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
from routings import ROUTERS, example_routing

from reference import example
from reference.config import GatingConfig
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
