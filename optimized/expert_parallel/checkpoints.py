"""State that outlives the ranks: distributed checkpoints for any number of ranks, and the plain state dict of one process."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from reference.autograd import MoE
from reference.autograd.checkpoints import check_tensors
from reference.config import require
from reference.experts import ACTIVATIONS, first_matrix

from .layer import groups_of
from .transport import Transport


def full_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The state dict that one process would have, on every rank: plain tensors, in the order of `module.state_dict()`; for safetensors.

    All ranks call it together.
    """
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in module.state_dict().items()}


@torch.no_grad()
def load_full_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Copy one process's state dict into a parallel module; each rank takes its own rows, and nothing is sent.

    Raises ValueError, before anything is changed, naming a tensor that is missing, unknown, or of another shape or dtype.
    """
    own = module.state_dict()
    check_tensors(state, own, "the state dict")
    for name, tensor in own.items():
        if isinstance(tensor, DTensor):
            tensor.to_local().copy_(local_part(state[name], tensor))
        else:
            tensor.copy_(state[name])


def local_part(full: Tensor, like: DTensor) -> Tensor:
    """This rank's part of a full tensor, cut as `like` is along each mesh dimension."""
    return distributed(full, like).to_local()


def distributed(full: Tensor, like: DTensor) -> DTensor:
    """A full tensor, which every rank has, spread as `like` is; nothing is sent."""
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def _state(module: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """What a distributed checkpoint holds, as views of what the module and the optimizer hold."""
    gated = _gated_stacks(module)
    state: dict[str, Any] = {"model": {n: _in_halves(t) if n in gated else t for n, t in module.state_dict().items()}}
    if optimizer is not None:
        found: dict[str, Any] = get_optimizer_state_dict(module, optimizer)
        moments = {n: {m: _in_halves(t) if n in gated and t.ndim > 1 else t for m, t in of.items()} for n, of in found["state"].items()}
        state["optimizer"] = {**found, "state": moments}
    return state


def _gated_stacks(module: nn.Module) -> set[str]:
    """The experts' stacks whose rows are two halves, by their names in the state dict."""
    names = set()
    for prefix, layer in module.named_modules():
        if isinstance(layer, MoE) and ACTIVATIONS[layer.config.experts.activation].gated:
            start = f"{prefix}.experts." if prefix else "experts."
            names |= {start + first_matrix(layer.config.experts) + end for end in ("", "_bias")}
    return names


def _in_halves(stack: Tensor) -> Tensor:
    """[E, 2F, …] seen as [E, 2, F, …]: a rank's part of the width is then one block of it, which is all that a checkpoint can store."""
    shape = torch.Size((stack.shape[0], 2, stack.shape[1] // 2, *stack.shape[2:]))
    if not isinstance(stack, DTensor):
        return stack.view(shape)
    local = stack.to_local()
    places = [place if place.is_replicate() or getattr(place, "dim", 0) == 0 else Shard(2) for place in stack.placements]
    view = local.view(local.shape[0], 2, local.shape[1] // 2, *local.shape[2:])
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(view, stack.device_mesh, places, run_check=False, shape=shape, stride=stride)


def save_sharded(path: str | os.PathLike[str], module: nn.Module, optimizer: torch.optim.Optimizer | None = None, **extra: Any) -> Path:
    """Write a distributed checkpoint as the directory `path`: every rank its own part, seen under its name only when all of it is there.

    extra: small plain objects beside the tensors (a step, a config), equal on all ranks. All ranks of the default group call it together;
    the directory must be on a file system that all of them see. It is written beside its place, and renamed by rank 0 when all is on disk.
    Raises: ValueError where `path` exists; RankLostError; what the file system raises, and then nothing is at `path`.
    """
    path = Path(path)
    (transport, *_) = groups_of(module)
    what = f"saving {path.name}"
    temporary = path.with_name(f".{path.name}.tmp")

    def prepare() -> None:
        require(not path.exists(), f"{path} exists already; a checkpoint is never overwritten")
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)  # what a killed save left behind

    def finish() -> None:
        _sync(temporary)
        os.replace(temporary, path)
        _sync(path.parent, files=False)

    on_rank_0(prepare, transport, what)
    with transport.answering(what):
        save({**_state(module, optimizer), "extra": extra}, checkpoint_id=temporary)
    on_rank_0(finish, transport, what)
    return path


def on_rank_0(act: Callable[[], object], transport: Transport, what: str, group: dist.ProcessGroup | None = None) -> None:
    """Do something on the first rank of a group (None: of all); the others wait for it, and raise the OSError or ValueError it raised."""
    outcome: list[Exception | None] = [None]
    if dist.get_rank(group) == 0:
        try:
            act()
        except (OSError, ValueError) as error:
            outcome = [error]
    with transport.answering(what):
        dist.broadcast_object_list(outcome, group=group, group_src=0)
    if outcome[0] is not None:
        raise outcome[0]


def _sync(directory: Path, *, files: bool = True) -> None:
    for entry in [*(directory.iterdir() if files else ()), directory]:
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def load_sharded(
    path: str | os.PathLike[str], module: nn.Module, optimizer: torch.optim.Optimizer | None = None, **extra: Any
) -> dict[str, Any]:
    """Read a checkpoint of any number of ranks into a module on this number, bit by bit, and the optimizer's state with it.

    extra: the names that were saved, with values of their types to be replaced. Returns: the saved ones. A module that is not parallel
    can be read into as well, with or without a process group. Raises: ValueError where there is no whole checkpoint at `path`.
    """
    path = Path(path)
    require((path / ".metadata").is_file(), f"{path} holds no whole distributed checkpoint")
    state = {**_state(module, optimizer), "extra": dict(extra)}
    load(state, checkpoint_id=path)
    own = module.state_dict()
    module.load_state_dict({name: _as(own[name], tensor) for name, tensor in state["model"].items()})
    if optimizer is not None:
        found: dict[str, Any] = state["optimizer"]
        moments = {n: {m: _as(own[n], t) if t.ndim > 1 else t for m, t in of.items()} for n, of in found["state"].items()}
        restored: Any = {**found, "state": moments}
        set_optimizer_state_dict(module, optimizer, restored)
    return state["extra"]


def _as(like: Tensor, tensor: Tensor) -> Tensor:
    """The inverse of `_in_halves`: the tensor in the shape and cut of `like`."""
    if tensor.shape == like.shape:
        return tensor
    if not isinstance(like, DTensor) or not isinstance(tensor, DTensor):
        return tensor.view(like.shape)
    local = tensor.to_local().flatten(1, 2)
    return DTensor.from_local(local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride())
