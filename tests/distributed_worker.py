"""What runs in each rank of the tests of expert parallelism, and how a test starts the ranks."""

from __future__ import annotations

import contextlib
import functools
import os
import socket
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from optimized.expert_parallel import clip_grad_norm_, optimizer_groups, parallelize, sync_gradients
from reference import ModelConfig, Routing
from reference.autograd import params_from_numpy
from reference.autograd.transformer import LanguageModel, cross_entropy
from reference.config import MoEConfig
from reference.proof.cases import Inputs

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


def free_port() -> int:
    """A port that nobody listens on at this moment."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _rank_main(rank: int, world: int, port: int, program: Callable[..., Any], arguments: tuple, folder: str, timeout: float) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    dist.init_process_group("gloo", rank=rank, world_size=world, timeout=timedelta(seconds=timeout))
    try:
        result = ("result", program(*arguments))
    except BaseException as error:
        result = ("error", f"{type(error).__name__}: {error}", traceback.format_exc())
    torch.save(result, Path(folder, f"rank-{rank}"))
    # Groups with a lost rank cannot be destroyed in good order; what matters has been written.
    os._exit(0 if result[0] == "result" else 1)


@dataclass(frozen=True)
class Ended:
    """How a rank ended: its exit code (negative: a signal; None: it had to be killed), what it returned, what it raised, after how long."""

    exitcode: int | None
    result: Any
    error: str
    trace: str
    seconds: float


def run_ranks(
    world: int, program: Callable[..., Any], *arguments: Any, deadline: float, timeout: float = 60, hanging: tuple[int, ...] = ()
) -> list[Ended]:
    """Run program(*arguments) in `world` processes with a gloo group.

    timeout: of a collective, in seconds;  deadline: of everything;  hanging: ranks that nobody waits for.
    Never raises for what a rank does: how each ended is returned.
    """
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed.tensor", "torch.distributed.checkpoint", "torch._dynamo", "transformers"][:3]
    )
    with tempfile.TemporaryDirectory() as folder:
        port, began = free_port(), time.monotonic()
        arguments_of = [(rank, world, port, program, arguments, folder, timeout) for rank in range(world)]
        processes = [context.Process(target=_rank_main, args=given, daemon=True) for given in arguments_of]
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


@functools.cache
def ep_mesh(ranks: int) -> DeviceMesh:
    """The expert dimension of a mesh over all processes: as many groups of `ranks` as there is room for, each doing its own work."""
    return init_device_mesh("cpu", (dist.get_world_size() // ranks, ranks), mesh_dim_names=("dp", "ep"))["ep"]


def spread_even(groups: int, ranks: int) -> list[int]:
    """The rank of each group: blocks."""
    return [group * ranks // groups for group in range(groups)]


def spread_first_empty(groups: int, ranks: int) -> list[int]:
    """Rank 0 has no tokens, where there is another."""
    return [min(1 + group * (ranks - 1) // groups, ranks - 1) for group in range(groups)]


def spread_one_full(groups: int, ranks: int) -> list[int]:
    """The last rank has all tokens."""
    return [ranks - 1] * groups


SPREADS = {"even": spread_even, "first_empty": spread_first_empty, "one_full": spread_one_full}


@dataclass(frozen=True)
class Task:
    """One layer, one step: what goes in. groups [T] is the group of each token, ids [T] its token id; spread: a key of SPREADS."""

    inputs: Inputs
    groups: np.ndarray
    ids: np.ndarray
    spread: str
    training: bool
    replay: Routing | None

    def rank_of_token(self, ranks: int) -> np.ndarray:
        """The rank of each token."""
        count = int(self.groups.max(initial=-1)) + 1
        return np.array(SPREADS[self.spread](count, ranks), np.int64)[self.groups] if count else np.zeros(0, np.int64)


def replay_of(routing: Routing | None, own_T: np.ndarray) -> Routing | None:
    """The part of a routing that belongs to some tokens; the load stays that of all."""
    if routing is None:
        return None
    draws = {name: draw[own_T] for name, draw in routing.draws.items()}
    fields = {name: getattr(routing, name)[own_T] for name in ("expert", "gate", "keep", "logits", "scores")}
    return Routing(**fields, load=routing.load, importance=routing.importance, draws=draws)


def build(config: MoEConfig, params: dict, dtype: str, moe_class: Callable[..., nn.Module]) -> nn.Module:
    """The layer with these parameters."""
    moe = moe_class(config, dtype=DTYPES[dtype])
    moe.load_state_dict(params_from_numpy(params, dtype=DTYPES[dtype]))
    return moe


def full(tensor: Tensor) -> np.ndarray:
    """All of a tensor as an array in fp64."""
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().double().numpy().copy()


def layer_step(task: Task, dtype: str, moe_class: Callable[..., nn.Module], mesh: DeviceMesh | None) -> dict[str, np.ndarray]:
    """One whole optimizer step on one process (mesh None) or on all ranks of a mesh; what came of it, for all tokens, on every rank.

    "y", "dx", "loss", every gradient by its parameter's name, the integers of the routing, the gradients' "norm", and "after.NAME".
    """
    ranks, rank = (1, 0) if mesh is None else (mesh.size(), mesh.get_local_rank())
    own_T = np.flatnonzero(task.rank_of_token(ranks) == rank)
    moe = build(task.inputs.config, task.inputs.params, dtype, moe_class)
    if mesh is not None:
        parallelize(moe, mesh)
    moe.train(task.training)
    x_TD, dy_TD = (torch.from_numpy(array[own_T].copy()).to(DTYPES[dtype]) for array in (task.inputs.x, task.inputs.dy))
    x_TD.requires_grad_()
    replay = replay_of(task.replay, own_T)
    group_ids, token_ids, pad_mask = (torch.from_numpy(array[own_T]) for array in (task.groups, task.ids, task.inputs.pad_mask))
    y_TD, aux = moe(x_TD, group_ids=group_ids, token_ids=token_ids, pad_mask=pad_mask, replay=replay)
    # The objective is the mean over ranks; the parts of the task's sum must therefore be R times as large.
    ((y_TD.double() * dy_TD.double()).sum() * ranks + aux.loss).backward()
    outputs = {"y": y_TD, "dx": x_TD.grad / ranks, "expert": aux.routing.expert, "keep": aux.routing.keep}
    if mesh is not None:
        sync_gradients(moe)
    outputs |= {"loss": aux.loss, "load": aux.routing.load, "importance": aux.routing.importance}
    outputs |= {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in moe.named_parameters()}
    optimizer = torch.optim.AdamW(optimizer_groups(moe), lr=1e-3, eps=1e-3)
    outputs["norm"] = clip_grad_norm_(moe, 0.5) if mesh is not None else nn.utils.clip_grad_norm_(moe.parameters(), 0.5)
    optimizer.step()
    moe.update_bias(aux.routing.load)
    outputs |= {f"after.{name}": tensor for name, tensor in moe.state_dict().items()}
    arrays = {name: array_of(tensor) for name, tensor in outputs.items()}
    return arrays if mesh is None else _gathered(arrays, own_T, [name for name, t in outputs.items() if isinstance(t, DTensor)], mesh)


def array_of(tensor: Tensor) -> np.ndarray:
    """What a rank holds of a tensor, floats in fp64."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    return (local.double() if local.is_floating_point() else local).numpy().copy()


