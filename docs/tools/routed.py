"""The same tokens under every published rule: one set of logits goes through a small copy of each layer, and the routing is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache

import numpy as np

from reference import MoEConfig, init_params, presets, route
from reference.config import ExpertsConfig, GatingConfig
from reference.layer import update_bias
from reference.routing import Routing

TOKENS, EXPERTS = 16, 8
IDS = np.array([0, 1, 2, 3, 0, 4, 5, 6, 1, 2, 7, 0, 3, 6, 5, 2])  # words come back, so that a hash can be seen
BIAS_STEPS, BIAS_RATES = 400, {"sign": 0.005, "proportional": 0.02}
BLEND = "1991"
CELL, RADIUS, GAP, UNIT = 13, 5.8, 5, 4.5


@lru_cache(maxsize=1)
def logits() -> np.ndarray:
    """[TOKENS, EXPERTS]: what a word is, what its place adds, and experts that are liked more or less by all."""
    rng = np.random.default_rng(4)
    word_VE, place_TE = 1.1 * rng.normal(size=(EXPERTS, EXPERTS)), 0.7 * rng.normal(size=(TOKENS, EXPERTS))
    return word_VE[IDS] + place_TE + rng.permutation(np.linspace(-0.9, 0.9, EXPERTS))


def small(name: str) -> MoEConfig:
    """The preset at its small size; `BLEND` is the gate of 1991, which trusts every expert a little."""
    if name != BLEND:
        return presets.tiny(name)
    return MoEConfig(TOKENS, gating=GatingConfig(top_k=EXPERTS), experts=ExpertsConfig(EXPERTS, EXPERTS))


def routing(config: MoEConfig) -> Routing:
    """What the layer decides in training. A bias is first moved until it has evened the load; ReLU's logits are lowered until a
    token has K experts on average, as training would lower them."""
    experts, chosen = config.experts.count, config.gating.top_k
    logits_TE = logits()[:, :experts]
    if config.gating.choice == "positive":
        logits_TE = logits_TE - np.sort(logits_TE, axis=None)[-chosen * TOKENS - 1]
    params = init_params(config, np.random.default_rng(0))
    if "router.weight" in params:
        weight_ED = np.zeros((experts, config.d_model))
        weight_ED[:, :TOKENS] = logits_TE.T
        params["router.weight"] = weight_ED.reshape(params["router.weight"].shape)

    def decide() -> Routing:
        return route(np.eye(TOKENS, config.d_model), params, config, training=True, rng=np.random.default_rng(1), token_ids=IDS)

    if config.gating.correction_bias:
        moving = replace(config, balance=replace(config.balance, bias_rate=BIAS_RATES[config.balance.bias_rule]))
        for _ in range(BIAS_STEPS):
            params["router.correction_bias"] = update_bias(params["router.correction_bias"], decide().load, moving)
    return decide()


def decided(config: MoEConfig) -> tuple[object, ...]:
    """What the drawing of a layer tells; equal where two layers route alike."""
    found = routing(config)
    gate_TK = (found.gate / config.gating.scale).round(6)
    return (*(array.tobytes() for array in (found.expert, found.keep, gate_TK)), config.experts.shared > 0)


def refused(found: Routing, config: MoEConfig) -> np.ndarray:
    """[T, K]: chosen, but not kept. Where experts or the sign of a score choose, what is not kept was not chosen."""
    own = found.expert.shape[1] == config.gating.top_k and config.gating.choice != "expert_choice"
    return ~found.keep if own else np.zeros_like(found.keep)


def rows_y(config: MoEConfig) -> list[float]:
    """The middle of every expert's row, groups apart, shared experts below."""
    size = max(1, config.experts.count // config.gating.groups)
    routed = [CELL * (e + 0.5) + GAP * (e // size) for e in range(config.experts.count)]
    return [*routed, *(routed[-1] + GAP + CELL * (i + 1) for i in range(config.experts.shared))]


def marks(found: Routing, config: MoEConfig, y: list[float]) -> Iterator[tuple[str, str]]:
    """(class, element) of every disc and cross; the area of a disc is its gate."""
    gone = refused(found, config)
    for t, k in np.argwhere(found.keep | gone).tolist():
        x, row = CELL * (t + 0.5), y[found.expert[t, k]]
        if gone[t, k]:
            yield "moe-line moe-lost", f'<path d="M{x - 3:g} {row - 3:g}l6 6m0-6l-6 6"/>'
        else:
            radius = max(1.0, RADIUS * min(1.0, found.gate[t, k] / config.gating.scale) ** 0.5)
            yield "moe-fill moe-e0", f'<circle cx="{x:g}" cy="{row:g}" r="{radius:.1f}"/>'
    for row in y[config.experts.count :]:
        for t in range(TOKENS):
            yield "moe-fill moe-e1", f'<circle cx="{CELL * (t + 0.5):g}" cy="{row:g}" r="{RADIUS}"/>'


def bars(found: Routing, config: MoEConfig, y: list[float]) -> Iterator[tuple[str, str]]:
    """(class, element) of the bars at the right: the assignments that an expert keeps, behind them those that it refused."""
    kept = np.bincount(found.expert[found.keep], minlength=config.experts.count)
    gone = np.bincount(found.expert[refused(found, config)], minlength=config.experts.count)
    for row, count, more in zip(y, kept.tolist(), gone.tolist(), strict=False):
        start = CELL * TOKENS + 8
        yield "moe-fill moe-e0", f'<path d="M{start} {row - 4:g}h{UNIT * count:g}v8h{-UNIT * count:g}z"/>' if count else ""
        yield "moe-over", f'<path d="M{start + UNIT * count:g} {row - 3.5:g}h{UNIT * more:g}v7h{-UNIT * more:g}z"/>' if more else ""


def svg(config: MoEConfig) -> str:
    """Tokens from left to right, experts from top to bottom, the load at the right."""
    found, y = routing(config), rows_y(config)
    lines = "".join(f"M0 {row:g}h{CELL * TOKENS}" for row in y[: config.experts.networks])
    blank = "".join(f"M0 {row:g}h{CELL * TOKENS}" for row in y[config.experts.networks : config.experts.count])
    drawn: dict[str, str] = {}
    for kind, element in (*marks(found, config, y), *bars(found, config, y)):
        drawn[kind] = drawn.get(kind, "") + element
    parts = [f'<path class="moe-axis" d="{lines}"/>', f'<path class="moe-axis moe-blank" d="{blank}"/>' if blank else ""]
    parts += [f'<g class="{kind}">{elements}</g>' for kind, elements in drawn.items() if elements]
    size = f"{CELL * TOKENS + 8 + UNIT * TOKENS:g} {y[-1] + CELL / 2:g}"
    return f'<svg class="moe-routed" viewBox="0 0 {size}" aria-hidden="true">{"".join(parts)}</svg>'


def picture(name: str) -> str:
    """The drawing alone, for a gallery."""
    return svg(small(name))


def told(config: MoEConfig) -> list[tuple[str, str]]:
    """(kind of mark, what it means) of everything that the drawing shows, for who reads it and for who does not see it."""
    found = routing(config)
    gone = refused(found, config)
    load = np.bincount(found.expert[found.keep], minlength=config.experts.count)
    why = "refused, or skipped by lot" if config.gating.second_choice == "random" else "refused, the expert is full"
    even = f"every expert gets {load.min()} tokens" if load.min() == load.max() else f"an expert gets {load.min()} to {load.max()} tokens"
    if config.gating.choice == "soft":
        return [("sent", "what a token gets of an expert; the area is the share"), ("load", "every expert gets a mixture of all tokens")]
    networks = " of the networks" if config.experts.zero_computation else ""
    lines = [("sent", "a token goes to an expert; area: its gate")]
    lines += [("refused", f"{why}: {gone.sum()} of {gone.size}; dashed at the bars")] if gone.any() else []
    lines += [("to all", "shared experts see every token")] if config.experts.shared else []
    lines += [("no network", "a row without a network")] if config.experts.zero_computation else []
    lines += [("load", even if len(load) > 1 else f"it gets all {load[0]} tokens")]
    lines += [("", f"The bias has been moved until it had evened the load{networks}.")] if config.gating.correction_bias else []
    lines += [("", "The logits were lowered to K experts on average, as the penalty does.")] if config.gating.choice == "positive" else []
    return lines
