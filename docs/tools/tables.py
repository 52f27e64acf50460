"""Tables and names for the pages, computed from the running example, the presets and the committed results."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

import byhand
import kernels
import measured
import native
import numpy as np
import origins
import pictures
import ranks
import routed
import rungs
import sources
import timings
from layout import digits, markdown, matrix

from reference import MoEConfig, cost, example, moe_forward, presets
from reference.architectures import RECIPES

OUTPUT, CACHE = moe_forward(example.inputs(), example.params(), example.CONFIG, training=True)
ROUTING = OUTPUT.routing


def billions(count: float) -> str:
    """A number of parameters in 10⁹."""
    return f"{count / 1e9:,.1f}" if count >= 1e8 else f"{count / 1e9:.2g}"


def sizes(name: str) -> cost.Parameters:
    """Parameters of a preset's whole model, total and active."""
    return cost.sum_parameters(cost.model_parameters(presets.model(name)))


NAMES: dict[str, Any] = {
    "np": np, "example": example, "output": OUTPUT, "routing": ROUTING, "words": example.WORDS, "experts": example.EXPERTS,
    "digits": digits, "matrix": matrix, "flips": lambda: flips(), "billions": billions, "sizes": sizes, "presets": presets,
    "made_by": measured.made_by, "measured": measured, "ranks": ranks, "kernels": kernels, "rungs": rungs,
    "timings": timings, "native": native, "routed": routed,
}  # fmt: skip
"""What sentences of every page can compute with."""


def example_inputs() -> str:
    """Words and their vectors."""
    x_TD = example.inputs()
    return markdown(["word", *example.EXPERTS], [[word, *(digits(v, 1) for v in x_TD[t])] for t, word in enumerate(example.WORDS)])


def example_scores() -> str:
    """Softmax scores, the chosen ones in bold."""
    rows = []
    for t, word in enumerate(example.WORDS):
        cells = [digits(score) for score in ROUTING.scores[t]]
        rows.append([word, *(f"**{cell}**" if e in ROUTING.expert[t] else cell for e, cell in enumerate(cells))])
    return markdown(["word", *example.EXPERTS], rows)


def example_assignments() -> str:
    """Who goes where with what gate, and who is dropped."""

    def cell(token: int, slot: int) -> str:
        name = example.EXPERTS[ROUTING.expert[token, slot]]
        return f"{name} {digits(ROUTING.gate[token, slot])}" if ROUTING.keep[token, slot] else f"~~{name}~~ dropped"

    return markdown(
        ["word", "first choice", "second choice"], [[w, cell(t, 0), cell(t, 1)] for t, w in enumerate(example.WORDS)], numbers=False
    )