def _gathered(arrays: dict[str, np.ndarray], own_T: np.ndarray, stacks: Sequence[str], mesh: DeviceMesh) -> dict[str, np.ndarray]:
    """Every rank's tokens in their places, and every rank's experts in a row."""
    parts: list[Any] = [None] * mesh.size()
    dist.all_gather_object(parts, (own_T, arrays), group=mesh.get_group())
    whole = {**arrays, **{name: np.concatenate([theirs[name] for _, theirs in parts]) for name in stacks}}
    for name in ("y", "dx", "expert", "keep"):
        whole[name] = np.zeros((sum(len(places) for places, _ in parts), *arrays[name].shape[1:]), arrays[name].dtype)
        for places, theirs in parts:
            whole[name][places] = theirs[name]
    return whole


@contextlib.contextmanager
def counted_traffic() -> Iterator[list[tuple[int, ...]]]:
    """Inside the block: bytes to each rank of the group, for every all-to-all that starts, in order."""
    calls: list[tuple[int, ...]] = []
    original = dist.all_to_all_single

    def counting(output: Tensor, given: Tensor, output_splits: Any, input_splits: Sequence[int], **options: Any) -> Any:
        calls.append(tuple(split * given.element_size() for split in input_splits))
        return original(output, given, output_splits, input_splits, **options)

    dist.all_to_all_single = counting
    try:
        yield calls
    finally:
        dist.all_to_all_single = original


def lm_steps(
    config: ModelConfig, windows: np.ndarray, mesh: DeviceMesh | None, *,
    accumulation: int = 1, checkpointing: bool = False, fsdp: bool = False, steps: int = 2,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Some optimizer steps of a language model on windows [steps, B, S + 1]; what the parameters and the norms are afterwards.

    mesh: None for one process, or a mesh with the dimensions "dp" and "ep", over which the sequences of a batch are spread.
    """
    torch.manual_seed(5)
    model = LanguageModel(config, dtype=torch.float64)
    ranks, rank = (1, 0) if mesh is None else (mesh.size(), dist.get_rank())
    if mesh is not None:
        parallelize(model, mesh["ep"], data=mesh["dp"] if mesh["dp"].size() > 1 else None)
    if fsdp:
        for block in model.layers:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    model.activation_checkpointing = checkpointing
    optimizer = torch.optim.AdamW(optimizer_groups(model), lr=1e-2, eps=1e-3)
    outputs: dict[str, np.ndarray] = {}
    for step in range(steps):
        load: dict[int, Tensor] = {}
        optimizer.zero_grad()
        for micro in np.split(windows[step], accumulation):
            tokens = torch.from_numpy(np.split(micro, ranks)[rank])
            logits_BSV, aux = model(tokens[:, :-1])
            ((cross_entropy(logits_BSV, tokens[:, 1:]) + aux.loss) / accumulation).backward()
            for layer, routing in aux.routing.items():
                load[layer] = load.get(layer, 0) + routing.load
        if mesh is not None:
            sync_gradients(model)
        norm = clip_grad_norm_(model, 0.3) if mesh is not None else nn.utils.clip_grad_norm_(model.parameters(), 0.3)
        optimizer.step()
        model.update_bias(load)
        outputs[f"norm {step}"] = full(norm)
    return outputs | {name: full(tensor) for name, tensor in model.state_dict().items()}
