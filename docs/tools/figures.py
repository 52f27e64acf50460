"""The interactive figures from Python's side: the data that each starts from, and the results that its JavaScript must reproduce."""

from __future__ import annotations

import dataclasses
import html
import itertools
import json
import math
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import measured
import numpy as np
import passes
import rungs
from routings import ROUTERS, example_routing, routed, slots_per_expert

from reference import balancing, capacity, cost, example, moe_forward, presets, update_bias
from reference.config import BalanceConfig, CapacityConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig
from reference.proof import equal
from reference.proof import museum_losses as museum

TOOLS = Path(__file__).resolve().parent
Json = dict[str, Any]
QUEUES = ("choice_major", "token_major")


def route_data() -> Json:
    """Words, experts and logits of the running example; one decimal is all that they have."""
    return {"words": example.WORDS, "experts": example.EXPERTS, "logits": example_routing().logits.round(1).tolist()}


def route_case(state: Json, data: Json) -> Json:
    """What `route.js` must compute for a state."""
    logits_TE = np.array(state["logits"]).reshape(-1, len(data["experts"]))
    limit = CapacityConfig("per_assignment", factor=state["factor"], order=state["order"])
    routing = routed(logits_TE, GatingConfig(top_k=state["topK"], normalize="sum"), limit)
    return {
        **{name: getattr(routing, name) for name in ("scores", "expert", "gate", "keep", "load")},
        "capacity": slots_per_expert(state, state["topK"], *logits_TE.shape),
    }


def route_states(data: Json) -> list[Json]:
    """States with every K, both orders, and logits with ties."""
    plain, rng = np.ravel(data["logits"]).tolist(), np.random.default_rng(0)
    tied = rng.integers(-2, 3, len(plain)).astype(float).tolist()
    return [
        {"word": 0, "topK": top_k, "factor": factor, "order": order, "logits": logits}
        for top_k, factor, order, logits in itertools.product((1, 2, 3, 4), (0.25, 1.0, 1.75), QUEUES, (plain, tied))
    ]


def gates_data() -> Json:
    """The word "sat"."""
    return {"experts": example.EXPERTS, "logits": example_routing().logits[2].round(1).tolist()}


def gates_case(state: Json, data: Json) -> Json:
    """What `gates.js` must compute for a state."""
    results = {}
    for name, (function, normalize) in ROUTERS.items():
        routing = routed(np.array([state["logits"]]), GatingConfig(top_k=state["topK"], normalize=normalize), function=function)
        results[name] = {"expert": routing.expert[0], "gate": routing.gate[0], "total": routing.gate[0].sum()}
    return results


def gates_states(data: Json) -> list[Json]:
    """Every K for the word as it is, for equal logits, and for random ones."""
    rows = [data["logits"], [1.0] * 4, *np.random.default_rng(1).uniform(-4, 4, (4, 4)).tolist()]
    return [{"logits": row, "topK": top_k} for row in rows for top_k in (1, 2, 3, 4)]


def buckets_data() -> Json:
    """Who asks for whom in the running example."""
    return {"words": example.WORDS, "experts": example.EXPERTS, "expert": example_routing().expert.tolist()}


def buckets_case(state: Json, data: Json) -> Json:
    """What `buckets.js` must compute for a state: the capacity, and who is dropped among the first `step` served."""
    expert_TK = np.array(data["expert"])
    limit = CapacityConfig("per_assignment", factor=state["factor"], order=state["order"])
    keep_TK = routed(example_routing().logits, GatingConfig(top_k=expert_TK.shape[1]), limit).keep
    served = list(np.ndindex(*expert_TK.shape))
    if state["order"] == "choice_major":
        served.sort(key=lambda assignment: assignment[1])
    dropped = [{"token": t, "slot": k} for t, k in served[: state["step"]] if not keep_TK[t, k]]
    return {"capacity": slots_per_expert(state, expert_TK.shape[1], len(expert_TK), len(data["experts"])), "dropped": dropped}


def buckets_states(data: Json) -> list[Json]:
    """Both orders, several factors, half and all of the assignments."""
    return [
        {"factor": factor, "order": order, "step": step}
        for factor, order, step in itertools.product((0.25, 0.5, 1.0, 1.25, 2.0), QUEUES, (0, 9, 16))
    ]


