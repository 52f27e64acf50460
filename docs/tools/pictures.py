"""The idea of a published layer as a picture, drawn from its preset: how the router chooses, whom a token meets, how answers are joined."""

from __future__ import annotations

import html
import math
from collections.abc import Callable

from reference import MoEConfig
from reference.config import CapacityConfig, GatingConfig

SHOWN = 256  # boxes; a layer with more experts says how many there are
COLUMNS = 32
BOX, GAP = 11, 7

CHOICES: dict[str, Callable[[GatingConfig, int], str]] = {
    "top_k": lambda gating, count: f"the {gating.top_k} highest of {count}" if gating.top_k > 1 else f"the highest of {count}",
    "gumbel": lambda gating, count: f"{gating.top_k} of {count} drawn at random, by their scores",
    "hash": lambda gating, count: f"{gating.top_k} of {count}, looked up by the token's id",
    "balanced": lambda gating, count: f"one of {count}, so that each gets equally many",
    "sinkhorn": lambda gating, count: f"{gating.top_k} of {count}, after the scores were balanced",
    "expert_choice": lambda gating, count: f"each of {count} experts takes its best tokens; a token meets {gating.top_k} on average",
    "positive": lambda gating, count: f"all with a score above 0; {gating.top_k} of {count} on average",
    "soft": lambda gating, count: f"none: each of {count} experts gets mixtures of all tokens",
}
"""How the choice reads, by `gating.choice`; a test holds that none is missing."""

GATES = {"none": "the scores", "sum": "divided by their sum", "softmax": "a softmax over the chosen"}
INPUT_GATES = "multiplied onto the experts' inputs"
GROUPS = {"max": "groups: the best expert counts", "top2_sum": "groups: the two best experts count"}
SHARED = {
    "none": "shared output added", "sigmoid": "shared output added, times a sigmoid", "softmax": "routed and shared share one softmax",
}  # fmt: skip
ACTIVATIONS = {
    "relu": "ReLU", "gelu": "GELU", "relu2": "squared ReLU", "swiglu": "SwiGLU", "geglu": "GEGLU", "clamped_swiglu": "clamped SwiGLU",
}  # fmt: skip


def router_lines(config: MoEConfig) -> list[str]:
    """What happens to a token before its experts."""
    gating = config.gating
    limit = [f"only {gating.top_groups} of {gating.groups} groups"] if gating.top_groups < gating.groups else []
    choice = f"choice: {CHOICES[gating.choice](gating, config.experts.count)}"
    return [f"scores: {config.scores.function.replace('_', '-')}", *limit, choice, *special_lines(config)]


def special_lines(config: MoEConfig) -> list[str]:
    """What a router has beside its scores, its choice and its gates."""
    scores, gating = config.scores, config.gating
    lines = {
        "noise in training": scores.noise != "none" or scores.logit_noise != "none",
        "a bias steers the choice, not the gate": gating.correction_bias,
        "a weak second choice is skipped at random": gating.second_choice == "random",
    }
    return [line for line, present in lines.items() if present]


def capacity_line(capacity: CapacityConfig) -> str:
    """How many places an expert has."""
    if capacity.formula == "none":
        return "no capacity, nothing is dropped"
    share = "the even share" if capacity.formula == "per_assignment" else "tokens / experts"
    return f"places: {capacity.factor:g} × {share}"


def joining_lines(config: MoEConfig) -> list[str]:
    """What happens to the experts' answers."""
    gating, experts = config.gating, config.experts
    gates = "weights of the mixture" if gating.choice == "soft" else f"gates are {GATES[gating.normalize]}"
    scale = f", × {gating.scale:g}" if gating.scale != 1 else ""
    where = INPUT_GATES if experts.gate_inputs else "weighted sum"
    lines = [gates + scale, where]
    return [*lines, SHARED[experts.shared_gate]] if experts.shared else lines


def met(config: MoEConfig, shown: int) -> set[int]:
    """Boxes that one token meets, spread over as many groups as it may reach; a drawing, not a routing."""
    gating = config.gating
    if gating.choice == "soft":
        return set(range(shown))
    size = max(1, shown // gating.groups)
    reachable = [group * gating.groups // gating.top_groups for group in range(gating.top_groups)]
    ids = [group * size + place for group in reachable for place in range(size)]
    count = min(gating.top_k, len(ids))
    return {ids[(2 * i + 1) * len(ids) // (2 * count)] for i in range(count)}


def experts_svg(config: MoEConfig) -> str:
    """Every routed expert a box, groups apart, those without a network dashed, the shared ones below."""
    experts, gating = config.experts, config.gating
    shown = min(experts.count, SHOWN)
    chosen, size = met(config, shown), max(1, shown // gating.groups)
    networks = shown - sum(count for _, count in experts.zero_computation) if shown == experts.count else shown
    boxes: dict[str, str] = {}
    y = 0

    def draw(column: int, top: int, kind: str) -> None:
        boxes[kind] = boxes.get(kind, "") + f"M{column * BOX + 1} {top + 1}h{BOX - 2}v{BOX - 2}h{2 - BOX}z"

    for first in range(0, shown, size):
        columns = min(COLUMNS, size)
        for i in range(size):
            kind = "moe-fill moe-e0" if first + i in chosen else "moe-slot" if first + i < networks else "moe-slot moe-blank"
            draw(i % columns, y + i // columns * BOX, kind)
        y += math.ceil(size / columns) * BOX + (GAP if gating.groups > 1 else 0)
    if experts.shared:
        y += GAP if gating.groups == 1 else 0
        for i in range(experts.shared):
            draw(i, y, "moe-fill moe-e1")
        y += BOX
    width = min(COLUMNS, max(size, experts.shared)) * BOX
    paths = "".join(f'<path class="{kind}" d="{path}"/>' for kind, path in boxes.items())
    return f'<svg viewBox="0 0 {width} {y}" style="width:{max(3, width / 18):.1f}rem" aria-hidden="true">{paths}</svg>'


def expert_lines(config: MoEConfig) -> list[str]:
    """How many experts there are, and of what kind."""
    experts = config.experts
    lines = [f"{experts.networks} of width {experts.width:,}, {ACTIVATIONS[experts.activation]}"]
    lines += [f"{count} that compute nothing ({kind})" for kind, count in experts.zero_computation]
    lines += [f"{experts.shared} shared, of width {experts.total_shared_width:,} in all"] if experts.shared else []
    lines += [f"(the first {SHOWN} are drawn)"] if experts.count > SHOWN else []
    return [*lines, capacity_line(config.capacity)]


def idea(config: MoEConfig) -> str:
    """The picture as HTML: three boxes side by side, below each other where the page is narrow."""

    def card(title: str, lines: list[str], drawing: str = "") -> str:
        told = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
        return f'<div class="moe-card"><strong>{title}</strong>{drawing}<ul>{told}</ul></div>'

    cards = [
        card("router", router_lines(config)),
        card("experts", expert_lines(config), experts_svg(config)),
        card("output", joining_lines(config)),
    ]
    arrow = '<span class="moe-arrow" aria-hidden="true">→</span>'
    return f'<div class="moe-idea">{arrow.join(cards)}</div>'
