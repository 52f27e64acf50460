"""Results kept as they come, so that a benchmark that was cut off goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from reference.config import require

from ..comparison import plain
from .timing import Spread

ROOT = Path(__file__).resolve().parent.parent.parent
SOURCES = (
    "optimized/benchmarks", "optimized/native", "optimized/native_backend.py", "optimized/torch_backend.py", "optimized/operators.py",
    "optimized/experts.py", "optimized/huggingface.py", "optimized/environment.py",
)  # fmt: skip


def fingerprint() -> str:
    """Of all code whose speed or result is measured: numbers of other code do not belong beside ours."""
    paths = [path for part in SOURCES for path in ((ROOT / part).rglob("*") if (ROOT / part).is_dir() else [ROOT / part])]
    files = sorted(path for path in paths if path.suffix in (".py", ".c", ".h") and path.is_file())
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def revive(value: Any) -> Any:
    """What JSON has made of a result, with its spreads."""
    if isinstance(value, dict):
        return Spread(**value) if value.keys() == set(Spread._fields) else {key: revive(item) for key, item in value.items()}
    return [revive(item) for item in value] if isinstance(value, list) else value


class Journal:
    """A file with a line of JSON for each finished part; the first says what run they belong to.

    `resume`: a file of the same run is gone on with, one of another run (another plan, machine or code) is begun anew. A last line that
    was cut off is not believed.
    Raises: ValueError for a file that is no such record: it would be lost.
    """

    def __init__(self, path: Path, head: dict[str, Any], *, resume: bool) -> None:
        self.path, self.done = path, {}
        path.parent.mkdir(parents=True, exist_ok=True)
        found = self._lines()
        begun = bool(found) and isinstance(found[0], dict) and found[0].keys() == head.keys()
        require(
            begun or not path.is_file() or not path.stat().st_size,
            f"{path} is no benchmark's record and would be overwritten; name another file, or remove it",
        )
        lines = [line for line in found if line.get("key")] if resume and found[:1] == [plain(head)] else []
        path.write_text("".join(json.dumps(line) + "\n" for line in [plain(head), *lines]), encoding="utf-8")
        self.done = {line["key"]: revive(line["result"]) for line in lines}

    def _lines(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for line in self.path.read_text(encoding="utf-8").splitlines() if self.path.is_file() else []:
            try:
                found.append(json.loads(line))
            except ValueError:
                break
        return found

    def take(self, key: str, make: Callable[[], Any]) -> Any:
        """The part of this key: as it was finished before, or made now and kept."""
        if key not in self.done:
            self.done[key] = make()
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"key": key, "result": plain(self.done[key])}, allow_nan=False) + "\n")
        return self.done[key]


class Nowhere:
    """A journal that keeps nothing."""

    def take(self, key: str, make: Callable[[], Any]) -> Any:
        """Made now."""
        return make()