def in_order_of_pages() -> list[str]:
    """Every preset, in the order in which the navigation lists the pages of their architectures."""
    pages = re.findall(r"architectures/(\w+)\.md", (sources.ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    return sorted(presets.names(), key=lambda name: pages.index(RECIPES[name].__module__.rpartition(".")[2]))


def preset_sizes() -> str:
    """Every preset: layers, experts, chosen, total and active parameters."""
    rows = []
    for name in in_order_of_pages():
        model, (total, active) = presets.model(name), sizes(name)
        experts, chosen = model.moe.experts, model.moe.gating.top_k
        shared = f" + {experts.shared}" if experts.shared else ""
        layers = "–".join(map(str, sorted(set(model.expert_counts)))) or experts.count
        routed = ("1", "1") if model.moe_every == 0 else (f"{layers}{shared}", f"{chosen}{shared}")
        rows.append([f"`{name}`", *routed, billions(total), billions(active), f"{100 * active / total:.1f} %"])
    return markdown(["model", "experts", "per token", "total, 10⁹", "active, 10⁹", "active share"], rows)


GRANULARITY = (
    "gshard-600b", "glam-64b-64e", "mixtral-8x7b", "openmoe-8b", "qwen2-57b-a14b", "deepseek-moe-16b", "olmoe-1b-7b", "deepseek-v2",
    "qwen3-235b-a22b", "gpt-oss-120b", "llama4-maverick", "deepseek-v3",
)  # fmt: skip


def granularity() -> str:
    """How finely published layers are cut: width, active width against D, and the number of combinations."""
    rows = []
    for name in GRANULARITY:
        layer = presets.model(name).moe
        stored, chosen = layer.experts, layer.gating.top_k
        active = (chosen * stored.width + stored.total_shared_width) / layer.d_model
        ways = math.log10(math.comb(stored.count, chosen))
        combinations = f"{math.comb(stored.count, chosen):,}" if ways < 6 else f"≈ 10^{ways:.0f}^"
        cells = (f"{chosen} of {stored.count}", stored.shared, f"{stored.width:,}", f"{active:.1f}", combinations)
        rows.append([f"`{name}`", *cells])
    return markdown(["layer", "chosen", "shared", "F", "active width / D", "combinations"], rows)


def router_row(config: MoEConfig) -> tuple[str, str, str]:
    """Scores, gates and what is special of a router that chooses the K highest scores."""
    gating = config.gating
    scores = pictures.score_function(config)
    scale = f", ×\N{NO-BREAK SPACE}{gating.scale:g}" if gating.scale != 1 else ""
    special = [
        *(["K = 1"] if gating.top_k == 1 else []),
        *([pictures.GROUPS[gating.group_score]] if gating.top_groups < gating.groups else []),
        *pictures.special_lines(config),
        *([f"gates {pictures.INPUT_GATES}"] if config.experts.gate_inputs else []),
    ]
    return scores, pictures.GATES[gating.normalize] + scale, "; ".join(special)


def routers() -> str:
    """Every published router that chooses the K highest scores, models whose settings read alike in one row."""
    alike: dict[tuple[str, str, str], list[str]] = {}
    for name in presets.names():
        config = presets.get(name)
        if config.gating.choice == "top_k" and config.experts.count > 1:
            alike.setdefault(router_row(config), []).append(name)
    rows = []
    for (scores, gates, special), names in alike.items():
        note = f'<span class="moe-note">{special}</span>' if special else ""
        rows.append([f"**{scores}** → {gates}{note}", " ".join(f"`{name}`" for name in names)])
    return markdown(["scores → gates", "models"], rows, numbers=False)


COUNTED = {
    "first_choice_balance": "first choices",
    "expert_balance": "all K choices, ÷ K",
    "sequence_balance": "all K choices, ÷ K, in each sequence",
    "device_balance": "choices of all experts of a device",
    "communication_balance": "tokens that are sent to a device",
    "heterogeneous_balance": "choices, of which networks may have more or fewer than other experts",
    "router_z": "nothing, it is the z-loss",
    "importance": "nothing, the sums of gates are evened",
    "smooth_load": "choices to be expected under the noise",
    "gate_l1": "all choices, ÷ K; in P's place are the gates",
}
"""What f is in each loss of `balancing.LOSSES`; a test holds that none is missing."""


def balance_losses() -> str:
    """Every loss that a preset sets: what it counts, and who gives it which weight."""
    weights: dict[str, dict[float, list[str]]] = {}
    for name in presets.names():
        for loss, weight in presets.get(name).balance.losses:
            weights.setdefault(loss, {}).setdefault(weight, []).append(f"`{name}`")
    rows = []
    for loss, counted in COUNTED.items():
        told = [f"{weight:g}: {' '.join(names)}" for weight, names in sorted(weights.get(loss, {}).items(), reverse=True)]
        rows += [[f'`{loss}`<span class="moe-note">{counted}</span>', "<br>".join(told)]] if told else []
    return markdown(["loss, and what f counts", "weight: models"], rows, numbers=False)


def flips() -> str:
    """In a sentence: tokens of the committed parity run whose choice rounding changed, and of how many comparisons."""
    rows = [row for row in measured.result("parity")["rows"] if row["dtype"] != "float64" and row["verdict"] != "cannot"]
    return f"{sum(row['flips'] for row in rows)} tokens in all {len(rows)} comparisons of float32 and bfloat16"


def parity() -> str:
    """How far the writings of each layer are from the NumPy layer, from the committed results."""
    results = json.loads((sources.ROOT / "docs/results/status.json").read_text(encoding="utf-8"))
    rows = []
    for entry in results["rows"]:
        cells = [entry["recipe"]["forward"], entry["autograd"]["forward"], entry["autograd"]["gradient"]]
        rows.append([f"`{entry['preset']}`", *(f"{cell['max']:.0e}" if cell["max"] else "0" for cell in cells)])
    return markdown(["preset", "recipe", "PyTorch", "PyTorch, gradients"], rows)


TABLES: dict[str, Callable[[], str]] = {
    "example-inputs": example_inputs,
    "example-scores": example_scores,
    "example-assignments": example_assignments,
    "layer-by-hand": byhand.layer,
    "register-tile": native.tile_picture,
    "preset-sizes": preset_sizes,
    "granularity": granularity,
    "routers": routers,
    "balance-losses": balance_losses,
    "parity": parity,
    "collapse": measured.collapse,
    "collapse-claims": partial(measured.claims, "collapse"),
    "drop-by-position": measured.drop_by_position,
    "drop-claims": partial(measured.claims, "drop-by-position"),
    "bias-control": measured.bias_control,
    "bias-claims": partial(measured.claims, "bias-control"),
    "specialization-claims": partial(measured.claims, "specialization"),
    "information": measured.informations,
    "overlaps": measured.overlaps,
    "masked": measured.masked,
    "agreements": measured.agreements,
    "beginnings": origins.table,
    "beginnings-claims": partial(measured.claims, "beginnings"),
    "expert-parallel": ranks.steps,
    "lost-ranks": ranks.lost_ranks,
    "disagreements": ranks.disagreements,
    "ladder": rungs.table,
    **kernels.TABLES,
    **timings.TABLES,
}


def get(name: str) -> str:
    """The table of this name. Raises ValueError with the known names."""
    if name not in TABLES:
        raise ValueError(f"no table {name!r}; known: {', '.join(TABLES)}")
    return TABLES[name]()
