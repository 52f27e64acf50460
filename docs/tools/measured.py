"""The committed training runs of `moebius lab` as tables, and as the data of the specialization scrubber."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from layout import digits, markdown

from reference import balancing

RESULTS = Path(__file__).resolve().parents[1] / "results"
Json = dict[str, Any]
LABELS = ("domain", "byte", "position")


@cache
def result(name: str) -> Json:
    """A committed result. Raises ValueError where there is none, with the command that makes it."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        raise ValueError(f"there is no {path.name}; `moebius lab` makes it")
    return json.loads(path.read_text(encoding="utf-8"))


def parts(values: Json | Sequence[float], places: int) -> list[str]:
    """[mean, range over the seeds] of a committed spread or of the values themselves; no range where all are equal."""
    if not isinstance(values, dict):
        values = {"mean": float(np.mean(values)), "low": min(values), "high": max(values)}
    mean, low, high = (digits(values[key], places) for key in ("mean", "low", "high"))
    return [mean] if low == high else [mean, f"{low} … {high}"]


def spread(values: Json | Sequence[float], places: int = 2) -> str:
    """Mean and range in a sentence."""
    mean, *rest = parts(values, places)
    return (mean + "".join(f" ({one})" for one in rest)).replace(" … ", "\N{NO-BREAK SPACE}…\N{NO-BREAK SPACE}")


def cell(values: Json | Sequence[float], places: int = 2) -> str:
    """Mean and, below it, range in a table."""
    mean, *rest = parts(values, places)
    return mean + "".join(f'<span class="moe-note moe-range">{one}</span>' for one in rest)


def collapse() -> str:
    """What each way of balancing comes to, mean and range over the seeds."""
    found = result("collapse")
    experts = found["model_config"]["moe"]["experts"]["count"] * found["model_config"]["layers"]
    rows = [[name, cell(one["max_vio"]), cell(one["dead"], 1), cell(one["bits"], 3)] for name, one in found["summary"].items()]
    return markdown(["balanced by", "MaxVio", f"idle of {experts} experts", "held-out bits per byte"], rows)


def bias_control() -> str:
    """What each step of the bias comes to."""
    rows = [
        [rate if float(rate) else "0 (no bias)", *(cell(one[key]) for key in ("before", "shift", "after")), cell(one["bits"], 3)]
        for rate, one in result("bias-control")["summary"].items()
    ]
    return markdown(["step γ", "MaxVio before", "just after the change", "at the end", "bits per byte, code"], rows)