def losses_data() -> Json:
    """64 tokens and 8 experts without a common preference."""
    return {"logits": np.random.default_rng(0).standard_normal((64, museum.EXPERTS)).round(2).tolist()}


def losses_case(state: Json, data: Json) -> Json:
    """What `losses.js` must compute for a state; the wrong losses are the museum's."""
    logits_TE = np.array(data["logits"])
    logits_TE[:, :2] += state["pull"]
    inputs = museum.loss_inputs(logits_TE, state["topK"])
    limit = CapacityConfig("per_assignment", factor=state["factor"])
    keep_TK = routed(logits_TE, GatingConfig(top_k=state["topK"]), limit).keep
    return {
        "load": balancing.count_load(inputs.expert_TK, inputs.picked_TK, museum.EXPERTS),
        "keptLoad": balancing.count_load(inputs.expert_TK, keep_TK, museum.EXPERTS),
        "importance": balancing.mean_probability(inputs.probability_TE, inputs.tokens),
        "losses": {
            "right": museum.balance_loss(inputs),
            "perToken": museum.not_divided_by_k(inputs),
            "afterDrop": museum.counted_after_the_drop(inputs, keep_TK),
            "chosenOnly": museum.probability_of_the_chosen_only(inputs),
            "twice": museum.softmax_twice(inputs),
            "survivors": museum.divided_by_the_survivors(inputs, keep_TK),
        },
    }


def losses_states(data: Json) -> list[Json]:
    """From even to collapsed, every K, tight and loose."""
    return [
        {"pull": pull, "topK": top_k, "factor": factor}
        for pull, top_k, factor in itertools.product((0.0, 0.75, 2.0, 6.0), (1, 2, 4), (0.5, 1.0, 4.0))
    ]


def bias_data() -> Json:
    """Four batches of 32 tokens for 8 experts, and how much each expert is preferred."""
    rng = np.random.default_rng(0)
    return {"batches": rng.standard_normal((4, 32, 8)).round(2).tolist(), "preference": np.linspace(1, -1, 8).round(2).tolist()}


def bias_case(state: Json, data: Json) -> Json:
    """What `bias.js` must compute for a state."""
    preference_E, loads = np.array(data["preference"]), []
    rule = BalanceConfig(bias_rule="sign", bias_rate=10.0 ** state["logRate"])
    gating = GatingConfig(top_k=2, correction_bias=True)
    controller = MoEConfig(1, gating=gating, experts=ExpertsConfig(len(preference_E)), balance=rule)
    bias = np.zeros(len(preference_E))
    for step in range(state["steps"]):
        turned = state["shift"] == "half" and step >= state["steps"] / 2
        logits_TE = np.array(data["batches"][step % len(data["batches"])]) + state["skew"] * (
            preference_E[::-1] if turned else preference_E
        )
        loads.append(routed(logits_TE, gating, function="sigmoid", bias=bias).load)
        bias = update_bias(bias, loads[-1], controller)
    return {"bias": bias, "loads": loads, "violation": [balancing.max_violation(load_E) for load_E in loads]}


def bias_states(data: Json) -> list[Json]:
    """Slow, good and wild steps, with and without a turn of the data."""
    return [
        {"logRate": rate, "skew": skew, "steps": 60, "shift": shift}
        for rate, skew, shift in itertools.product((-3.5, -2.0, -0.5), (0.0, 1.0, 2.0), ("no", "half"))
    ]


def cost_data() -> Json:
    """Parameters of every preset by component: [stored, met by a token]."""
    return {"models": {name: dict(cost.model_parameters(presets.model(name))) for name in presets.names()}}


def cost_case(state: Json, data: Json) -> Json:
    """What `cost.js` must compute for a state."""

    def side(name: str) -> Json:
        total, active = cost.sum_parameters(cost.model_parameters(presets.model(name)))
        return {
            "total": total, "active": active, "share": active / total,
            "totalBytes": total * state["bytes"], "activeBytes": active * state["bytes"],
        }  # fmt: skip

    return {"left": side(state["left"]), "right": side(state["right"])}


