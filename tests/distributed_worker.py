"""What runs in each rank of the tests of expert parallelism."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from optimized.expert_parallel import clip_grad_norm_, optimizer_groups, parallelize, sync_gradients
from optimized.expert_parallel.layer import groups_of
from optimized.expert_parallel.pair_worker import part_of
from reference import ModelConfig, Routing
from reference.autograd import MoE, params_from_numpy
from reference.autograd.transformer import LanguageModel, cross_entropy
from reference.config import MoEConfig
from reference.proof.cases import Inputs

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}


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
    ranks, rank = (1, 0) if mesh is None else (mesh.size(), place_in(mesh))
    own_T = np.flatnonzero(task.rank_of_token(ranks) == rank)
    moe = build(task.inputs.config, task.inputs.params, dtype, moe_class)
    if mesh is not None:
        parallelize(moe, mesh)
    moe.train(task.training)
    x_TD, dy_TD = (torch.from_numpy(array[own_T].copy()).to(DTYPES[dtype]) for array in (task.inputs.x, task.inputs.dy))
    x_TD.requires_grad_()
    replay = part_of(task.replay, own_T)
    group_ids, token_ids, pad_mask = (torch.from_numpy(array[own_T]) for array in (task.groups, task.ids, task.inputs.pad_mask))
    previous = {"previous_logits": _previous_logits(task, dtype)[own_T].requires_grad_()} if task.inputs.config.scores.residual else {}
    y_TD, aux = moe(x_TD, group_ids=group_ids, token_ids=token_ids, pad_mask=pad_mask, replay=replay, **previous)
    # The objective is the mean over ranks; the parts of the task's sum must therefore be R times as large.
    ((y_TD.double() * dy_TD.double()).sum() * ranks + aux.loss).backward()
    outputs = {"y": y_TD, "dx": x_TD.grad / ranks, "expert": aux.routing.expert, "keep": aux.routing.keep}
    if previous:
        outputs["dprevious"] = previous["previous_logits"].grad / ranks  # type: ignore[operator]
    if mesh is not None:
        sync_gradients(moe)
    outputs |= {"loss": aux.loss, "load": aux.routing.load, "importance": aux.routing.importance}
    outputs |= {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in moe.named_parameters()}
    optimizer = torch.optim.AdamW(optimizer_groups(moe), lr=1e-3, eps=1e-3)
    outputs["norm"] = clip_grad_norm_(moe, 0.5) if mesh is not None else nn.utils.clip_grad_norm_(moe.parameters(), 0.5)
    optimizer.step()
    moe.update_bias(aux.routing.load)
    outputs |= {f"after.{name}": tensor for name, tensor in moe.state_dict().items()}
    whole = mesh is not None and mesh.ndim > 1  # where widths are cut too, rows of ranks are no rows of the stack
    arrays = {name: full(t) if whole and isinstance(t, DTensor) else array_of(t) for name, t in outputs.items()}
    stacks = [] if whole else [name for name, t in outputs.items() if isinstance(t, DTensor)]
    return arrays if mesh is None else _gathered(arrays, own_T, stacks, moe)


def _previous_logits(task: Task, dtype: str) -> Tensor:
    """What the router of the layer before said of every token, always the same."""
    shape = len(task.inputs.x), task.inputs.config.experts.count
    return torch.from_numpy(np.random.default_rng(7).standard_normal(shape)).to(DTYPES[dtype])


def place_in(mesh: DeviceMesh) -> int:
    """This process's number in a mesh of any dimensions, the last one running fastest."""
    return int((mesh.mesh == dist.get_rank()).flatten().nonzero().item())


def array_of(tensor: Tensor) -> np.ndarray:
    """What a rank holds of a tensor, floats in fp64."""
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
    return (local.double() if local.is_floating_point() else local).numpy().copy()


def _gathered(arrays: dict[str, np.ndarray], own_T: np.ndarray, stacks: Sequence[str], moe: nn.Module) -> dict[str, np.ndarray]:
    """Every rank's tokens in their places, and every rank's experts in a row."""
    (transport, *_) = groups_of(moe)
    parts = transport.gather_objects((own_T, arrays), "gathering results")
    whole = {**arrays, **{name: np.concatenate([theirs[name] for _, theirs in parts]) for name in stacks}}
    for name in {"y", "dx", "dprevious", "expert", "keep"} & arrays.keys():
        whole[name] = np.zeros((sum(len(places) for places, _ in parts), *arrays[name].shape[1:]), arrays[name].dtype)
        for places, theirs in parts:
            whole[name][places] = theirs[name]
    return whole


def stepped(config: MoEConfig, mesh: DeviceMesh | None, seed: int, steps: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A layer, on a mesh or on one process (None), and its optimizer after some steps."""
    torch.manual_seed(seed)
    moe: Any = MoE(config)
    if mesh is not None:
        parallelize(moe, mesh)
    optimizer = torch.optim.AdamW(optimizer_groups(moe), lr=0.1)
    for _ in range(steps):
        y_TD, aux = moe(torch.randn(5, config.d_model))
        (y_TD.square().sum() + aux.loss).backward()
        if mesh is not None:
            sync_gradients(moe)
        optimizer.step()
        moe.update_bias(aux.routing.load)
    return moe, optimizer


def all_state(moe: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Copies of all parameters, buffers and moments, whole on every rank."""
    state = {name: tensor.detach() for name, tensor in moe.state_dict().items()}
    named = {p: name for name, p in moe.named_parameters()}
    state |= {f"{key} of {named[p]}": value for p, moments in optimizer.state.items() for key, value in moments.items()}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).clone() for name, t in state.items()}


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
    accumulation: int = 1, checkpointing: bool = False, fsdp: bool = False, ddp: bool = False, compiled: str = "", steps: int = 2,
) -> dict[str, np.ndarray]:  # fmt: skip
    """Some optimizer steps of a language model on windows [steps, B, S + 1]; what the parameters and the norms are afterwards.

    mesh: None for one process, or a mesh with the dimensions "dp", "ep" and perhaps "etp", over which the sequences of a batch are spread.
    compiled: backend of torch.compile, "" for none.
    """
    torch.manual_seed(5)
    model = LanguageModel(config, dtype=torch.float64)
    ranks, rank = (1, 0) if mesh is None else (mesh.size(), dist.get_rank())
    if mesh is not None:
        experts = mesh["ep", "etp"] if "etp" in (mesh.mesh_dim_names or ()) else mesh["ep"]
        parallelize(model, experts, data=mesh["dp"] if mesh["dp"].size() > 1 else None)
    if fsdp:
        for block in model.layers:
            fully_shard(block, mesh=mesh["dp"])
        fully_shard(model, mesh=mesh["dp"])
    model.activation_checkpointing = checkpointing
    run: nn.Module = nn.parallel.DistributedDataParallel(model) if ddp else model
    if compiled:
        run = torch.compile(run, backend=compiled)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(optimizer_groups(model), lr=1e-2, eps=1e-3)
    outputs: dict[str, np.ndarray] = {}
    for step in range(steps):
        load: dict[int, Tensor] = {}
        optimizer.zero_grad()
        for micro in np.split(windows[step], accumulation):
            tokens = torch.from_numpy(np.split(micro, ranks)[rank])
            logits_BSV, aux = run(tokens[:, :-1])
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
