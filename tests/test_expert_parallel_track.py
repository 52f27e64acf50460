"""The track on two processes: it is equal, a wrong one is noticed, and neither a death nor a hang leaves anything behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY
from test_expert_parallel import CONFIGS, SPREAD

from optimized import comparison, proofs, tracks
from optimized.contracts import CONTRACTS, Contract
from optimized.expert_parallel import pair, parallelize
from optimized.expert_parallel.pair_worker import deal_out
from optimized.expert_parallel.track import NAME
from reference import presets
from reference.proof.cases import get

PROMISE = CONTRACTS["optimized.expert_parallel.layer.parallelize"]
PLENTY = 60.0  # seconds that starting two processes may take on a busy machine


def ready(rank: int = -1) -> str:
    """In both processes: an answer, unless one of them is told to end."""
    if torch.distributed.get_rank() == rank:
        os.kill(os.getpid(), signal.SIGKILL)
    return f"rank {torch.distributed.get_rank()}"


def sleepy() -> None:
    """In both processes: no answer for a long time."""
    time.sleep(600)


def failing() -> None:
    """In the second process: an error."""
    if torch.distributed.get_rank() == 1:
        raise ArithmeticError("an error of its own")


def twice(module: torch.nn.Module, mesh: Any) -> torch.nn.Module:
    """A wrong `parallelize`: experts that got twice their gradient."""
    spread = parallelize(module, mesh)
    for parameter in spread.get_submodule("experts").parameters():
        parameter.register_hook(lambda gradient: 2 * gradient)
    return spread


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As if none had been started or refused before, and none left behind."""
    monkeypatch.setattr(pair, "_running", [])
    pair.why_not.cache_clear()
    yield
    pair.close()
    pair.why_not.cache_clear()


def test_tokens_are_dealt_out_by_groups() -> None:
    import numpy as np

    assert deal_out(np.array([7, 7, 3, 9, 9, 5]), 6, 2).tolist() == [1, 1, 0, 1, 1, 0]
    assert deal_out(None, 3, 2).tolist() == [0, 0, 0] and deal_out(np.zeros(0, int), 0, 2).tolist() == []


def test_a_broken_promise_is_noticed() -> None:
    broken = Contract("a.b", twice, PROMISE.equals, PROMISE.backend, ("params",), PROMISE.dtypes, "", of_module=True)
    for dtype in PROMISE.dtypes:  # in one test, for all of them need the same two processes
        assert proofs.prove(PROMISE, get("few-tokens"), dtype), dtype
        with pytest.raises(AssertionError, match="experts"):
            proofs.prove(broken, get("few-tokens"), dtype)


@pytest.fixture
def any_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if processes could be started, which is not tried."""
    monkeypatch.setattr("optimized.expert_parallel.track.why_not", lambda: None)


def test_a_layer_that_cannot_be_spread_is_a_row_with_the_reason(any_process: None) -> None:
    track = tracks.TRACKS[NAME]
    for name, config in CONFIGS.items():
        assert (track.reason_against(config, "float32") is None) == (name in SPREAD)
    assert track.reason_against(CONFIGS["mixtral"], "float16") == "computes in float64, float32, bfloat16"


def test_where_no_process_can_be_started_the_row_says_so(no_processes: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair, "PROGRAM", "no_such_program")
    inputs, conditions = comparison.preset_inputs("mixtral-8x7b")
    for _ in range(2):  # the second time at once
        (row,) = comparison.compare_tracks("here", inputs, conditions, tracks=[tracks.TRACKS[NAME]], dtypes=["float32"])
        assert row.verdict == "cannot" and "cannot be started here: rank 0 of 2 ended before it could start" in row.why[0]
        assert "no_such_program" in row.why[0]
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    pair.why_not.cache_clear()
    assert "/nowhere/python" in str(tracks.TRACKS[NAME].reason_against(inputs.config, "float32"))


def test_it_is_left_out_where_time_is_measured() -> None:
    inputs, conditions = comparison.preset_inputs("mixtral-8x7b")
    chosen = [tracks.TRACKS[name] for name in (tracks.YARDSTICK, NAME)]
    timings = comparison.time_tracks(inputs, conditions, tracks=chosen, seconds=0.01)
    assert [timing.track for timing in timings] == [tracks.YARDSTICK]


@pytest.mark.slow
def test_a_death_an_error_and_a_hang(no_processes: None) -> None:
    first = pair.pair()
    assert first.run(ready) == "rank 0" and pair.pair() is first
    with pytest.raises(RuntimeError, match="rank 1 of 2: ArithmeticError: an error of its own"):
        first.run(failing)
    assert first.run(ready) == "rank 0", "an error of the function ends nothing"
    with pytest.raises(RuntimeError, match="rank 1 of 2 ended before it could answer to ready: without a word"):
        first.run(ready, 1)
    assert not first.alive
    second = pair.pair()
    assert second is not first and second.run(ready) == "rank 0"
    processes = [child.pid for child in second._children]
    with pytest.raises(TimeoutError, match=r"rank 0 of 2 did not answer to sleepy within 0\.5 s"):
        second.run(sleepy, seconds=0.5)
    assert not [pid for pid in processes if Path(f"/proc/{pid}").exists()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "preset", ["deepseek-v3", "switch-base-128", "llama4-maverick", "qwen2-57b-a14b", "moe-plus-plus-7b", "soft-moe-b16-128"]
)
def test_presets_are_equal(preset: str) -> None:
    dtypes = ("float64", "float32", "bfloat16")
    rows = comparison.compare_tracks(preset, *comparison.preset_inputs(preset), tracks=[tracks.TRACKS[NAME]], dtypes=dtypes)
    assert [row.verdict for row in rows] == ["equal"] * 3, rows


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("end", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_the_processes_end_with_the_one_that_started_them(end: str, tmp_path: Path) -> None:
    program = (
        # A process that a shell starts in the background ignores SIGINT, and so do its children.
        "import signal, time\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom optimized.expert_parallel.pair import pair\n"
        "print(*(child.pid for child in pair()._children), flush=True)\ntime.sleep(600)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    owner = subprocess.Popen(
        [sys.executable, "-c", program], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    assert owner.stdout is not None
    children = [int(pid) for pid in owner.stdout.readline().split()]
    assert len(children) == 2 and all(Path(f"/proc/{pid}").exists() for pid in children)
    owner.send_signal(getattr(signal, end))
    owner.wait(30)
    until = time.monotonic() + PLENTY / 2
    while left := [pid for pid in children if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < until, f"still there: {left}"
        time.sleep(0.05)


def test_every_tiny_preset_can_be_a_row(any_process: None) -> None:
    reasons = {name: tracks.TRACKS[NAME].reason_against(presets.tiny(name), "float32") for name in presets.names()}
    assert not any(reasons.values()), reasons