def cost_states(data: Json) -> list[Json]:
    """Every preset once on each side."""
    names = presets.names()
    return [{"left": left, "right": right, "bytes": 0.5} for left, right in zip(names, reversed(names), strict=True)]


def layer_data() -> Json:
    """The running example's words, weights and settings."""
    params, config = example.params(), example.CONFIG
    return {
        "words": example.WORDS, "experts": example.EXPERTS, "features": example.EXPERTS, "inputs": example.inputs(),
        "router": params["router.weight"], "up": params["experts.up_proj"], "down": params["experts.down_proj"],
        "topK": config.gating.top_k, "factor": config.capacity.factor,
    }  # fmt: skip


def layer_case(state: Json, data: Json) -> Json:
    """What `layer.js` must compute for a state: one word's row of everything."""
    word, alone = state["word"], state["company"] == "alone"
    x_TD, t = (example.inputs()[[word]], 0) if alone else (example.inputs(), word)
    config = example.CONFIG
    output, _ = moe_forward(x_TD, example.params(), config, training=True)
    routing = output.routing
    free = moe_forward(x_TD, example.params(), dataclasses.replace(config, capacity=CapacityConfig()), training=True)[0].routing
    return {
        "x": x_TD[t], "logits": routing.logits[t], "scores": routing.scores[t], "expert": routing.expert[t], "gate": free.gate[t],
        "kept": routing.gate[t], "y": output.y[t],
        "capacity": capacity.per_assignment(config.capacity.factor, config.gating.top_k, len(x_TD), config.experts.count),
    }  # fmt: skip


def layer_states(data: Json) -> list[Json]:
    """Every word in both companies, at every step of one of them."""
    words = [{"word": t, "company": company, "step": 6} for t in range(len(data["words"])) for company in ("batch", "alone")]
    return words + [{"word": 2, "company": "batch", "step": step} for step in range(7)]


