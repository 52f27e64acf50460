"""The collectives that expert parallelism uses, and what a rank says when one of them fails.

A collective that hits a dead or silent rank fails on all others, with a message of the network that names no rank. So each rank that is
still there writes its name into the process group's store, and whoever does not show up is the cause.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import _get_default_store

ROLL_CALL_SECONDS = 5.0
_PREFIX = "moebius/expert_parallel/failed"


class RankLostError(RuntimeError):
    """A collective failed because a rank ended, hangs, or does something else; the message names it. The group is of no more use."""


class DisagreementError(ValueError):
    """Ranks that must agree do not; raised on all of them, before anything is sent that depends on it."""


class Transport:
    """The group of all ranks of a mesh: who we are in it, and its collectives.

    Made on all of them together.
    names       the dimensions of the mesh that it spans
    holders     who of them holds the store of all groups, which ends with its process; nobody where it is elsewhere, as under torchrun
    bytes_sent  what `all_to_all` has sent to other ranks since the start
    Raises RankLostError.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.names = tuple(mesh.mesh_dim_names or ())
        self.mesh = mesh = mesh if mesh.ndim == 1 else mesh._flatten()
        self.group: dist.ProcessGroup = mesh.get_group()
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()
        self.device = torch.device("cpu") if mesh.device_type == "cpu" else torch.device(mesh.device_type, torch.cuda.current_device())
        self.bytes_sent = 0
        self.holders: list[int] = []
        self.holders = [rank for rank, (holds,) in enumerate(self.gather([holds_store()], "asking who holds the store")) if holds]

    def __deepcopy__(self, memo: dict[int, Any]) -> Transport:
        return self  # a process group belongs to the process, not to a copy of a module

    @contextmanager
    def guarded(self, what: str) -> Iterator[None]:
        """Turns the failure of a collective into RankLostError that says what was being done and who is missing."""
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, RankLostError):
                raise
            raise RankLostError(
                f"rank {self.rank} of {self.ranks}: {what} failed: {self._roll_call(what)}; the network says: {_gist(error)}. "
                "This process group cannot be used again: end the process and start all ranks from the last checkpoint"
            ) from error

    def _roll_call(self, what: str) -> str:
        """Who is missing, in words: ranks that report no failed collective of their own in time."""
        missing, where = list(range(self.ranks)), ""
        deadline = time.monotonic() + ROLL_CALL_SECONDS
        try:
            store, names = _get_default_store(), dist.get_process_group_ranks(self.group)
            store.set(f"{_PREFIX}/{names[self.rank]}", what)
            while missing and time.monotonic() < deadline:
                missing = [rank for rank in missing if not store.check([f"{_PREFIX}/{names[rank]}"])]
                time.sleep(0.05)
            where = "; ".join(f"rank {rank}: {store.get(f'{_PREFIX}/{name}').decode()}" for rank, name in enumerate(names) if not missing)
        except Exception as error:  # the store lives in a process too
            if not set(range(self.ranks)) - {self.rank, *missing}:
                held = "held the store of the process group, ended, perhaps after it had noticed itself that another one was lost"
                who = f"rank {self.holders[0]}, which" if self.holders else "the process that"
                return f"{who} {held} ({type(error).__name__} when asked who is missing). Under torchrun a store outlives the ranks"
            # Others had reported: the store ended with a rank that had made its own roll call.
        if missing:
            return f"rank {', '.join(map(str, missing))} ended or hangs"
        return f"all ranks are there, but not in time or not at the same place ({where})"

    def gather(self, numbers: Sequence[int], what: str, dtype: torch.dtype = torch.int64) -> list[list[Any]]:
        """Every rank's numbers, equally many on each."""
        mine = torch.tensor(numbers, dtype=dtype, device=self.device)
        theirs = [torch.zeros_like(mine) for _ in range(self.ranks)]
        with self.guarded(what):
            dist.all_gather(theirs, mine, group=self.group)
            return torch.stack(theirs).tolist()

    def gather_objects(self, thing: Any, what: str) -> list[Any]:
        """Every rank's plain Python object."""
        theirs: list[Any] = [None] * self.ranks
        with self.guarded(what):
            dist.all_gather_object(theirs, thing, group=self.group)
        return theirs

    def sum_(self, tensor: Tensor, what: str) -> Tensor:
        """The sum over ranks, in place; the same bits on every rank."""
        with self.guarded(what):
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def barrier(self, what: str) -> None:
        """Wait for all ranks."""
        with self.guarded(what):
            dist.barrier(group=self.group, device_ids=[torch.cuda.current_device()] if self.mesh.device_type == "cuda" else None)

    def all_to_all(self, sent: Tensor, send: Sequence[int], receive: Sequence[int], what: str) -> Callable[[], Tensor]:
        """Start sending the first send[0] elements of a flat tensor to rank 0, … ; the function returned waits for what came."""
        received = sent.new_zeros(sum(receive))
        self.bytes_sent += (sum(send) - send[self.rank]) * sent.element_size()
        with self.guarded(what):
            work: Any = dist.all_to_all_single(received, sent, list(receive), list(send), group=self.group, async_op=True)

        def wait() -> Tensor:
            with self.guarded(what):
                work.wait()
            return received

        return wait


def holds_store() -> bool:
    """Whether the store of all groups is a server in this process."""
    store: Any = _get_default_store()
    while hasattr(store, "underlying_store"):
        store = store.underlying_store
    return "server=TCPServer" in repr(store)  # nothing else of a TCPStore tells


def _gist(error: Exception) -> str:
    """What the network says, without the place in its source and without its advice."""
    line = str(error).strip().splitlines()[0]
    return line.rpartition(".cc:")[2].partition("] ")[2].partition(". This is typically")[0].rstrip(".") or line.rstrip(".")


def require_agreement(what: str, values: Sequence[Any]) -> None:
    """DisagreementError, naming the ranks, unless all have the same value."""
    odd = [rank for rank, value in enumerate(values) if value != values[0]]
    if odd:
        shown = ", ".join(f"rank {rank} has {values[rank]!r}" for rank in (0, *odd[:3]))
        raise DisagreementError(f"ranks disagree on {what}: {shown}")


def fingerprint(tensor: Tensor) -> int:
    """A number of the tensor's bits that another tensor hardly has; 0 for one without storage."""
    if tensor.is_meta or not tensor.numel():
        return 0
    kind = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    bits = tensor.detach().contiguous().view(kind)
    rows = (bits[None] if bits.ndim < 2 else bits.flatten(1)).sum(-1, dtype=torch.int64)
    # Rows get different weights, so that two of them traded are seen; sums wrap around, which is as good.
    return int((rows * (2 * torch.arange(len(rows), device=rows.device) + 1)).sum())
