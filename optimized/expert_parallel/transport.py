"""The collectives that expert parallelism uses, and what a rank says when one of them fails.

Ranks have two numbers: one in their group, by which parts are dealt out, and one in the group of all, by which messages name them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .roll_call import LOOK_SECONDS, answer, holds_store, roll_call


class RankLostError(RuntimeError):
    """A collective failed because a rank ended, hangs, or does something else; the message names it. The group is of no more use."""


class DisagreementError(ValueError):
    """Ranks that must agree do not; raised on all of them, before anything is sent that depends on it."""


class Transport:
    """The group of all ranks of a mesh: who we are in it, and its collectives.

    Made on all of them together.
    names       the dimensions of the mesh that it spans
    rank, ranks our number in it, and how many they are
    members     their numbers in the group of all
    holders     who of `members` holds the store of all groups, which ends with its process; nobody where it is elsewhere, as under torchrun
    bytes_sent  what `all_to_all` has sent to other ranks since the start
    Raises RankLostError.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        self.names = tuple(mesh.mesh_dim_names or ())
        self.mesh = mesh = mesh if mesh.ndim == 1 else mesh._flatten()
        self.group: dist.ProcessGroup = mesh.get_group()
        self.rank, self.ranks = mesh.get_local_rank(), mesh.size()
        self.members = dist.get_process_group_ranks(self.group)
        self.device = torch.device("cpu") if mesh.device_type == "cpu" else torch.device(mesh.device_type, torch.cuda.current_device())
        self.bytes_sent = 0
        self.holders: list[int] = []
        holding = self.gather([holds_store()], "asking who holds the store")
        self.holders = [member for member, (holds,) in zip(self.members, holding, strict=True) if holds]

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
            rank = self.members[self.rank]
            raise RankLostError(
                f"rank {rank} of {dist.get_world_size()}: {what} failed: {roll_call(rank, self.members, what, self.holders)}; "
                f"the network says: {_gist(error)}. "
                "This process group cannot be used again: end the process and start all ranks from the last checkpoint"
            ) from error

    @contextmanager
    def answering(self, what: str) -> Iterator[None]:
        """As `guarded`, for several collectives inside a library: a thread answers meanwhile those whose own has failed."""
        done = threading.Event()

        def look() -> None:
            while not done.wait(LOOK_SECONDS):
                answer(self.members[self.rank], what)

        threading.Thread(target=look, daemon=True).start()
        try:
            with self.guarded(what):
                yield
        finally:
            done.set()

    def _finish(self, work: Any, what: str) -> None:
        """Wait for a collective that was started, and answer meanwhile those whose own has failed."""
        while self.device.type == "cpu":  # on a GPU the work only enters a queue, and nobody waits here
            try:
                work.wait(timedelta(seconds=LOOK_SECONDS))
                return
            except RuntimeError:
                if work.is_completed():  # it failed; else only this while is over
                    break
                answer(self.members[self.rank], what)
        work.wait()

    def gather(self, numbers: Sequence[int], what: str, dtype: torch.dtype = torch.int64) -> list[list[Any]]:
        """Every rank's numbers, equally many on each."""
        mine = torch.tensor(numbers, dtype=dtype, device=self.device)
        theirs = [torch.zeros_like(mine) for _ in range(self.ranks)]
        with self.guarded(what):
            self._finish(dist.all_gather(theirs, mine, group=self.group, async_op=True), what)
            return torch.stack(theirs).tolist()

    def gather_objects(self, thing: Any, what: str) -> list[Any]:
        """Every rank's plain Python object."""
        theirs: list[Any] = [None] * self.ranks
        with self.answering(what):
            dist.all_gather_object(theirs, thing, group=self.group)
        return theirs

    def sum_(self, tensor: Tensor, what: str, group: dist.ProcessGroup | None = None) -> Tensor:
        """The sum over ranks, or over those of a part of the group, in place; the same bits on every rank."""
        with self.guarded(what):
            self._finish(dist.all_reduce(tensor, group=group or self.group, async_op=True), what)
        return tensor

    def barrier(self, what: str) -> None:
        """Wait for all ranks."""
        with self.guarded(what):
            devices = [torch.cuda.current_device()] if self.mesh.device_type == "cuda" else None
            self._finish(dist.barrier(group=self.group, async_op=True, device_ids=devices), what)

    def all_to_all(self, sent: Tensor, send: Sequence[int], receive: Sequence[int], what: str) -> Callable[[], Tensor]:
        """Start sending the first send[0] elements of a flat tensor to rank 0, … ; the function returned waits for what came."""
        received = sent.new_zeros(sum(receive))
        self.bytes_sent += (sum(send) - send[self.rank]) * sent.element_size()
        with self.guarded(what):
            work: Any = dist.all_to_all_single(received, sent, list(receive), list(send), group=self.group, async_op=True)

        def wait() -> Tensor:
            with self.guarded(what):
                self._finish(work, what)
            return received

        return wait


def _gist(error: Exception) -> str:
    """What the network says, without the place in its source and without its advice."""
    line = str(error).strip().splitlines()[0]
    return line.rpartition(".cc:")[2].partition("] ")[2].partition(". This is typically")[0].rstrip(".") or line.rstrip(".")


def require_agreement(what: str, values: Sequence[Any], members: Sequence[int]) -> None:
    """DisagreementError, naming the ranks, unless all members of a group have the same value."""
    odd = [rank for rank, value in enumerate(values) if value != values[0]]
    if odd:
        shown = ", ".join(f"rank {members[rank]} has {values[rank]!r}" for rank in (0, *odd[:3]))
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
