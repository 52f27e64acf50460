"""`moebius train --nproc N`: torchrun in this process, a worker in each of N others."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.run import get_args_parser
from torch.distributed.run import run as torchrun

from reference.config import require

WORKER = "optimized.expert_parallel.worker"


class RankFailedError(OSError):
    """A process of a run ended, and no restart was left; the message says which, how, and what to do."""


def launch(settings: dict[str, Any], processes: int, max_restarts: int) -> dict[str, Any]:
    """Train with these settings (see `worker.run`) on so many processes; after the loss of one all are started again, and resume.

    Returns: what rank 0 reports. Raises: RankFailedError where a process ended more often than `max_restarts` allows.
    """
    require(max_restarts >= 0, f"--max-restarts is {max_restarts}; it must be at least 0")
    threads = max(1, (os.cpu_count() or 1) // processes)
    before = os.environ.get("OMP_NUM_THREADS")
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))  # torchrun asks for it, or warns
    with tempfile.TemporaryDirectory(prefix="moebius-") as folder:
        file, result = Path(folder, "settings.json"), Path(folder, "result.json")
        file.write_text(json.dumps({**settings, "result": str(result)}), encoding="utf-8")
        options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={max_restarts}", "-m", WORKER, str(file)]
        try:
            torchrun(get_args_parser().parse_args(options))
        except ChildFailedError as error:
            raise RankFailedError(_describe(error, settings["out"], processes)) from error
        finally:
            if before is None:
                del os.environ["OMP_NUM_THREADS"]
        return json.loads(result.read_text(encoding="utf-8"))


def _describe(error: ChildFailedError, out: str, processes: int) -> str:
    rank, failure = error.get_first_failure()
    how = f"was ended by {failure.signal_name()}" if failure.exitcode < 0 else f"ended with exit code {failure.exitcode}"
    message = failure.message.get("message", failure.message) if isinstance(failure.message, dict) else failure.message
    said = "" if failure.exitcode < 0 or not message else f": {str(message).strip().splitlines()[-1]}"
    return f"rank {rank} of {processes} {how}{said}. `moebius train --resume --out {out} …` goes on from the newest checkpoint"