def drop_by_position() -> str:
    """The share of assignments dropped at the start, in the middle and at the end of a sequence, by router and queue."""
    found = result("drop-by-position")
    rows = [
        [router, order.replace("_", " "), *(f"{100 * rates[place]['mean']:.1f} %" for place in (0, len(rates) // 2, -1))]
        for router, orders in found["summary"].items()
        for order, rates in orders.items()
    ]
    return markdown(["router", "queue", "first eighth", "fifth eighth", "last eighth"], rows)


def minus(number: re.Match[str]) -> str:
    """A negative number as a page prints it; a rounded 0 has no sign."""
    return number[1] if float(number[1]) == 0 else f"−{number[1]}"


def claims(name: str) -> str:
    """What the field says, whether it held in every seed, who says it, what was seen, and what "held" asks for."""
    said = []
    for one in result(name)["claims"]:
        verdict = "Held" if one["held"] else "Did not hold"
        seen = re.sub(r"(?<![\w.-])-(\d+(?:\.\d+)?)", minus, one["seen"].replace(" – ", "\N{NO-BREAK SPACE}…\N{NO-BREAK SPACE}"))
        kind = "held" if one["held"] else "failed"
        said.append(
            f"- **{verdict}:**{{ .moe-{kind} }} {one['claim']}. *{one['source']}.*<br>Seen: {seen}. To hold asks for: {one['rule']}."
        )
    return "\n".join(said)


def made_by(name: str) -> str:
    """The sentence below a result: seeds, versions, and the command that makes it again."""
    found = result(name)
    versions = ", ".join(f"{package} {text}" for package, text in found["versions"].items())
    return f"{len(found['seeds'])} seeds, one thread, {versions}: `{found['command']}`"


def layers_at(place: int = -1) -> list[Json]:
    """Every layer of every seed at a checkpoint: 0 is before training, −1 the last."""
    return [layer for run in result("specialization")["runs"] for layer in run["checkpoints"][place]["layers"].values()]


def informations() -> str:
    """At the end of training: bits about each label, beside what chance gives."""
    cells = {label: [layer["information"][label] for layer in layers_at()] for label in LABELS}
    rows = []
    for label, found in cells.items():
        told = [cell([one[key] for one in found], 3) for key in ("information", "null_mean", "excess")]
        rows.append([label, digits(found[0]["label_entropy"], 2), *told, f"{max(one['p_value'] for one in found):.3f}"])
    return markdown(["label", "bits to know", "bits told", "by chance", "beyond chance", "largest p"], rows)


def overlaps() -> str:
    """Overlap of weights and outputs at the first and at the last checkpoint."""
    rows = []
    for name, told in (("weights", "weights, best counterpart"), ("outputs", "outputs, same token")):
        for place, when in ((0, "before training"), (-1, "at the end")):
            found = [layer[name] for layer in layers_at(place)]
            value, null = ([one[key] for one in found] for key in ("value", "null_mean"))
            rows.append([told, when, cell(value, 3), cell(null, 3), cell([one["excess"] for one in found], 3)])
    return markdown(["overlap of", "", "cosine", "by chance", "beyond chance"], rows)


def masked() -> str:
    """Bits per byte lost when tokens do without their preferred experts, and without random ones."""
    runs = result("specialization")["runs"]
    rows = []
    for number_of, disabled in enumerate(one["disabled"] for one in runs[0]["checkpoints"][-1]["masked"]):
        cells = [[run["checkpoints"][place]["masked"][number_of]["increase"] for run in runs] for place in (0, -1)]
        parts = [cell([one[key] for one in found]) for found in cells for key in ("value", "null_mean")]
        rows.append([disabled, *parts])
    return markdown(["experts lost", "untrained: best ones", "random ones", "trained: best ones", "random ones"], rows)


def agreements() -> str:
    """How far each checkpoint's routing is that of the end, and how far two seeds agree."""
    found = result("specialization")
    rows = []
    for place, checkpoint in enumerate(found["runs"][0]["checkpoints"]):
        layers = [layer["agreement"] for run in found["runs"] for layer in run["checkpoints"][place]["layers"].values()]
        plain = cell([one["last"]["agreement"]["value"] for one in layers])
        chance = cell([one["last"]["agreement"]["null_mean"] for one in layers])
        rows.append([
            f"step {checkpoint['step']}", plain, chance, cell([one["last"]["corrected"] for one in layers]),
            cell([one["last_within_byte"]["corrected"] for one in layers]),
        ])  # fmt: skip
    seeds = found["between_seeds"]
    if seeds:
        plain, chance = ([one["agreement"]["agreement"][key] for one in seeds] for key in ("value", "null_mean"))
        corrected = [[one[key]["corrected"] for one in seeds] for key in ("agreement", "within_byte")]
        rows.append(["another seed, renamed", cell(plain), cell(chance), *map(cell, corrected)])
    return markdown(["compared with the end", "same expert", "by chance", "corrected", "corrected within a byte"], rows)


TOLD = ("information", "null_mean", "null_high", "p_value")


def scrubber_data() -> Json:
    """Every layer at every checkpoint of every seed: its shares, for each of LABELS the numbers of TOLD. Short: it is part of a page."""
    found = result("specialization")

    def layer_data(layer: Json) -> Json:
        told = [[round(layer["information"][label][key], 4) for key in TOLD] for label in LABELS]
        return {"share": np.round(layer["share"], 3).tolist(), "told": told}

    def checkpoint_data(checkpoint: Json) -> Json:
        return {"step": checkpoint["step"], "layers": [layer_data(layer) for layer in checkpoint["layers"].values()]}

    runs = [{"seed": run["seed"], "checkpoints": list(map(checkpoint_data, run["checkpoints"]))} for run in found["runs"]]
    return {"domains": found["domains"], "runs": runs}


def scrubber_case(state: Json, data: Json) -> Json:
    """What `scrubber.js` must compute for a state."""
    layers = [checkpoint["layers"][state["layer"]] for checkpoint in data["runs"][state["run"]]["checkpoints"]]
    chosen = layers[state["checkpoint"]]
    share_VE = np.array(chosen["share"])
    overall_E = share_VE.mean(0)
    lift_VE = np.divide(share_VE, overall_E, out=np.zeros_like(share_VE), where=overall_E > 0)
    told = np.array([layer["told"] for layer in layers])  # [checkpoints, LABELS, TOLD]
    return {
        "share": share_VE,
        "lift": lift_VE,
        "favourite": lift_VE.argmax(0),
        "curve": told[:, :, 0] - told[:, :, 1],
        "band": told[:, 0, 2] - told[:, 0, 1],
        "violation": balancing.max_violation(overall_E),
        "p": np.array(chosen["told"])[:, 3],
    }


def scrubber_states(data: Json) -> list[Json]:
    """Every checkpoint of every layer and seed."""
    first = data["runs"][0]["checkpoints"]
    places = itertools.product(range(len(data["runs"])), range(len(first[0]["layers"])), range(len(first)))
    return [{"run": run, "layer": layer, "checkpoint": checkpoint} for run, layer, checkpoint in places]


def layer_spread(*path: str, place: int = -1, places: int = 2) -> str:
    """A measure of a layer, such as ("information", "domain", "excess"): its spread over layers and seeds at a checkpoint."""
    found = layers_at(place)
    for key in path:
        found = [one[key] for one in found]
    return spread(found, places)  # type: ignore[arg-type]


def lost(disabled: int, key: str) -> str:
    """Bits per byte lost at the last checkpoint without so many of a token's experts ("value": the best ones, "null_mean": random ones)."""
    runs = result("specialization")["runs"]
    found = [one["increase"][key] for run in runs for one in run["checkpoints"][-1]["masked"] if one["disabled"] == disabled]
    return spread(found)


def between_seeds(kind: str) -> str:
    """Corrected agreement of two seeds after the best renaming: "agreement", or "within_byte"."""
    return spread([one[kind]["corrected"] for one in result("specialization")["between_seeds"]])


def entropy(label: str) -> float:
    """Entropy of a label over the held-out text, in bits."""
    return layers_at()[0]["information"][label]["label_entropy"]
