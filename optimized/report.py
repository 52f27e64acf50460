"""The tour's results as one HTML file that asks nobody for anything: its style and its pictures (SVG) are inside it."""

from __future__ import annotations

import math
import platform
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib.metadata import version
from typing import Any

from .comparison import plain

STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --card: #ffffff; --text: #1d1d1b; --soft: #65645f; --line: #e2e1dc;
  --c0: #2a78d6; --c1: #c2570c; --c2: #1f8a5f; --c3: #8a4fc7; --good: #1f7a4d; --bad: #c02626; }
@media (prefers-color-scheme: dark) { :root { --page: #161615; --card: #1f1f1d; --text: #ecebe6; --soft: #a3a29b; --line: #3a3935;
  --c0: #6ba8f0; --c1: #f0954c; --c2: #5cc79b; --c3: #c19af0; --good: #5cc79b; --bad: #ff7b72; } }
* { box-sizing: border-box }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
main { max-width: 60rem; margin: 0 auto; padding: 2.5rem 1.25rem 4rem }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; letter-spacing: -.01em }
h2 { font-size: 1.2rem; margin: 2.6rem 0 .5rem }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem }
p { margin: .4rem 0 .8rem; max-width: 46rem; overflow-wrap: anywhere }
figure { margin: 1rem 0 }
.soft, figcaption { color: var(--soft); font-size: .9rem }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: 1rem 1.1rem; overflow-x: auto }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }
th { text-align: left; font-weight: 600; color: var(--soft) }
th, td { padding: .28rem 1.1rem .28rem 0; border-bottom: 1px solid var(--line); white-space: nowrap }
tr:last-child td { border-bottom: 0 }
td.n, th.n { text-align: right }
summary { cursor: pointer; color: var(--soft); font-size: .9rem; margin-top: .6rem }
.equal { color: var(--good) } .yardstick { color: var(--c0) } .cannot { color: var(--soft) }
.broken { color: var(--bad); font-weight: 700 }
svg { display: block; max-width: 100%; height: auto }
svg text { fill: var(--soft); font-size: 12px; font-family: inherit }
svg .grid { stroke: var(--line) } svg .name { fill: var(--text) }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: .85rem/1.45 ui-monospace, SFMono-Regular, Menlo, monospace; margin: .2rem 0 }
pre b { font-weight: 400; color: var(--soft) }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(24rem, 100%), 1fr)); gap: 1rem }
"""


def tag(name: str, content: str = "", /, **attributes: Any) -> str:
    """One element; `content` is markup, attribute values are escaped."""
    written = "".join(f' {key.rstrip("_").replace("_", "-")}="{escape(str(value))}"' for key, value in attributes.items())
    return f"<{name}{written}>{content}</{name}>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numbers: Sequence[int] = ()) -> str:
    """A table of ready markup; the columns of `numbers` stand to the right."""

    def cells(kind: str, row: Sequence[str]) -> str:
        return "".join(tag(kind, cell, class_="n") if place in numbers else tag(kind, cell) for place, cell in enumerate(row))

    return tag("table", tag("thead", tag("tr", cells("th", head))) + tag("tbody", "".join(tag("tr", cells("td", row)) for row in rows)))


def _ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers from low to high."""
    span = max(high - low, 1e-9)
    unit = 10 ** math.floor(math.log10(span / count))
    unit *= next(factor for factor in (1, 2, 5, 10) if span / (unit * factor) <= count)
    first = math.ceil(low / unit - 1e-9)
    return [number * unit for number in range(first, math.floor(high / unit + 1e-9) + 1)]


