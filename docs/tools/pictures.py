"""The idea of a published layer as a picture, drawn from its preset: how the router chooses, whom a token meets, how answers are joined."""

from __future__ import annotations

import html
import math
import random
from collections.abc import Callable, Iterable

import routed

from reference import MoEConfig
from reference.config import CapacityConfig, GatingConfig

COLUMNS, MANY = 32, 256  # boxes in a row; twice as many in a layer with more experts than MANY
BOX, GAP = 11, 7

CHOICES: dict[str, Callable[[GatingConfig, int], str]] = {
    "top_k": lambda gating, count: f"takes the {f'{gating.top_k} highest' if gating.top_k > 1 else 'highest'} of {count:,}",
    "gumbel": lambda gating, count: f"takes {gating.top_k} of {count:,} drawn at random, by their scores",
    "hash": lambda gating, count: f"takes {gating.top_k} of {count:,}, looked up by the token's id",
    "balanced": lambda gating, count: f"takes one of {count:,}, so that each gets equally many",
    "sinkhorn": lambda gating, count: f"takes {gating.top_k} of {count:,}, after the scores were balanced",
    "expert_choice": lambda gating, count: f"each of {count:,} experts takes its best tokens; a token meets {gating.top_k} on average",
    "positive": lambda gating, count: f"takes all with a score above 0; {gating.top_k} of {count:,} on average",
    "soft": lambda gating, count: f"nothing is chosen: each of {count:,} experts gets mixtures of all tokens",
}
"""How the choice reads, by `gating.choice`; a test holds that none is missing."""

SCORES = {"identity": "the logits", "sqrt_softplus": "√softplus", "relu": "ReLU of the logits"}
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
    limit = [f"looks into {gating.top_groups} of {gating.groups} groups"] if gating.top_groups < gating.groups else []
    choice = CHOICES[gating.choice](gating, config.experts.count)
    ignored = gating.choice == "hash" and gating.top_k == 1 and gating.normalize != "none"  # a single gate divided by itself
    return [*([] if ignored else [f"scores: {score_function(config)}"]), *limit, choice, *special_lines(config)]


def score_function(config: MoEConfig) -> str:
    """The score function as a reader calls it."""
    return SCORES.get(config.scores.function, config.scores.function)


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
    certain = gating.top_k == 1 and gating.normalize != "none"
    gates = "the gate is always 1" if certain else f"gates are {GATES[gating.normalize]}"
    gates = "weights are a softmax over the slots" if gating.choice == "soft" else gates
    scale = f", × {gating.scale:g}" if gating.scale != 1 else ""
    where = INPUT_GATES if experts.gate_inputs else "weighted sum"
    lines = [gates + scale, where]
    return [*lines, SHARED[experts.shared_gate]] if experts.shared else lines


