"""Gradients of the whole: averaged over the ranks that see other tokens, and clipped by a norm that counts every parameter once."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from reference.autograd.tokens import at_least_fp32

from .layer import groups_of
from .transport import Transport


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _missing(parameter: Tensor, transports: tuple[Transport, ...]) -> tuple[Transport, ...]:
    """The groups over which this parameter's gradient has not been added up: those that its own mesh does not span."""
    spanned = parameter.device_mesh.mesh_dim_names or () if isinstance(parameter, DTensor) else ()
    return tuple(t for t in transports if not set(t.names) & set(spanned))


def sync_gradients(module: nn.Module) -> None:
    """Average the gradients of what every rank holds (router, shared experts, everything dense) over the ranks; experts need none.

    Once per optimizer step, after the last backward pass. Sums run in fp32 or better and give the same bits on every rank. What FSDP2
    or DDP has averaged over a mesh dimension already is left alone there. A parameter that has a gradient on some ranks only counts as
    0 on the others; experts that are copied over `data` are averaged over it.
    Raises: ValueError where nothing is parallel; RankLostError.
    """
    transports = groups_of(module)
    buckets: dict[tuple[Any, ...], list[Tensor]] = {}
    for parameter in module.parameters():
        over = _missing(parameter, transports)
        if parameter.requires_grad and over:
            wide = torch.promote_types(parameter.dtype, torch.float32)
            buckets.setdefault((over, wide, parameter.device), []).append(parameter)
    for (over, wide, _), parameters in buckets.items():
        _average(parameters, over, wide)


def _average(parameters: list[Tensor], over: tuple[Transport, ...], wide: torch.dtype) -> None:
    has = [p.grad is not None for p in parameters]
    flat = torch.cat([(torch.zeros_like(_local(p)) if p.grad is None else _local(p.grad)).detach().to(wide).flatten() for p in parameters])
    count = 1
    # How many ranks have each gradient travels with them.
    flat = torch.cat([torch.tensor(has, dtype=wide, device=flat.device), flat])
    for transport in over:
        transport.sum_(flat, "averaging gradients")
        count *= transport.ranks
    anywhere, *pieces = flat.div_(count).split([len(parameters), *(_local(p).numel() for p in parameters)])
    for parameter, exists, piece in zip(parameters, anywhere.tolist(), pieces, strict=True):
        if exists:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            local = _local(parameter.grad)
            local.copy_(piece.view(local.shape))


def clip_grad_norm_(module: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their norm together is at most `max_norm`, and return what it was (clip).

    The factor is that of `torch.nn.utils.clip_grad_norm_`, min(1, max_norm / (norm + 1e-6)). Call it after `sync_gradients`.
    Returns and raises what `gradient_norm` does.
    """
    norm = gradient_norm(module)
    clip_with_norm_(module, max_norm, norm)
    return norm


@torch.no_grad()
def gradient_norm(module: nn.Module) -> Tensor:
    """The norm of all gradients together: norm² = Σ_replicated ‖g‖² + Σ_ranks Σ_sharded ‖g‖², every parameter once, wherever it lives.

    Returns: a scalar in fp64, equal on all ranks.
    Raises: ValueError for a module without parallel layers; RankLostError.
    """
    (transport, *_) = groups_of(module)
    by_mesh: dict[Any, list[Tensor]] = {}
    for gradient in (p.grad for p in module.parameters() if p.grad is not None):
        key = (gradient.device_mesh, gradient.placements) if isinstance(gradient, DTensor) else None
        by_mesh.setdefault(key, []).append(gradient)
    squares = []
    for key, members in by_mesh.items():
        square = sum(at_least_fp32(_local(g)).double().square().sum() for g in members)
        squares.append(square if key is None else _over_mesh(square, key, transport))  # type: ignore[arg-type]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


@torch.no_grad()
def clip_with_norm_(module: nn.Module, max_norm: float, norm: Tensor) -> None:
    """Scale all gradients, whose norm is `norm`, so that it is at most `max_norm`."""
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)
    for gradient in (p.grad for p in module.parameters() if p.grad is not None):
        local = _local(gradient)
        local.mul_(factor.to(local.dtype))


def _over_mesh(square: Tensor, key: Any, transport: Transport) -> Tensor:
    """The sum over the mesh dimensions along which a tensor is cut; copies along others count once."""
    mesh, placements = key
    for dimension, placement in enumerate(placements):
        if not placement.is_replicate():
            transport.sum_(square, "adding up the gradients' norm", mesh.get_group(dimension))
    return square


def optimizer_groups(
    module: nn.Module, parameters: Iterable[tuple[str, nn.Parameter]] | None = None, **options: Any
) -> list[dict[str, Any]]:
    """Parameters as groups for an optimizer, one for each mesh: fused and multi-tensor steps refuse DTensors and tensors in one group.

    parameters: named ones (None: all of the module);  options: of every group, for example weight_decay.
    """
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for _, parameter in module.named_parameters() if parameters is None else parameters:
        if parameter.requires_grad:
            by_mesh.setdefault(parameter.device_mesh if isinstance(parameter, DTensor) else None, []).append(parameter)
    return [{"params": members, **options} for members in by_mesh.values()]
