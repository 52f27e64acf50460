"""`python tests/faults/report.py [PATH]`: plants every fault, asks every check, writes who was caught by which means."""

from __future__ import annotations

import collections
import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = REPOSITORY / "docs/results/kernel-faults.json"

if __name__ == "__main__":
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from faults import checks  # noqa: E402
from faults.plant import Fault, planted  # noqa: E402
from faults.table import FAULTS  # noqa: E402


def digest(fault: Fault) -> str:
    """What a fault is, in eight letters: another text, check or input needs another run."""
    return hashlib.sha256(repr((fault.module, fault.old, fault.new, fault.check, fault.on)).encode()).hexdigest()[:8]


def judged(fault: Fault) -> dict[str, Any]:
    """One row: by which means the fault is caught, the check of its own first."""
    with planted(fault):
        own = checks.ask(fault.check, fault.on)
        found = {means: (fault.check, fault.on, message) for means, message in own.items()}
        if "bounds" not in found:
            found = {**checks.ask_everything(), **found}
    evidence = [{"means": means, "check": check, "on": on, "message": message} for means, (check, on, message) in found.items()]
    return {
        "name": fault.name, "defence": fault.defence, "module": fault.module, "kernel": fault.kernel, "digest": digest(fault),
        "caught": bool(own), "means": sorted(found), "evidence": evidence,
    }  # fmt: skip


def report() -> dict[str, Any]:
    """All rows, with how many faults each means catches."""
    rows = []
    for number, fault in enumerate(FAULTS, 1):
        rows.append(judged(fault))
        print(
            f"{number:3}/{len(FAULTS)}  {'caught' if rows[-1]['caught'] else 'MISSED'}  {', '.join(rows[-1]['means']):28}  {fault.name}",
            flush=True,
        )
    by_means = collections.Counter(means for row in rows for means in row["means"])
    return {"planted": len(rows), "caught": sum(row["caught"] for row in rows), "by_means": dict(sorted(by_means.items())), "faults": rows}


def main() -> int:
    """Write the report; the exit code is 1 where a fault was missed, or where a check complains of the kernels as they are."""
    false_alarms = checks.ask_everything()
    for means, evidence in false_alarms.items():
        print("without a fault:", means, *evidence)
    result = report()
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{result['caught']} of {result['planted']} faults are caught, {result['by_means']}")
    return int(bool(false_alarms) or result["caught"] < result["planted"])


if __name__ == "__main__":
    sys.exit(main())
