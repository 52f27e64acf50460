"""Run a function in several processes with a group of gloo, and learn how each of them ended, whatever happened to it."""

from __future__ import annotations

import os
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from reference.config import require

HOST = "127.0.0.1"
PRELOAD = "optimized.expert_parallel.pair_worker"  # imports all that a rank needs: once, not in each


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code (negative: a signal; None: it had to be killed), what it returned, what it raised, after how long."""

    exitcode: int | None
    result: Any
    error: str
    trace: str
    seconds: float


def _rank_main(rank: int, world: int, port: int, program: Callable[..., Any], arguments: tuple, folder: str, timeout: float) -> None:
    torch.set_num_threads(1)
    limit = timedelta(seconds=timeout)
    patience = timedelta(seconds=max(60.0, timeout))
    store = dist.TCPStore(HOST, abs(port), world, is_master=port < 0 and rank == 0, timeout=patience)  # type: ignore[attr-defined]
    _meet(store, world, patience)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=limit)
    try:
        result = ("result", program(*arguments))
    except BaseException as error:
        result = ("error", f"{type(error).__name__}: {error}", traceback.format_exc())
    torch.save(result, Path(folder, f"rank-{rank}"))
    # Groups with a lost rank cannot be destroyed in good order; what matters has been written.
    os._exit(0 if result[0] == "result" else 1)


def _meet(store: Any, world: int, patience: timedelta) -> None:
    """Wait for all ranks. Processes start when the machine has time for them, which a group's timeout is not meant to bound."""
    if store.add("met", 1) == world:
        store.set("all met", "")
    store.wait(["all met"], patience)


def run_ranks(
    world: int, program: Callable[..., Any], *arguments: Any,
    deadline: float, timeout: float = 60, hanging: tuple[int, ...] = (), rank_0_holds_store: bool = False,
) -> list[Ended]:  # fmt: skip
    """Run program(*arguments) in `world` processes.

    timeout: of a collective, in seconds;  deadline: of everything;  hanging: ranks that nobody waits for
    rank_0_holds_store   the store of the group lives in rank 0 and ends with it, instead of in this process as it does under torchrun
    Never raises for what a rank does: how each ended is returned. Raises: ValueError for less than one process.
    """
    require(world >= 1, f"world is {world}; there must be at least 1 process")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload([PRELOAD])
    with tempfile.TemporaryDirectory() as folder:
        store = dist.TCPStore(HOST, 0, world, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]
        port, began = store.port, time.monotonic()
        if rank_0_holds_store:
            del store  # its port is free again
            port = -port
        given = [(rank, world, port, program, arguments, folder, timeout) for rank in range(world)]
        processes = [context.Process(target=_rank_main, args=one, daemon=True) for one in given]
        for process in processes:
            process.start()
        seconds = [0.0] * world
        while time.monotonic() - began < deadline and any(p.is_alive() for rank, p in enumerate(processes) if rank not in hanging):
            time.sleep(0.02)
            for rank, process in enumerate(processes):
                seconds[rank] = time.monotonic() - began if process.is_alive() else seconds[rank]
        return [_ended(process, Path(folder, f"rank-{rank}"), seconds[rank]) for rank, process in enumerate(processes)]


def _ended(process: Any, file: Path, seconds: float) -> Ended:
    killed = process.is_alive()
    if killed:
        process.kill()
    process.join()
    kind, *rest = torch.load(file, weights_only=False) if file.exists() else ("nothing", "")
    result, error, trace = (rest[0], "", "") if kind == "result" else (None, rest[0], rest[1] if len(rest) > 1 else "")
    return Ended(None if killed else process.exitcode, result, error, trace, seconds)