def line_chart(series: Mapping[str, Sequence[tuple[float, float]]], *, label: str, width: int = 860, height: int = 260) -> str:
    """Lines over the training step (logarithmic) from 0 up, as SVG; each is named at its end."""
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    left, right, top, bottom = 46, 120, 14, 34
    first, last = min(p[0] for p in points), max(max(p[0] for p in points), 2)
    high = max(p[1] for p in points) * 1.04 or 1.0

    def x(step: float) -> float:
        return left + (width - left - right) * math.log(step / first) / max(math.log(last / first), 1e-9)

    def y(value: float) -> float:
        return top + (height - top - bottom) * (1 - value / high)

    parts = []
    for value in _ticks(0, high):
        parts.append(tag("line", x1=left, x2=width - right, y1=f"{y(value):.1f}", y2=f"{y(value):.1f}", class_="grid"))
        parts.append(tag("text", f"{value:g}", x=left - 8, y=f"{y(value) + 4:.1f}", text_anchor="end"))
    for step in [s for power in range(7) for s in (10**power, 3 * 10**power) if first <= s <= last]:
        parts.append(tag("text", f"{step:,}", x=f"{x(step):.1f}", y=height - 14, text_anchor="middle"))
    parts.append(tag("text", "step", x=width - right + 8, y=height - 14))
    ends: list[float] = []
    for number, (name, line) in enumerate(series.items()):
        color = f"var(--c{number % 4})"
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in line)
        parts.append(tag("polyline", points=path, fill="none", stroke=color, stroke_width=2, stroke_linejoin="round"))
        step, value = line[-1]
        place = y(value) + 4
        while any(abs(place - other) < 14 for other in ends):
            place -= 14
        ends.append(place)
        parts.append(tag("circle", cx=f"{x(step):.1f}", cy=f"{y(value):.1f}", r=3.5, fill=color))
        parts.append(tag("text", escape(f"{name} {value:.2f}"), x=f"{x(step) + 8:.1f}", y=f"{place:.1f}", class_="name"))
    return tag("svg", "".join(parts), viewBox=f"0 0 {width} {height}", width=width, role="img", aria_label=label)


def heat_map(share: Sequence[Sequence[float]], domains: Sequence[str], *, color: str) -> str:
    """Domains × experts as SVG: the fuller the colour, the larger an expert's share of the domain's assignments."""
    experts, cell, left = len(share[0]), 22, 84
    most = max(max(row) for row in share)
    parts = []
    for v, row in enumerate(share):
        parts.append(tag("text", escape(domains[v]), x=left - 8, y=v * cell + 16, text_anchor="end", class_="name"))
        for e, value in enumerate(row):
            title = tag("title", escape(f"{domains[v]}: expert {e} has {100 * value:.1f} %"))
            box: dict[str, Any] = dict(x=left + e * cell, y=v * cell, width=cell - 2, height=cell - 2, rx=3)
            parts.append(tag("rect", fill="none", class_="grid", **box))
            parts.append(tag("rect", title, fill=color, fill_opacity=f"{value / most:.3f}", **box))
    for e in range(0, experts, 1 if experts <= 32 else 8):
        parts.append(tag("text", str(e), x=left + e * cell + cell / 2 - 1, y=len(share) * cell + 14, text_anchor="middle"))
    width, height = left + experts * cell, len(share) * cell + 20
    return tag("svg", "".join(parts), viewBox=f"0 0 {width} {height}", width=width, role="img", aria_label="experts by domain")


def _curve(log: Sequence[Mapping[str, Any]], value: Any) -> list[tuple[float, float]]:
    found = [(float(row["step"]), value(row)) for row in log]
    return [(step, number) for step, number in found if number is not None]


def _bits(row: Mapping[str, Any]) -> float | None:
    return None if row["ce"] is None else row["ce"] / math.log(2)


def _violation(row: Mapping[str, Any]) -> float | None:
    return max(row["max_vio"].values(), default=None)


def _figure(picture: str, caption: str) -> str:
    return tag("figure", tag("div", picture, class_="card") + tag("figcaption", caption)) if picture else ""


def _text(data: Mapping[str, Any]) -> str:
    corpus = data["corpus"]
    rows = [(escape(d["domain"]), f"{d['train_bytes']:,}", f"{d['heldout_bytes']:,}", f"{d['documents']:,}") for d in corpus["domains"]]
    made = table(("domain", "training bytes", "held out", "documents"), rows, numbers=(1, 2, 3))
    return tag("div", made, class_="card") + tag("p", f"Fingerprint {escape(corpus['fingerprint'])}", class_="soft")


def _training(data: Mapping[str, Any]) -> str:
    models = data["models"]
    domains = [d["domain"] for d in data["corpus"]["domains"]]
    bits = [(escape(d), *(f"{m['heldout'][d]:.3f}" for m in models.values())) for d in domains]
    head = ("held out, bits per byte", *(f"{escape(name)}, {m['steps']:,} steps" for name, m in models.items()))
    loss = line_chart({name: _curve(m["log"], _bits) for name, m in models.items()}, label="training loss over steps")
    violation = line_chart({name: _curve(m["log"], _violation) for name, m in models.items()}, label="MaxVio over steps", height=200)
    return (
        tag("div", table(head, bits, numbers=range(1, len(head))), class_="card")
        + tag("p", escape(data["note"]), class_="soft")
        + _figure(loss, "Training loss in bits per byte, without the balance loss.")
        + _figure(violation, "MaxVio of the worst layer: by how much the busiest expert exceeds an even share (0: even).")
    )