def granularity_config(state: Json, data: Json) -> MoEConfig:
    """The layer that a state describes."""
    cut, shared = 2 ** state["logCut"], state["shared"]
    stored = ExpertsConfig(data["experts"] * cut - shared, data["width"] // cut, "swiglu", shared=shared)
    return MoEConfig(data["dModel"], ScoresConfig(), GatingConfig(top_k=data["topK"] * cut - shared), CapacityConfig(), stored)


def granularity_data() -> Json:
    """The layer before it is cut: DeepSeekMoE's conventional one, 16 experts of which a token meets two."""
    return {"experts": 16, "topK": 2, "width": 5632, "dModel": 2048}


def granularity_case(state: Json, data: Json) -> Json:
    """What `granularity.js` must compute for a state."""
    config = granularity_config(state, data)
    total, active = cost.sum_parameters(cost.layer_parameters(config))
    routed, chosen = config.experts.count, config.gating.top_k
    return {
        "routed": routed, "chosen": chosen, "narrow": config.experts.width, "total": total, "active": active,
        "logCombinations": math.log10(math.comb(routed, chosen)), "router": routed * config.d_model,
        "rowBytes": chosen * config.d_model * 2, "tokensPerExpert": state["tokens"] * chosen / routed,
    }  # fmt: skip


def granularity_states(data: Json) -> list[Json]:
    """Every cut, without and with as many shared experts as there may be."""
    return [
        {"logCut": cut, "shared": shared, "tokens": tokens}
        for cut in range(4)
        for shared in range(min(4, data["topK"] * 2**cut - 1) + 1)
        for tokens in (16, 4096)
    ]


def lamp_data() -> Json:
    """An output of 8 rows, a sum of two terms, and what two computations in bfloat16 make of it.

    Where the terms nearly cancel, the error is that of the terms and no small part of what is left, as in any matrix product.
    """
    rng, width = np.random.default_rng(0), 8
    one, other = rng.standard_normal((2, 8, width))

    def rounded(value: np.ndarray) -> np.ndarray:
        return equal.round_to(value, "bfloat16")

    honest, eager = rounded(rounded(one) + rounded(other)), rounded(3 * rounded(one / 3) + rounded(other))
    return {"truth": (one + other).ravel(), "eager": eager.ravel(), "honest": honest.ravel(), "width": width}


def lamp_case(state: Json, data: Json) -> Json:
    """What `lamp.js` must decide for a state."""
    size, atol = 10.0 ** state["logSize"], 10.0 ** state["logAtol"]
    truth, eager, honest = (size * np.reshape(data[key], (-1, data["width"])) for key in ("truth", "eager", "honest"))
    swapped = truth[[1, 0, *range(2, len(truth))]]
    candidates = {"honest": honest, "zero": 0 * truth, "negated": -truth, "scaled": 1.04 * truth, "swapped": swapped}
    return {
        name: {
            "allclose": bool(np.allclose(candidate, truth, rtol=state["rtol"], atol=atol)),
            "policy": equal.compare(name, candidate, truth, eager, "bfloat16").passed,
        }
        for name, candidate in candidates.items()
    }


def lamp_states(data: Json) -> list[Json]:
    """Tolerances far above, near and far below the outputs."""
    return [
        {"logSize": size, "logAtol": atol, "rtol": rtol}
        for size, atol, rtol in itertools.product((-6.0, -3.0, 0.0, 1.0), (-6.0, -2.0, 0.0), (0.0, 0.02, 0.05))
    ]


FIGURES: dict[str, tuple[Callable[[], Json], Callable[[Json], list[Json]], Callable[[Json, Json], Json]]] = {
    "route": (route_data, route_states, route_case),
    "gates": (gates_data, gates_states, gates_case),
    "buckets": (buckets_data, buckets_states, buckets_case),
    "losses": (losses_data, losses_states, losses_case),
    "bias": (bias_data, bias_states, bias_case),
    "cost": (cost_data, cost_states, cost_case),
    "layer": (layer_data, layer_states, layer_case),
    "granularity": (granularity_data, granularity_states, granularity_case),
    "lamp": (lamp_data, lamp_states, lamp_case),
    "scrubber": (measured.scrubber_data, measured.scrubber_states, measured.scrubber_case),
    "gradients": (passes.gradients_data, passes.gradients_states, passes.gradients_case),
    "dispatch": (passes.dispatch_data, passes.dispatch_states, passes.dispatch_case),
    "crossings": (passes.crossings_data, passes.crossings_states, passes.crossings_case),
    "ladder": (rungs.ladder_data, rungs.ladder_states, rungs.ladder_case),
}
"""Name → (data, states to compare, what Python computes for one of them)."""


def shown(name: str, **state: Any) -> Json:
    """What a figure computes in a state, for the sentences beside it."""
    data, _, case = FIGURES[name]
    return case(state, data())


def golden(name: str) -> Json:
    """The data of a figure, and Python's result for each of its states: what the JavaScript is compared with."""
    data, states, case = FIGURES[name]
    given = data()
    return {"data": given, "cases": [{"state": state, "expected": case(state, given)} for state in states(given)]}


def to_json(value: Any) -> str:
    """JSON of nested lists, numbers and NumPy arrays."""
    return json.dumps(value, default=lambda array: array.tolist(), ensure_ascii=False)


def draw(node: str, names: list[str]) -> dict[str, str]:
    """Each figure as it opens, drawn by its own JavaScript under node."""
    given = to_json({name: FIGURES[name][0]() for name in names})
    done = subprocess.run([node, TOOLS / "prerender.mjs"], input=given, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"node could not draw the figures:\n{done.stderr}")
    return {name: element(name, body) for name, body in json.loads(done.stdout).items()}


def element(name: str, body: str) -> str:
    """The custom element of a figure: its data, and the picture that stays where scripts are off.

    The data are an attribute: instant navigation runs every script element of a page, JSON or not.
    """
    data = html.escape(to_json(FIGURES[name][0]()))
    return (
        f'<div class="moe-figure" id="figure-{name}" data-search-exclude><moe-figure name="{name}" data-given="{data}">'
        f'<div class="moe-body">{body}</div></moe-figure></div>'
    )


def placeholder(name: str) -> str:
    """Stands for a figure where only the text of a page matters. Raises ValueError for an unknown figure."""
    if name not in FIGURES:
        raise ValueError(f"no figure {name!r}; known: {', '.join(FIGURES)}")
    return f'<div class="moe-figure" id="figure-{name}"></div>'
