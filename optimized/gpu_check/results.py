"""The file of results: read, completed by one value at a time, and never half written."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from reference.config import require

SCHEMA = 1
DONE, CUT, RUNNING, FAILED = "done", "cut", "running", "failed"
Step = tuple[str, Callable[[], Any]]
# After one of these nothing more can be computed in the process, which is no fault of the steps that follow.
SPOILED = re.compile(r"\b(?:CUDA|HIP) error\b|Triton Error \[")


class Results:
    """Results by part and key, in a JSON file at `path`. Raises ValueError where the file is something else."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.data: dict[str, Any] = {"schema": SCHEMA, "parts": {}}
        if path.exists() and path.stat().st_size:
            try:
                self.data = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                raise ValueError(f"{path} is no result of this check: {error}; name another file with --out") from None
            right = isinstance(self.data, dict) and self.data.get("schema") == SCHEMA
            require(right, f"{path} is no result of this check (schema {SCHEMA}); name another file with --out")

    def part(self, name: str) -> dict[str, Any]:
        """The entry of a part: state, seconds, results by key; while a step runs, its key and whether it is the first of its process."""
        return self.data["parts"].setdefault(name, {"state": RUNNING, "seconds": 0.0, "results": {}})

    def state(self, name: str) -> str | None:
        """How far a part is, None before its start."""
        return self.data["parts"].get(name, {}).get("state")

    def write(self) -> None:
        """Everything to the file, by way of another one, so that a reader never sees half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_name(f"{self.path.name}.{os.getpid()}")
        fresh.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        fresh.replace(self.path)


def work_off(results: Results, name: str, steps: Iterable[Step], seconds: float, tell: Callable[[str], object] = lambda line: None) -> str:
    """Every step of a part that has no result yet, until the time is over; the state it ends in.

    A step that raises has its error as its result, and the others still run: in a new process where the device is spoiled.
    """
    entry, began = results.part(name), time.monotonic()
    before = entry["seconds"]
    state, first = DONE, True
    for key, step in steps:
        if key in entry["results"]:
            continue
        if time.monotonic() - began > seconds:
            state = CUT
            break
        entry["step"] = {"key": key, "first": first}
        results.write()
        spoiled, first = False, False
        try:
            entry["results"][key] = step()
        except Exception as error:  # a peer or a kernel may raise anything, and it is worth knowing
            entry["results"][key] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
            spoiled = SPOILED.search(str(error)) is not None
        del entry["step"]
        entry |= {"state": RUNNING, "seconds": round(before + time.monotonic() - began, 1)}
        results.write()
        tell(f"{name}: {key}: {short(entry['results'][key])}")
        if spoiled:
            state = CUT
            break
    entry |= {"state": state, "seconds": round(before + time.monotonic() - began, 1)}
    results.write()
    return state


def short(result: Any) -> str:
    """One result in a few words."""
    if not isinstance(result, dict):
        return str(result)
    if "error" in result:
        return result["error"]
    return ", ".join(f"{name} {value}" for name, value in result.items() if not isinstance(value, (dict, list))) or "measured"


def failures(results: Results) -> list[str]:
    """Every result that says that something is wrong: an error, or "good": false."""
    found = []
    for name, entry in results.data["parts"].items():
        if entry["state"] == FAILED:
            found.append(f"{name}: {entry.get('why', 'failed')}")
        for key, result in entry["results"].items():
            if isinstance(result, dict) and ("error" in result or result.get("good") is False):
                found.append(f"{name}: {key}: {short(result)}")
    return found
