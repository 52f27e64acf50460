"""One of the processes of `pair`: `python -m optimized.expert_parallel.pair_worker RANK RANKS FOLDER` runs what comes through its input."""

from __future__ import annotations

import os
import pickle
import sys
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from reference import Routing
from reference.autograd import params_from_numpy
from reference.proof.cases import Inputs

from ..layer import MoE
from ..tracks import DTYPES, Conditions, Outcome
from .gradients import sync_gradients
from .layer import groups_of

TIMEOUT = timedelta(seconds=60)


def deal_out(group_T: np.ndarray | None, tokens: int, ranks: int) -> np.ndarray:
    """The rank of each token, [T]: groups in blocks, for a group lives on one rank; without groups all tokens are one."""
    if group_T is None:
        return np.zeros(tokens, np.int64)
    present, number_T = np.unique(group_T, return_inverse=True)
    return number_T * ranks // max(len(present), 1)


def part_of(routing: Routing | None, own_T: np.ndarray) -> Routing | None:
    """The part of a routing that belongs to some tokens; load and importance stay those of all."""
    if routing is None:
        return None
    draws = {name: draw[own_T] for name, draw in routing.draws.items()}
    fields = {name: getattr(routing, name)[own_T] for name in ("expert", "gate", "keep", "logits", "scores")}
    return Routing(**fields, load=routing.load, importance=routing.importance, draws=draws)


def one_pass(parallelize: Callable[..., nn.Module], inputs: Inputs, dtype: str, conditions: Conditions) -> Outcome | None:
    """A forward and backward pass of a layer whose experts and tokens are spread over all ranks: the outcome on rank 0, None elsewhere."""
    ranks, kind = dist.get_world_size(), DTYPES[dtype]
    own_T = np.flatnonzero(deal_out(conditions.group_ids, len(inputs.x), ranks) == dist.get_rank())
    moe: nn.Module = MoE(inputs.config, backend="torch", dtype=kind)
    moe.load_state_dict(params_from_numpy(inputs.params, dtype=kind))
    parallelize(moe, init_device_mesh("cpu", (ranks,), mesh_dim_names=("ep",))["ep"])
    moe.train(conditions.training)
    x_TD, dy_TD = (torch.from_numpy(array[own_T].copy()).to(kind) for array in (inputs.x, inputs.dy))
    x_TD.requires_grad_()
    arguments: dict[str, Any] = {"replay": part_of(conditions.replay, own_T)}
    if conditions.group_ids is not None:
        arguments["group_ids"] = torch.from_numpy(conditions.group_ids[own_T])
    if conditions.token_ids is not None:
        arguments["token_ids"] = torch.from_numpy(conditions.token_ids[own_T])
    if inputs.pad_mask.any():
        arguments["pad_mask"] = torch.from_numpy(inputs.pad_mask[own_T])
    y_TD, aux = moe(x_TD, **arguments)
    # Ranks' losses are averaged: the sum over tokens that the cotangent stands for must be R times as large on each of them.
    roots, cotangents = [y_TD], [ranks * dy_TD]
    if aux.loss.requires_grad:
        roots, cotangents = [*roots, aux.loss], [*cotangents, torch.ones_like(aux.loss)]
    torch.autograd.backward(roots, cotangents)
    sync_gradients(moe)
    of_tokens = {name: getattr(aux.routing, name) for name in ("expert", "gate", "keep", "logits", "scores")}
    dx_TD = torch.zeros_like(x_TD) if x_TD.grad is None else x_TD.grad / ranks
    of_tokens |= {"y": y_TD, "dx": dx_TD, **{f"draws.{name}": draw for name, draw in aux.routing.draws.items()}}
    of_all = {"loss": aux.loss, "load": aux.routing.load, "importance": aux.routing.importance}
    of_all |= {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in moe.named_parameters()}
    arrays = {name: _array(tensor) for name, tensor in of_all.items()}
    shares = groups_of(moe)[0].gather_objects((own_T, {name: _array(t) for name, t in of_tokens.items()}), "collecting the outcome")
    return _outcome(shares, arrays) if dist.get_rank() == 0 else None


def _array(tensor: Tensor) -> np.ndarray:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return (whole.double() if whole.is_floating_point() else whole).detach().numpy().copy()


def _outcome(shares: list[tuple[np.ndarray, dict[str, np.ndarray]]], arrays: dict[str, np.ndarray]) -> Outcome:
    """Every rank's tokens in their places."""
    order_T = np.argsort(np.concatenate([own_T for own_T, _ in shares]), kind="stable")
    joined = {name: np.concatenate([part[name] for _, part in shares])[order_T] for name in shares[0][1]}
    draws = {name.removeprefix("draws."): joined.pop(name) for name in list(joined) if name.startswith("draws.")}
    outputs = {"y": joined.pop("y"), "dx": joined.pop("dx")}
    of_all = {name: arrays.pop(name) for name in ("load", "importance")}
    routing = Routing(**joined, **of_all, draws=draws)  # type: ignore[arg-type]
    return Outcome({**outputs, **arrays}, routing)


def main() -> None:
    """Say that the group stands, then answer every message with (True, result) or (False, what was raised), until there are no more."""
    rank, ranks, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    pipe_in, pipe_out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whoever prints must not write into the answers
    torch.set_num_threads(1)
    # A store in a file belongs to no rank, so that it is still there when a rank is not.
    store = dist.FileStore(os.path.join(folder, "store"), ranks)  # pyright: ignore[reportPrivateImportUsage]
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=TIMEOUT)

    def answer(good: bool, value: Any) -> None:
        message = pickle.dumps((good, value))
        pipe_out.write(len(message).to_bytes(8, "little") + message)
        pipe_out.flush()

    answer(True, None)
    while len(header := pipe_in.read(8)) == 8:
        function, arguments = pickle.loads(pipe_in.read(int.from_bytes(header, "little")))
        try:
            result = True, function(*arguments)
        except Exception as error:
            result = False, f"{type(error).__name__}: {error}"
        answer(*result)
    os._exit(0)  # destroying a group waits for the others, which may be gone


if __name__ == "__main__":
    main()
