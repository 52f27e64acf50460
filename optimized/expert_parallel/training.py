"""A training run over several processes: `reference.autograd.training.train`, with the experts of every layer spread over them.

Every process has its share of each micro-batch. A checkpoint is that of one process, so that a run may be resumed on any number of them.
Without noise in the model its losses are those of one process, up to the rounding of sums; with noise every process draws its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from reference.autograd.training import OneProcess, Row
from reference.autograd.transformer import LanguageModel
from reference.config import require
from reference.model_config import ModelConfig

from .checkpoints import distributed, load_full_state_dict, on_rank_0
from .gradients import clip_with_norm_, gradient_norm, sync_gradients
from .layer import groups_of, parallel_layers, parallelize
from .limits import check_supported
from .transport import Transport


def check_run(model: ModelConfig, batch: int, accumulation: int, processes: int) -> None:
    """ValueError that names the value, unless this model can be trained with these batches on so many processes."""
    require(processes >= 1, f"--nproc is {processes}; there must be at least 1 process")
    require(any(model.is_moe(layer) for layer in range(model.layers)), f"the model {model.name!r} has no MoE layer to spread")
    experts = model.moe.experts.networks
    require(processes <= experts, f"--nproc is {processes}, but a layer has {experts} experts: {processes - experts} would have none")
    micro = batch // accumulation
    require(
        micro % processes == 0,
        f"--nproc is {processes}, which does not divide the {micro} sequences of a micro-batch ({batch} / accumulation {accumulation})",
    )
    check_supported(model.moe, model.name)


class Processes(OneProcess):
    """The processes of a mesh dimension, each with whole experts. Made on all of them, for one run.

    assignments [R]: tokens that each process's experts were chosen for since the start;  bytes_sent [R]: by each process's all-to-alls
    Raises ValueError for a mesh of several dimensions: a run cuts no experts, which `parallelize` does in a loop of one's own.
    """

    def __init__(self, mesh: DeviceMesh) -> None:
        require(mesh.ndim == 1, f"mesh has {mesh.ndim} dimensions; a run spreads whole experts over one of them, as in mesh['ep']")
        self.mesh = mesh
        self.rank, self.count = mesh.get_local_rank(), mesh.size()
        self.leader = self.rank == 0
        self.path = (self.rank,) if self.count > 1 else ()
        self.assignments = np.zeros(self.count, np.int64)
        self.bytes_sent = np.zeros(self.count, np.int64)
        self.transport: Transport
        self.mark: int | None = None
        self.last: tuple[list[float], int] = ([], 0)

    def place(self, model: LanguageModel) -> None:
        """`parallelize`."""
        parallelize(model, self.mesh)
        (self.transport,) = groups_of(model)
        self.placements = {number: layer.parallel.placement for number, layer in enumerate(parallel_layers(model))}

    def own(self, windows: np.ndarray) -> np.ndarray:
        """An equal share, in order of the ranks."""
        if self.mark is None:  # a step begins; what was sent between steps, to evaluate, is no part of it
            self.mark = self.transport.bytes_sent
        return np.split(windows, self.count)[self.rank]

    def norm(self, model: nn.Module) -> Tensor:
        """`sync_gradients`, then `gradient_norm`."""
        sync_gradients(model)
        return gradient_norm(model)

    def clip(self, model: nn.Module, limit: float, norm: Tensor) -> None:
        """`clip_with_norm_`."""
        clip_with_norm_(model, limit, norm)

    def observe(self, means: list[float], kept: dict[int, int], load: dict[int, Tensor]) -> tuple[list[float], dict[int, int]]:
        """Means and sums over the processes, whose shares are equally large; keeps what each did and sent."""
        mine = [*means, *kept.values(), self.transport.bytes_sent - (self.mark or 0)]
        self.mark = None
        theirs = self.transport.gather(mine, "adding up what a step did", torch.float64)
        by_rank = self._by_rank(load)
        sent = np.array([row[-1] for row in theirs], np.int64)
        total = by_rank.sum()
        self.last = (by_rank / total if total else by_rank).tolist(), int(sent.sum())
        self.assignments += by_rank
        self.bytes_sent += sent
        sums = np.sum(theirs, axis=0)
        counts = sums[len(means) : -1].astype(np.int64).tolist()
        return (sums[: len(means)] / self.count).tolist(), dict(zip(kept, counts, strict=True))

    def _by_rank(self, load: dict[int, Tensor]) -> np.ndarray:
        """[R]: the load of all layers, by where the experts live; of those that live everywhere, nobody's."""
        found = np.zeros(self.count, np.int64)
        for place, of_experts in zip(self.placements.values(), load.values(), strict=True):
            np.add.at(found, np.array(place.owner), of_experts.cpu().numpy()[: len(place.owner)])
        return found

    def facts(self) -> Row:
        """rank_load: the share of the assignments that each process's experts got in the last step; bytes_sent: by all of them in it."""
        shares, sent = self.last
        return {"rank_load": [round(share, 4) for share in shares], "bytes_sent": sent}

    def report(self) -> str:
        """The same in words."""
        shares, sent = self.last
        return f"  ranks {'/'.join(f'{100 * share:.0f}' for share in shares)} %  {sent / 1e6:.1f} MB"

    def whole(self, tensor: Tensor) -> Tensor:
        """Gathered from all processes."""
        return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor

    def part(self, tensor: Tensor, like: Tensor) -> Tensor:
        """This process's part of moments; a count of steps is no stack."""
        if isinstance(like, DTensor) and tensor.ndim == like.ndim:
            return distributed(tensor, like)
        return super().part(tensor, like)

    def load(self, model: nn.Module, state: dict[str, Tensor]) -> None:
        """`load_full_state_dict`."""
        load_full_state_dict(model, state)

    def write(self, act: Callable[[], object]) -> None:
        """On rank 0, while the others wait and see what it raises."""
        on_rank_0(act, self.transport, "writing a checkpoint", self.transport.group)

    def summary(self) -> list[dict[str, Any]]:
        """For each process: its experts, the assignments that they got in the whole run, the bytes that it sent."""
        place = next(iter(self.placements.values()))
        return [
            {"rank": r, "experts": list(place.local(r)), "assignments": int(self.assignments[r]), "bytes_sent": int(self.bytes_sent[r])}
            for r in range(self.count)
        ]