def met(config: MoEConfig) -> set[int]:
    """Boxes that one token meets, one in each of as many equal parts of what it may reach; a drawing, not a routing."""
    gating, count = config.gating, config.experts.count
    if gating.choice == "soft":
        return set(range(count))
    size = max(1, count // gating.groups)
    reachable = [group * gating.groups // gating.top_groups for group in range(gating.top_groups)]
    ids = [group * size + place for group in reachable for place in range(size)]
    chosen, place = min(gating.top_k, len(ids)), random.Random(count)
    return {ids[place.randrange(i * len(ids) // chosen, (i + 1) * len(ids) // chosen)] for i in range(chosen)}


def experts_svg(config: MoEConfig) -> str:
    """Every routed expert a box, groups apart, those without a network dashed, the shared ones below."""
    experts, gating = config.experts, config.gating
    chosen, size = met(config), max(1, experts.count // gating.groups)
    columns = min(COLUMNS if experts.count <= MANY else 2 * COLUMNS, size)
    boxes: dict[str, str] = {}
    y = 0

    def draw(column: int, top: int, kind: str) -> None:
        boxes[kind] = boxes.get(kind, "") + f"M{column * BOX + 1} {top + 1}h{BOX - 2}v{BOX - 2}h{2 - BOX}z"

    for first in range(0, experts.count, size):
        for i in range(size):
            idle = "moe-fill moe-idle" if first + i < experts.networks else "moe-slot moe-blank"
            draw(i % columns, y + i // columns * BOX, "moe-fill moe-e0" if first + i in chosen else idle)
        y += math.ceil(size / columns) * BOX + (GAP if gating.groups > 1 else 0)
    if experts.shared:
        y += GAP if gating.groups == 1 else 0
        for i in range(experts.shared):
            draw(i, y, "moe-fill moe-e1")
        y += BOX
    width = max(columns, experts.shared) * BOX
    paths = "".join(f'<path class="{kind}" d="{path}"/>' for kind, path in boxes.items())
    return f'<svg viewBox="0 0 {width} {y}" style="width:{min(18, max(2, width / 18)):.1f}rem" aria-hidden="true">{paths}</svg>'


Told = Iterable[tuple[str, str]]
"""Lines of a card: (what the line explains of the drawing, one of `MARKS`, or nothing; the line)."""
MARKS = {
    "idle": ("■", "moe-idle"), "met": ("■", "moe-e0"), "shared": ("■", "moe-e1"), "blank": ("□", ""),
    "sent": ("●", "moe-e0"), "to all": ("●", "moe-e1"), "refused": ("×", "moe-lost"), "no network": ("┄", ""), "load": ("▬", "moe-e0"),
}  # fmt: skip


def expert_lines(config: MoEConfig) -> list[tuple[str, str]]:
    """How many experts there are, and of what kind."""
    experts = config.experts
    every = experts.count in (1, len(met(config)))
    lines = [("met" if every else "idle", f"{experts.networks:,} of width {experts.width:,}, {ACTIVATIONS[experts.activation]}")]
    lines += [] if every else [("met", "met by one token")]
    lines += [("blank", f"{count} without a network ({kind})") for kind, count in experts.zero_computation]
    lines += [("shared", f"{experts.shared} shared, of width {experts.total_shared_width:,} in all")] if experts.shared else []
    return [*lines, ("", capacity_line(config.capacity))]


def card(title: str, told: Told, drawing: str = "", kind: str = "") -> str:
    """A box with a title, a drawing and what it says."""

    def line(mark: str, text: str) -> str:
        sign, color = MARKS.get(mark, ("", ""))
        shown = f'<span class="moe-mark {color}" aria-hidden="true">{sign}</span> ' if sign else ""
        return f"<li>{shown}{html.escape(text)}</li>"

    lines = "".join(line(*one) for one in told)
    return f'<div class="moe-card {kind}"><strong>{title}</strong>{drawing}<ul>{lines}</ul></div>'


def chain(cards: list[str]) -> str:
    """Boxes with an arrow from each to the next."""
    arrow = '<span class="moe-arrow" aria-hidden="true">→</span>'
    return f'<div class="moe-idea">{arrow.join(cards)}</div>'


def idea(config: MoEConfig) -> str:
    """The layer as HTML: three boxes side by side, below each other where the page is narrow."""

    def plain(lines: list[str]) -> Told:
        return [("", line) for line in lines]

    cards = [
        card("router", plain(router_lines(config))),
        card("experts", expert_lines(config), experts_svg(config)),
        card("output", plain(joining_lines(config))),
    ]
    return chain(cards)


def at_work(names: list[str]) -> str:
    """The same tokens in the small copies of a page's presets, and what the drawings mean; what routes alike is drawn once."""
    alike = {routed.decided(routed.small(name)): name for name in reversed(names)}
    cards = []
    for name in (name for name in names if name in alike.values()):
        config = routed.small(name)
        rows = "1 expert (row)" if config.experts.count == 1 else f"{config.experts.count} experts (rows)"
        title = f"{routed.TOKENS} tokens (columns), {rows}"
        title = title if len(alike) == 1 else f"<code>{name}</code>: {title}"
        cards.append(card(title, routed.told(config), routed.svg(config), "moe-at-work"))
    return f'<div class="moe-idea">{"".join(cards)}</div>'
