"""When a rank dies or hangs, every other one ends in time with an error that names it; what is on disk survives a kill at any moment."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from conftest import REPOSITORY
from distributed_worker import stepped
from test_expert_parallel import assert_good
from torch.distributed.device_mesh import DeviceMesh

from optimized.expert_parallel import full_state_dict, load_sharded, save_sharded
from optimized.expert_parallel.faults import CONFIG, ENDS, MATRIX, RANKS, STAGES, TIMEOUT, ep_mesh, leave, run_fault
from optimized.expert_parallel.ranks import Ended, run_ranks
from optimized.expert_parallel.roll_call import ROLL_CALL_SECONDS
from optimized.expert_parallel.transport import Transport
from reference.autograd import MoE

SLACK_SECONDS = 10.0  # what its waiting for a core may add to the two timeouts


def assert_survivors_know(ended: list[Ended], culprit: int, words: str = "") -> None:
    """Every other rank raised, in time, and says who is missing and where it noticed."""
    for rank, survivor in enumerate(ended):
        if rank == culprit:
            continue
        assert survivor.exitcode == 1, survivor
        assert survivor.error.startswith(f"RankLostError: rank {rank} of {RANKS}: "), survivor.error
        assert (words or f"rank {culprit} ended or hangs") in survivor.error, survivor.error
        assert "start all ranks from the last checkpoint" in survivor.error and ".cc:" not in survivor.error
        elapsed = float(survivor.error.rpartition("after ")[2].removesuffix(" s"))
        assert elapsed < 2 * TIMEOUT + ROLL_CALL_SECONDS + SLACK_SECONDS, elapsed


def test_rank_killed_while_tokens_travel() -> None:
    ended = run_fault(1, "after dispatch started", "kill")
    assert ended[1].exitcode == -signal.SIGKILL
    assert_survivors_know(ended, 1)


def wait_for_a_survivor(how: str) -> str:
    """In a rank: the last one ends, the one before it notices at once, and the first waits in another group for the one that noticed."""
    everyone, first_two = Transport(ep_mesh()), DeviceMesh("cpu", [0, 1])
    rank = torch.distributed.get_rank()
    if rank == 2:
        leave()
    pair = Transport(first_two)
    if rank == 0 and how == "objects":
        pair.gather_objects(None, "adding up")
    (pair if rank == 0 else everyone).sum_(torch.zeros(1), "adding up")
    return "no error"


@pytest.mark.parametrize("how", ["numbers", pytest.param("objects", marks=pytest.mark.slow)])
def test_a_rank_that_waits_for_a_survivor_is_not_taken_for_lost(how: str) -> None:
    """Nobody's time is up: what the first rank waits for fails only when the second one ends."""
    first, second, _ = run_ranks(RANKS, wait_for_a_survivor, how, deadline=60)
    for rank, ended in enumerate((first, second)):
        assert ended.error.startswith(f"RankLostError: rank {rank} of 3: adding up failed: rank 2 ended or hangs"), ended
    assert "which rank 1 found" in first.error, "the lost rank is in no group with this one"


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("end", ENDS)
def test_every_other_rank_names_the_one_that_ended(stage: str, end: str) -> None:
    ended = run_fault(2, stage, end)
    assert ended[2].exitcode == {"leave": 3, "kill": -signal.SIGKILL, "hang": None, "fail": 1}[end]
    assert end != "fail" or ended[2].error == "ArithmeticError: the culprit's own error"
    assert_survivors_know(ended, 2)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["kill", "hang"])
def test_the_first_rank_is_named_like_any_other_where_it_does_not_hold_the_store(end: str) -> None:
    assert_survivors_know(run_fault(0, "dispatch", end), 0)


@pytest.mark.slow
def test_a_rank_that_notices_after_rank_0_has_left_names_the_cause() -> None:
    """Rank 2 dies, rank 0 notices, waits for who is there and ends, and rank 1 comes when both are gone."""
    first, late, _ = run_fault(2, "beginning", "kill", 1, ROLL_CALL_SECONDS + 3)
    assert "failed: rank 1, 2 ended or hangs" in first.error, "it cannot know yet that rank 1 is only late"
    assert "failed: rank 2 ended or hangs" in late.error, late.error


@pytest.mark.slow
@pytest.mark.parametrize("end", ["leave", "hang"])
def test_rank_0_is_named_when_the_store_ends_with_it(end: str) -> None:
    ended = run_fault(0, "dispatch", end, rank_0_holds_store=True)
    gone = "failed: rank 0, which held the store of the process group, ended"
    assert_survivors_know(ended, 0, gone if end == "leave" else "failed: rank 0 ended or hangs")


