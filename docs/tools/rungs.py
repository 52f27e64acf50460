"""The committed counts of the ladder: names for the chapter's sentences, its table, and its figure from Python's side."""

from __future__ import annotations

import itertools
import json
from functools import cache
from pathlib import Path
from typing import Any

from layout import markdown

RESULTS = Path(__file__).resolve().parents[1] / "results/ladder.json"
PASSES = ("forward", "backward")
Json = dict[str, Any]


@cache
def counts() -> Json:
    """The committed result. Raises ValueError where there is none, with the command that makes it."""
    if not RESULTS.is_file():
        raise ValueError(f"there is no {RESULTS.name}; `make ladder` makes it")
    return json.loads(RESULTS.read_text(encoding="utf-8"))


def layer() -> Json:
    """The layer of the chapter's table and sentences."""
    return counts()["layers"][0]


def rows() -> list[Json]:
    """Every rung with its counts on that layer."""
    return [told | counted for told, counted in zip(counts()["rungs"], layer()["counts"], strict=True)]


def rung(name: str) -> Json:
    """One rung's counts on that layer by its name."""
    return next(row for row in rows() if row["name"] == name)


def megabytes(count: float) -> str:
    """Bytes in 10⁶."""
    return f"{count / 1e6:.2f}"


def table() -> str:
    """Each rung: what it does without, launches, bytes moved, bytes kept for the backward."""
    lines = []
    for number, row in enumerate(rows(), 1):
        label = f"{number}\u00a0{row['name']}" if row["backend"] != "native" else row["name"]
        launches = (row[part]["launches"] for part in PASSES)
        moved = (megabytes(row[part]["bytes"]) for part in PASSES)
        lines.append([label, *launches, *moved, megabytes(row["saved_bytes"])])
    return markdown(["rung", "launches", "backward", "MB moved", "backward", "MB saved"], lines)


def climbed() -> list[Json]:
    """The rungs of the figure: not the last, which lies beside the ladder and whose single call hides what it does."""
    return [told for told in counts()["rungs"] if told["backend"] != "native"]


def ladder_data() -> Json:
    """Every rung on every layer: the experts' rows; costs, products, and [name, how often] of what is launched, names by their number."""
    names = sorted({name for one in counts()["layers"] for row in one["counts"] for part in PASSES for name in row[part]["operations"]})

    def told(row: Json, part: str) -> Json:
        launched = [[names.index(name), times] for name, times in row[part]["operations"].items()]
        return {"costs": costs(row, part), "products": row[part]["products"], "launched": launched}

    layers = {
        f"{one['load']}-{one['shape']['E']}": {
            "rows": one["rows"],
            **{part: [told(row, part) for row in one["counts"][: len(climbed())]] for part in PASSES},
        }
        for one in counts()["layers"]
    }
    rungs = [{key: rung[key] for key in ("name", "saves")} for rung in climbed()]
    opening = {"experts": layer()["shape"]["E"], "load": layer()["load"]}
    return {"rungs": rungs, "opening": opening, "names": names, "layers": layers}


def costs(row: Json, part: str) -> list[int]:
    """Launches, FLOPs, bytes moved, bytes saved."""
    return [*(row[part][key] for key in ("launches", "flops", "bytes")), row["saved_bytes"]]


def ladder_case(state: Json, data: Json) -> Json:
    """What `ladder.js` must compute for a state. What is padded follows from the load here, and from the counted FLOPs there."""
    (one,) = [one for one in counts()["layers"] if (one["load"], one["shape"]["E"]) == (state["load"], state["experts"])]
    here, part = state["rung"] - 1, state["part"]
    before, now = (one["counts"][n] for n in (max(here - 1, 0), here))
    changes = [(a > b) - (a < b) for a, b in zip(costs(now, part), costs(before, part), strict=True)]
    box = len(one["rows"]) * max(one["rows"]) if climbed()[here]["name"] == "padded batch" else sum(one["rows"])
    gone = [name for name in before[part]["operations"] if name not in now[part]["operations"]]
    return {
        "before": costs(before, part), "now": costs(now, part), "changes": changes, "padding": box - sum(one["rows"]), "gone": gone,
        "apart": now[part]["products"] >= len(one["rows"]),
    }  # fmt: skip


def ladder_states(data: Json) -> list[Json]:
    """Every rung on every layer, both ways."""
    places = itertools.product(range(1, len(data["rungs"]) + 1), PASSES, counts()["layers"])
    return [{"rung": rung, "part": part, "experts": one["shape"]["E"], "load": one["load"]} for rung, part, one in places]
