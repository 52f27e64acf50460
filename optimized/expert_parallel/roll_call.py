"""Who is missing where a collective has failed: the network's message names no rank.

A dead or silent rank makes a collective fail on those that wait for it. Others may wait for one of *these*, in a later collective or in
another group, and would notice only when it ends or when their own time is up. So two kinds of ranks write into the store of all groups
that they are there: one whose collective failed, and one that has waited for a while and sees in the store that somebody's failed. Whoever
shows up in neither way in time is the cause.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from torch.distributed.distributed_c10d import _get_default_store

ROLL_CALL_SECONDS = 5.0
LOOK_SECONDS = 1.0
"""How long a rank waits in a collective before it looks, each time, whether another one's has failed."""
_THERE, _FAILED, _FOUND = (f"moebius/expert_parallel/{key}" for key in ("there", "failed", "found"))


def holds_store() -> bool:
    """Whether the store of all groups is a server in this process."""
    store: Any = _get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return "server=TCPServer" in repr(store)  # nothing else of a TCPStore tells


def answer(rank: int, what: str) -> None:
    """Say that this rank is there and waits in that collective, if another one's has failed; where the store is gone, say nothing."""
    try:
        store = _get_default_store()
        if store.check([_FAILED]):
            store.set(f"{_THERE}/{rank}", what)
    except Exception:  # what this rank waits for will fail too, and then say more
        return


def roll_call(rank: int, members: Sequence[int], what: str, holders: Sequence[int]) -> str:
    """Who of a group's members is missing after a collective failed on this rank, in words.

    rank, members, holders: numbers in the group of all;  holders: who holds the store, which ends with its process
    """
    missing, where = list(members), ""
    deadline = time.monotonic() + ROLL_CALL_SECONDS
    try:
        store = _get_default_store()
        store.set(f"{_THERE}/{rank}", what)
        store.set(_FAILED, "")
        while missing and time.monotonic() < deadline:
            missing = [member for member in missing if not store.check([f"{_THERE}/{member}"])]
            time.sleep(0.05)
        if missing:
            store.set(_FOUND, f"{_gone(missing)}, which rank {rank} found")
        elif store.check([_FOUND]):
            return store.get(_FOUND).decode()  # by a member of another group, whom somebody of this one waited for
        else:
            where = "; ".join(f"rank {member}: {store.get(f'{_THERE}/{member}').decode()}" for member in members)
    except Exception as error:  # the store lives in a process too
        if not set(members) - {rank, *missing}:
            held = "held the store of the process group, ended, perhaps after it had noticed itself that another one was lost"
            who = f"rank {holders[0]}, which" if holders else "the process that"
            return f"{who} {held} ({type(error).__name__} when asked who is missing). Under torchrun a store outlives the ranks"
        # Others had reported: the store ended with a rank that had made its own roll call.
    return _gone(missing) if missing else f"all ranks are there, but not in time or not at the same place ({where})"


def _gone(missing: Sequence[int]) -> str:
    return f"rank {', '.join(map(str, missing))} ended or hangs"