@pytest.mark.slow
def test_the_committed_fault_table_is_what_the_command_writes() -> None:
    report = json.loads((REPOSITORY / "docs/results/expert-parallel-faults.json").read_text(encoding="utf-8"))
    found = [(row["culprit"], row["stage"], row["end"], row["store"] == "rank 0") for row in report["lost"]]
    assert found == list(MATRIX.values())
    assert all(row["named"] for row in [*report["lost"], *report["disagreements"]])
    assert all(len(row["saw"]) == RANKS - 1 for row in report["lost"])


def add_up() -> float:
    """In a rank: something with all others."""
    one = torch.ones(1)
    torch.distributed.all_reduce(one)
    return one.item()


@pytest.mark.slow
def test_a_rank_that_starts_late_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine starts processes when it can; the timeout is that of a collective."""
    process, started = type(mp.get_context("forkserver").Process()), []

    def start_late(self: Any, begin: Callable[[Any], None] = process.start) -> None:
        time.sleep(6 * len(started))
        started.append(self)
        begin(self)

    monkeypatch.setattr(process, "start", start_late)
    assert [ended.result for ended in run_ranks(2, add_up, deadline=60, timeout=3)] == [2, 2]


def save_once(folder: str) -> list[str]:
    """In a rank: a checkpoint that stays, its plain state for later, and how long it took to write."""
    moe, optimizer = stepped(CONFIG, ep_mesh(), 1, 1)
    began = time.monotonic()
    save_sharded(Path(folder, "step-1"), moe, optimizer, step=1)
    if torch.distributed.get_rank() == 0:
        torch.save((full_state_dict(moe), time.monotonic() - began), Path(folder, "expected-1"))
    else:
        full_state_dict(moe)
    return []


def save_and_die(folder: str, number: int, after: float, who: tuple[int, ...]) -> list[str]:
    """In a rank: begin to write another checkpoint, and be killed some time later."""
    moe, optimizer = stepped(CONFIG, ep_mesh(), 1, 2)
    state = full_state_dict(moe)
    if torch.distributed.get_rank() == 0:
        torch.save(state, Path(folder, "expected-2"))
    torch.distributed.barrier()
    if torch.distributed.get_rank() in who:
        threading.Timer(after, os.kill, (os.getpid(), signal.SIGKILL)).start()
    save_sharded(Path(folder, f"attempt-{number}"), moe, optimizer, step=2)
    time.sleep(20)  # whoever is too late is killed here
    return []


def same_as(path: Path, state: dict[str, torch.Tensor], step: int) -> bool:
    """Whether one process reads that state from a checkpoint, to the bit."""
    torch.manual_seed(7)
    moe = MoE(CONFIG)
    extra = load_sharded(path, moe, step=0)
    return extra == {"step": step} and all(torch.equal(tensor, state[name]) for name, tensor in moe.state_dict().items())


@pytest.mark.slow
def test_a_kill_at_any_moment_of_a_save_leaves_a_checkpoint_that_loads(tmp_path: Path) -> None:
    assert_good(run_ranks(2, save_once, str(tmp_path), deadline=120))
    state, seconds = torch.load(tmp_path / "expected-1")
    moments = [seconds * part / 10 for part in range(15)]
    whole = []
    for number, after in enumerate(moments):
        who = ((0, 1), (0,), (1,))[number % 3]
        survivors = tuple({0, 1} - set(who))  # whom nobody waits for: they end with the others
        run_ranks(2, save_and_die, str(tmp_path), number, after, who, deadline=after + 60, hanging=survivors)
        assert same_as(tmp_path / "step-1", state, 1)
        path = tmp_path / f"attempt-{number}"
        whole.append(path.exists())
        if path.exists():
            assert same_as(path, torch.load(tmp_path / "expected-2"), 2)
    assert not all(whole), "every kill came too late to disturb anything"


@pytest.mark.slow
def test_under_torchrun_rank_0_is_named_like_any_other(tmp_path: Path) -> None:
    """The agent holds the store, so that it outlives every rank."""
    program = tmp_path / "program.py"
    program.write_text(PROGRAM, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(program), str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, timeout=120, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "rank 0 ended or hangs" in (tmp_path / "seen").read_text(), done.stderr[-2000:]


PROGRAM = """
import os, signal, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from optimized.expert_parallel import RankLostError, parallelize
from optimized.expert_parallel.faults import CONFIG, ep_mesh
from reference.autograd import MoE

signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the agent ends the others at once; what they know is asked here
dist.init_process_group("gloo", timeout=timedelta(seconds=5))
torch.manual_seed(0)
moe = parallelize(MoE(CONFIG), ep_mesh())
moe(torch.randn(5, 6))
if dist.get_rank() == 0:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    moe(torch.randn(5, 6))
except RankLostError as error:
    open(os.path.join(sys.argv[1], "seen"), "w").write(str(error))
"""
