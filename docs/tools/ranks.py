"""The committed measurements of expert parallelism as tables: steps and traffic, and what every rank saw of a fault."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from layout import digits, markdown

RESULTS = Path(__file__).resolve().parents[1] / "results"


def result(name: str) -> dict[str, Any]:
    """A committed result. Raises ValueError where there is none, with the command that makes it."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        command = {"expert-parallel": "measure", "expert-parallel-faults": "faults"}[name]
        raise ValueError(f"there is no {path.name}; `python -m optimized.expert_parallel.{command} --json {path}` makes it")
    return json.loads(path.read_text(encoding="utf-8"))


def steps() -> str:
    """Time of a step and bytes of each all-to-all, by number of ranks."""
    rows = []
    for row in result("expert-parallel")["rows"]:
        sent = (digits(row[part] / 1e6, 2) for part in ("dispatch", "combine", "combine_gradient", "dispatch_gradient"))
        equal = "yes" if row["bytes_sent"] == row["bytes_by_formula"] else "**no**"
        rows.append([row["ranks"], digits(row["step_ms"], 0), digits(row["processor_ms"], 0), *sent, equal])
    header = ["ranks", "step, ms", "processor, ms", "dispatch, MB", "combine", "its gradient", "dispatch's gradient", "counted = formula"]
    return markdown(header, rows)


def _seen(row: dict[str, Any]) -> str:
    others = " and ".join(row["saw"])
    if row["named"]:
        return f"ranks {others} name it, after {digits(row['seconds'], 1)}\u00a0s"
    said = {text.partition("failed: ")[2].partition(" (")[0] for text in row["saw"].values()}
    return f"ranks {others} say: {'; '.join(sorted(said))}"


def lost_ranks() -> str:
    """Where a rank ends, and what the others say when it is killed and when it hangs; stages at which they say the same in one row."""
    found: dict[tuple[str, str], dict[str, str]] = {}
    for row in result("expert-parallel-faults")["lost"]:
        who = f"rank\N{NO-BREAK SPACE}{row['culprit']}" + (", which holds the store" if row["store"] == "rank 0" else "")
        found.setdefault((who, row["stage"]), {})[row["end"]] = _seen(row)
    alike: dict[tuple[str, ...], list[str]] = {}
    for (who, stage), ends in found.items():
        alike.setdefault((who, *(ends.get(end, "") for end in ("kill", "hang"))), []).append(stage)
    rows = [[who, ", ".join(stage.replace(", last", " (last)") for stage in stages), *ends] for (who, *ends), stages in alike.items()]
    return markdown(["lost", "at", "killed by SIGKILL", "hangs"], rows, numbers=False)


def disagreements() -> str:
    """What the last rank does otherwise, and what all ranks say, without the values that differ."""
    rows = [
        [row["how"].rstrip("."), row["saw"]["0"].partition(": rank 0 has")[0]] for row in result("expert-parallel-faults")["disagreements"]
    ]
    return markdown(["the last rank brings", "every rank raises"], rows, numbers=False)
