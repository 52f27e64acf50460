"""When a rank dies or hangs, every other one ends in time with an error that names it."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from configs import CONFIGS
from distributed_worker import Ended, ep_mesh, run_ranks

from optimized.expert_parallel import RankLostError, parallelize, sync_gradients
from optimized.expert_parallel.transport import ROLL_CALL_SECONDS, Transport
from reference.autograd import MoE

RANKS, TIMEOUT = 3, 5.0
START_SECONDS = 120.0  # what starting three processes may take on a busy machine
SLACK_SECONDS = 10.0  # what its waiting for a core may add to the two timeouts


def leave() -> None:
    """End at once, as after a fatal error of a library."""
    os._exit(3)


def kill() -> None:
    """End as the kernel ends a process that used too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def hang() -> None:
    """Do nothing any more."""
    time.sleep(600)


def fail() -> None:
    """An error of the program's own."""
    raise ArithmeticError("the culprit's own error")


ENDS: dict[str, Callable[[], None]] = {"leave": leave, "kill": kill, "hang": hang, "fail": fail}

# Name → what the collective is called at which the culprit ends, and whether it takes part in it first.
STAGES = {
    "beginning": ("beginning a pass", False),
    "losses": ("adding up loads and losses", False),
    "counts": ("agreeing on counts", False),
    "dispatch": ("dispatch in", False),
    "after dispatch started": ("dispatch in", True),
    "combine": ("combine in", False),
    "backward": ("combine's gradient", False),
    "backward, last": ("dispatch's gradient", True),
    "gradients": ("averaging gradients", False),
}


def step_with_fault(culprit: int, stage: str, end: str) -> str:
    """In a rank: a good step, then one in which the culprit ends."""
    torch.manual_seed(0)
    mesh = ep_mesh(RANKS)
    moe = parallelize(MoE(CONFIGS["shared"]), mesh)

    def step() -> None:
        y_TD, aux = moe(torch.randn(64, 6))
        (y_TD.sum() + aux.loss).backward()
        sync_gradients(moe)

    step()
    if dist.get_rank() == culprit:
        _arm(*STAGES[stage], ENDS[end])
    began = time.monotonic()
    try:
        step()
    except RankLostError as error:
        raise RankLostError(f"{error}; after {time.monotonic() - began:.1f} s") from error
    return "no error"


def _arm(called: str, takes_part: bool, end: Callable[[], None]) -> None:
    """Let this process end at the next collective of that name."""
    for method in ("gather", "sum_", "all_to_all"):
        original = getattr(Transport, method)

        def faulty(self, *given, original=original):
            if not given[-1].startswith(called):
                return original(self, *given)
            if takes_part:
                original(self, *given)
            return end()

        setattr(Transport, method, faulty)


def assert_survivors_know(ended: list[Ended], culprit: int) -> None:
    """Every other rank raised, in time, and says who is missing and where it noticed."""
    for rank, survivor in enumerate(ended):
        if rank == culprit:
            continue
        assert survivor.exitcode == 1, survivor
        assert survivor.error.startswith(f"RankLostError: rank {rank} of {RANKS}: "), survivor.error
        named = f"rank {culprit} ended or hangs" if culprit else "the rank that holds it"
        assert named in survivor.error or f"rank {culprit} ended or hangs" in survivor.error, survivor.error
        assert "start all ranks from the last checkpoint" in survivor.error
        elapsed = float(survivor.error.rpartition("after ")[2].removesuffix(" s"))
        assert elapsed < TIMEOUT + ROLL_CALL_SECONDS + SLACK_SECONDS, elapsed


def run_fault(culprit: int, stage: str, end: str) -> list[Ended]:
    hanging = (culprit,) if end == "hang" else ()
    return run_ranks(RANKS, step_with_fault, culprit, stage, end, deadline=START_SECONDS + 3 * TIMEOUT, timeout=TIMEOUT, hanging=hanging)


def test_rank_killed_while_tokens_travel() -> None:
    ended = run_fault(1, "after dispatch started", "kill")
    assert ended[1].exitcode == -signal.SIGKILL
    assert_survivors_know(ended, 1)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("end", ENDS)
def test_every_other_rank_names_the_one_that_ended(stage: str, end: str) -> None:
    ended = run_fault(2, stage, end)
    assert ended[2].exitcode == {"leave": 3, "kill": -signal.SIGKILL, "hang": None, "fail": 1}[end]
    assert end != "fail" or ended[2].error == "ArithmeticError: the culprit's own error"
    assert_survivors_know(ended, 2)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["leave", "hang"])
def test_the_rank_that_holds_the_store_ended(end: str) -> None:
    assert_survivors_know(run_fault(0, "dispatch", end), 0)