def _error(value: float | None) -> str:
    return "–" if value is None else "0" if value == 0 else f"{value:.1e}"


def _parity_rows(rows: Iterable[Mapping[str, Any]]) -> list[tuple[str, ...]]:
    made = []
    for row in rows:
        worst = row["why"][0] if row["why"] else row["worst"]
        verdict = tag("span", row["verdict"], class_=row["verdict"])
        errors = _error(row["rms_error"]), _error(row["max_error"]), str(row["flips"])
        made.append((escape(row["where"]), escape(row["track"]), row["dtype"], verdict, *errors, escape(worst)))
    return made


def _parity(data: Mapping[str, Any]) -> str:
    head = ("where", "track", "dtype", "verdict", "RMS error", "max error", "flips", "worst tensor")
    every = tag("details", tag("summary", "Every layer") + table(head, _parity_rows(data["parity"]), numbers=(4, 5, 6)))
    return tag("div", table(head, _parity_rows(data["parity_worst"]), numbers=(4, 5, 6)) + every, class_="card")


def _speed(data: Mapping[str, Any]) -> str:
    rows = [
        (escape(t["track"]), t["dtype"], "–" if t["milliseconds"] is None else f"{t['milliseconds']:.1f}",
         escape(t["why"]) if t["ratio"] is None else f"{t['ratio']:.2f}")
        for t in data["speed"]
    ]  # fmt: skip
    return tag("div", table(("track", "dtype", "ms / 1000 tokens", "× reference.autograd"), rows, numbers=(2, 3)), class_="card")


def _routing(data: Mapping[str, Any]) -> str:
    domains = [d["domain"] for d in data["corpus"]["domains"]]
    columns = []
    for number, (name, model) in enumerate(data["models"].items()):
        layers = []
        for layer, found in model["routing"].items():
            bits = found["information"]
            words = (
                f"{bits['information']:.3f} bits; chance {bits['null_low']:.3f}–{bits['null_high']:.3f}; excess {bits['excess']:.3f} "
                f"(p = {bits['p_value']:.3f})"
            )
            layers.append(_figure(heat_map(found["share"], domains, color=f"var(--c{number})"), f"Layer {layer}: {words}"))
        columns.append(tag("div", tag("h3", escape(name)) + "".join(layers)))
    return tag("div", "".join(columns), class_="pair")


def _samples(data: Mapping[str, Any]) -> str:
    return "".join(
        tag("h3", escape(s["domain"])) + tag("div", tag("pre", tag("b", escape(s["prompt"])) + escape(s["text"])), class_="card")
        for s in data["samples"]
    )


SECTIONS = {
    "The text": (_text, "Bytes that this Python ships, and generated sums. Training and held-out parts share no file."),
    "Training": (_training, ""),
    "Are the tracks equal?": (
        _parity,
        "Held-out text through the trained layers, forward and backward, with the routing of the reference. Errors are relative to the RMS "
        "of NumPy in float64, the worst tensor of the worst layer. A track is equal where neither error exceeds twice that of plain "
        "PyTorch in the same dtype and a rounding more. Flips are choices between near-equal scores that rounding decided.",
    ),
    "How fast are they?": (_speed, "One layer, forward and backward, one thread, processor time, median of interleaved rounds."),
    "Who routes where": (
        _routing,
        "How a domain's tokens spread over the experts. Under each: how many bits the expert tells about the domain, and what dealing the "
        "domains out anew tells in 95 % of all cases. Excess beyond chance is specialization.",
    ),
    "What it writes": (_samples, "The grey beginning is held-out text, the rest is the model's."),
}


def render(data: Mapping[str, Any]) -> str:
    """The report as HTML, from what `moebius tour --json` writes."""
    data = plain(dict(data))
    machine = f"Python {platform.python_version()}, torch {version('torch')}, {platform.machine()}; {data['seconds']:.0f} s in all"
    body = tag("h1", "A tour of Moebius")
    body += tag(
        "p",
        f"A small language model of the kind of {escape(data['model_config']['name'])}, and its layers in every track. {machine}.",
        class_="soft",
    )
    for title, (section, words) in SECTIONS.items():
        body += tag("h2", title) + (tag("p", words) if words else "") + section(data)
    head = '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
    head += tag("title", "A tour of Moebius") + tag("style", STYLE)
    return "<!doctype html>\n" + tag("html", tag("head", head) + tag("body", tag("main", body)), lang="en") + "\n"
