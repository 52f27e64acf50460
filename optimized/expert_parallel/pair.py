"""Two processes that stay: one layer after the other is sent to them, run expert-parallel, and comes back as one outcome.

They are started when the first layer needs them, as programs of their own and not as forks, for a fork of a process with threads may hang.
They end when their input does, so that none outlives this process, however it ends.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import os
import pickle
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from reference.config import require

RANKS = 2
START_SECONDS, ANSWER_SECONDS, LEAVE_SECONDS = 120.0, 120.0, 5.0
PROGRAM = "optimized.expert_parallel.pair_worker"


class Processes:
    """`ranks` processes with a group of gloo. Raises OSError where they cannot be started, TimeoutError where they are late."""

    def __init__(self, ranks: int = RANKS, seconds: float = START_SECONDS) -> None:
        require(ranks >= 1, f"ranks is {ranks}; there must be at least 1")
        self._folder = tempfile.TemporaryDirectory(prefix="moebius-", ignore_cleanup_errors=True)
        self._children: list[subprocess.Popen[bytes]] = []
        self._answers: list[queue.Queue[Any]] = []
        paths = [path or os.getcwd() for path in sys.path]
        settings = {"PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", "MOEBIUS_CHECK": os.environ.get("MOEBIUS_CHECK", "")}
        try:
            for rank in range(ranks):
                self._start([sys.executable, "-m", PROGRAM, str(rank), str(ranks), self._folder.name], {**os.environ, **settings})
            self._collect(seconds, "start")
        except BaseException:
            self.close()
            raise

    def _start(self, command: list[str], environment: dict[str, str]) -> None:
        with open(self._log(len(self._children)), "wb") as log:
            child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, env=environment)
        self._children.append(child)
        self._answers.append(queue.Queue())
        threading.Thread(target=_listen, args=(child.stdout, self._answers[-1]), daemon=True).start()

    def _log(self, rank: int) -> Path:
        return Path(self._folder.name, f"rank-{rank}.log")

    def run(self, function: Callable[..., Any], *arguments: Any, seconds: float = ANSWER_SECONDS) -> Any:
        """What function(*arguments) returns on rank 0, run on all ranks together. Functions and arguments are pickled.

        Raises RuntimeError with what the function raised on the first rank that it did on, or where a process has ended; TimeoutError
        where one does not answer. After either of the last two the processes are gone.
        """
        message = pickle.dumps((function, arguments))
        try:
            for child in self._children:
                assert child.stdin is not None
                child.stdin.write(len(message).to_bytes(8, "little") + message)
                child.stdin.flush()
            answers = self._collect(seconds, f"answer to {function.__name__}")
        except BaseException:
            self.close()
            raise
        for rank, (good, value) in enumerate(answers):
            if not good:
                raise RuntimeError(f"rank {rank} of {len(answers)}: {value}")
        return answers[0][1]

    def _collect(self, seconds: float, what: str) -> list[Any]:
        """One answer from each process."""
        end, found = time.monotonic() + seconds, []
        for rank, answers in enumerate(self._answers):
            try:
                found.append(answers.get(timeout=max(0.0, end - time.monotonic())))
            except queue.Empty:
                raise TimeoutError(f"rank {rank} of {len(self._answers)} did not {what} within {seconds:g} s") from None
            if found[-1] is None:
                last = self._log(rank).read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
                said = " ".join(last) or "without a word"
                raise RuntimeError(f"rank {rank} of {len(self._answers)} ended before it could {what}: {said}")
        return found

    @property
    def alive(self) -> bool:
        """Whether all processes are there."""
        return bool(self._children) and all(child.poll() is None for child in self._children)

    def close(self) -> None:
        """End the processes, by force where they do not end by themselves. May be called twice."""
        for child in self._children:
            with contextlib.suppress(OSError):
                child.stdin.close()  # type: ignore[union-attr]
        end = time.monotonic() + LEAVE_SECONDS
        for child in self._children:
            try:
                child.wait(max(0.1, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        self._children, self._answers = [], []
        self._folder.cleanup()


def _listen(pipe: IO[bytes] | None, answers: queue.Queue[Any]) -> None:
    """Put every answer that comes through a pipe into a queue, and None when there will be no more."""
    assert pipe is not None
    with contextlib.suppress(OSError, EOFError, pickle.UnpicklingError), pipe:
        while len(header := pipe.read(8)) == 8:
            answers.put(pickle.loads(pipe.read(int.from_bytes(header, "little"))))
    answers.put(None)


_running: list[Processes] = []


def pair() -> Processes:
    """The two processes of this one, started now where they do not run. Raises what `Processes` raises, and then always at once."""
    if _running and _running[0].alive:
        return _running[0]
    if _running:
        close()
    reason = why_not()
    if reason:
        raise OSError(reason)
    _running.append(Processes())
    return _running[0]


@functools.cache
def why_not() -> str | None:
    """Why there can be no two processes here, or None: found out by starting them."""
    try:
        import torch.distributed as dist

        require(dist.is_available() and dist.is_gloo_available(), "this PyTorch was built without gloo")
        _running.append(Processes())
    except (OSError, RuntimeError, ValueError) as error:
        return f"two processes cannot be started here: {error}"
    return None


def close() -> None:
    """End the processes, where there are any; the next use starts others."""
    while _running:
        _running.pop().close()


atexit.register(close)
