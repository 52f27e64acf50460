"""Where the parameters of a published model are, and how many of them one token meets: a bar for each, and the table of components."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from layout import markdown

from reference import presets
from reference.cost import Parameters, model_parameters, sum_parameters

KINDS = {"routed experts": "moe-e0", "shared experts": "moe-e1", "dense networks": "moe-e3", "all else": "moe-e2"}
"""What the bars tell apart → its colour."""
KIND_OF = {"routed_experts": "routed experts", "shared_experts": "shared experts", "dense_ffn": "dense networks"}
WHOLE = 31
"""Letters of all names of models in the head of a table up to which they stay whole: more do not fit on a phone."""
UNITS = ((1e9, "B"), (1e6, "M"), (1e3, "K"), (1, ""))


def scaled(count: float) -> str:
    """A number of parameters in the unit that suits it; B is 10⁹."""
    if not count:
        return "–"
    size, unit = next((size, unit) for size, unit in UNITS if count >= size)
    return f"{count / size:,.1f}\u00a0{unit}".rstrip("\u00a0")


def of_kind(parts: dict[str, Parameters]) -> dict[str, Parameters]:
    """The components of a model summed by kind, those that it has."""
    named = {kind: [count for part, count in parts.items() if KIND_OF.get(part, "all else") == kind] for kind in KINDS}
    summed = {kind: Parameters(sum(one.total for one in counts), sum(one.active for one in counts)) for kind, counts in named.items()}
    return {kind: count for kind, count in summed.items() if count.total}


def bar(counts: dict[str, float], widest: float) -> str:
    """The kinds side by side; `widest` fills the page."""
    pieces = (f'<span class="{KINDS[kind]}" style="width:{100 * count / widest:.3f}%"></span>' for kind, count in counts.items() if count)
    return f'<div class="moe-part-bar">{"".join(pieces)}</div>'


def bars(names: list[str]) -> str:
    """Stored and met parameters of each preset, all on one scale."""
    models = {name: of_kind(model_parameters(presets.model(name))) for name in names}
    sums = {name: sum_parameters(kinds) for name, kinds in models.items()}
    widest = max(total for total, _ in sums.values())
    rows = []
    for name, (total, active) in sums.items():
        share = f"{100 * active / total:.1f}\u00a0%"
        rows += [
            f'<p><code>{name}</code> stores {scaled(total)}, <span class="moe-joined">a token meets {scaled(active)}, {share}</span></p>',
            bar({kind: count.total for kind, count in models[name].items()}, widest),
            bar({kind: count.active for kind, count in models[name].items()}, widest),
        ]
    shown = [kind for kind in KINDS if any(kind in kinds for kinds in models.values())]
    key = "".join(f'<li><span class="moe-mark {KINDS[kind]}" aria-hidden="true">■</span> {kind}</li>' for kind in shown)
    return f'<div class="moe-parts">{"".join(rows)}<ul>{key}</ul></div>'


def table(names: list[str]) -> str:
    """Parameters by component of every preset."""
    models = {name: model_parameters(presets.model(name)) for name in names}
    sums = {name: sum_parameters(parts) for name, parts in models.items()}
    used = [part for part in next(iter(models.values())) if any(parts[part].total for parts in models.values())]
    rows = [[part.replace("_", " "), *(scaled(models[name][part].total) for name in names)] for part in used]
    rows.append(["**total**", *(f"**{scaled(sums[name].total)}**" for name in names)])
    rows.append(["**active for a token**", *(f"**{scaled(sums[name].active)}**" for name in names)])
    whole = "{ .moe-joined }" if sum(map(len, names)) <= WHOLE else ""
    return markdown(["parameters", *(f"`{name}`{whole}" for name in names)], rows)


STORED_LABELS = {
    "dense": ("dense", "above"), "shazeer-2017": ("2017", "above"), "soft-moe-s16-128": ("Soft MoE", "left"),
    "olmoe-1b-7b": ("OLMoE", "above"), "mixtral-8x7b": ("Mixtral", "above"), "gpt-oss-120b": ("gpt-oss", "right"),
    "deepseek-v3": ("DeepSeek-V3", "right"),
    "glam-64b-64e": ("GLaM", "right"), "gshard-600b": ("GShard", "over"), "switch-c-2048": ("Switch-C", "right"),
}  # fmt: skip
SHARE_LABELS = {
    "dense": ("dense", "right"), "shazeer-2017": ("2017", "right"), "mixtral-8x7b": ("Mixtral", "left"),
    "llama4-scout": ("Llama 4 Scout", "left"), "longcat-flash": ("LongCat", "right"), "gshard-600b": ("GShard", "left"),
    "switch-c-2048": ("Switch-C", "left"),
}  # fmt: skip
"""Presets with a label in the two pictures → (label, on which side of the point)."""
SIDES = {"right": (7, -4, "left"), "left": (-7, -4, "right"), "above": (-3, 6, "right"), "over": (0, 7, "center")}
"""Side → (how far from the point, how aligned). What is above stands to the left, for the lines of equal share rise."""
SHARES = (100, 10, 1, 0.1)


def dots(axes: Any, places: Mapping[str, tuple[float, float]], labels: dict[str, tuple[str, str]], colors: Sequence[str]) -> None:
    """A point for every preset, larger and with a label for the named ones."""
    for name, (x, y) in places.items():
        if name not in labels:
            axes.plot([x], [y], "o", color=colors[1], markersize=3)
            continue
        label, side = labels[name]
        axes.plot([x], [y], "o", color=colors[0], markersize=6, zorder=3)
        right, up, align = SIDES[side]
        axes.annotate(label, (x, y), xytext=(right, up), textcoords="offset points", ha=align)


def draw_shares(axes: Any, ends: tuple[float, float], top: float, faint: str, ink: str) -> None:
    """A line along which the share that a token meets is the same, for each of SHARES, named where it leaves the picture."""
    for share in SHARES:
        axes.plot(ends, [x * share / 100 for x in ends], color=faint, linewidth=1, zorder=0)
        x = min(ends[1], top * 100 / share)
        align = "right" if x == ends[1] else "left"
        below = {"right": (-2, -26), "left": (4, -11)}[align]
        axes.annotate(f"{share:g} %", (x, x * share / 100), xytext=below, textcoords="offset points", ha=align, color=ink, fontsize=9)


def draw_stored(axes: Any, sums: Mapping[str, Parameters], colors: Sequence[str], ink: str, faint: str) -> None:
    """Stored and met parameters of every preset, over the lines of equal share."""
    ends, top = (0.06, 20000), 300
    axes.set(xlabel="10⁹ parameters that are stored", xlim=ends, ylim=(0.012, top))
    axes.set(xscale="log", yscale="log", xticks=(0.1, 1, 10, 100, 1000), yticks=(0.1, 1, 10, 100))
    axes.minorticks_off()
    axes.set_xticklabels([f"{tick:,g}" for tick in axes.get_xticks()])
    axes.set_yticklabels([f"{tick:g}" for tick in axes.get_yticks()])
    draw_shares(axes, ends, top, faint, ink)
    dots(axes, {name: (total / 1e9, active / 1e9) for name, (total, active) in sums.items()}, STORED_LABELS, colors)


def draw_met(axes: Any, shares: Mapping[str, float], colors: Sequence[str]) -> None:
    """The share that a token meets over the number of experts, of every preset."""
    axes.set(xlabel="experts in a layer", xlim=(0.7, 8000), ylim=(0.06, 200))
    axes.set(xscale="log", yscale="log", xticks=(1, 8, 64, 512), yticks=SHARES)
    axes.minorticks_off()
    axes.set_xticklabels([f"{tick:g}" for tick in axes.get_xticks()])
    axes.set_yticklabels([f"{tick:g} %" for tick in SHARES])
    dots(axes, {name: (presets.get(name).experts.count, share) for name, share in shares.items()}, SHARE_LABELS, colors)


def picture(
    panels: Callable[..., list[Any]], colors: Sequence[str], ink: str, faint: str, *, experts: bool = True
) -> tuple[list[Any], str]:
    """Stored and met parameters of every preset and, where `experts` are asked for, the share over their number."""
    sums = {name: sum_parameters(model_parameters(presets.model(name))) for name in presets.names()}
    shares = {name: 100 * active / total for name, (total, active) in sums.items()}
    titles = ["10⁹ parameters that a token meets", "share that a token meets"]
    made = panels(*titles[: 1 + experts], width=4.6, height=3.9)
    draw_stored(made[0], sums, colors, ink, faint)
    if experts:
        draw_met(made[1], shares, colors)
    low, high = min(shares.values()), max(shares.values())
    return made, f"Every published model as a point: what it stores, and what a token meets of it, from {low:.1f} to {high:.0f} percent."
