"""What a pass knows beside the vectors, as tensors: groups, padding, random draws; and whether values are checked."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import require
from ..tokens import TokenInfo as HostTokens


def as_it_is(sum_over_tokens: Tensor) -> Tensor:
    """The total of a batch that is all here."""
    return sum_over_tokens


class TokenInfo(NamedTuple):
    """Facts about the T tokens of a pass; the fields of `reference.tokens.TokenInfo`, and:

    length  real tokens of each group where the host knows them without asking the device (no group ids, no padding), else None
    total   a sum over these tokens → the sum over all tokens of the batch, which may be spread over ranks; groups never are
    """

    group_T: Tensor
    groups: int
    real_T: Tensor
    token_ids_T: Tensor | None
    length: int | None
    total: Callable[[Tensor], Tensor] = as_it_is
    previous_TE: Tensor | None = None

    def real_per_group(self) -> Sequence[int]:
        """Number of real tokens in each group, on the host; waits for the device where `length` is None."""
        return count_per_group(self.group_T, self.real_T, self.groups).tolist() if self.length is None else [self.length] * self.groups


def count_per_group(group_T: Tensor, real_T: Tensor, groups: int) -> Tensor:
    """Number of real tokens in each group, [B] int64, on the device."""
    return torch.zeros(groups, dtype=torch.int64, device=group_T.device).index_add(0, group_T, real_T.long())


def _check(name: str, given: Any, shape: torch.Size, *, boolean: bool) -> None:
    require(isinstance(given, Tensor), f"{name} must be a tensor, got {type(given).__name__}")
    require(given.shape == shape, f"{name} has shape {tuple(given.shape)}; x has tokens of shape {tuple(shape)}, and so must {name}")
    is_integer = not (given.is_floating_point() or given.is_complex() or given.dtype == torch.bool)
    fits = given.dtype == torch.bool if boolean else is_integer
    require(fits, f"{name} has dtype {given.dtype}; it must be {'bool' if boolean else 'integer'}")


def token_info(
    shape: torch.Size,
    token_ids: Tensor | None = None,
    group_ids: Tensor | None = None,
    pad_mask: Tensor | None = None,
    previous_logits: Tensor | None = None,
    *,
    device: torch.device | None = None,
) -> TokenInfo:
    """TokenInfo of tokens arranged as `shape` = x.shape[:-1]: (T) is one group, (…, S) is one group for each leading index.

    Shapes: token_ids, group_ids int and pad_mask bool (True: padding), all of that shape; previous_logits [T, E], kept as they are.
    Numbering given group_ids waits for the device. Raises: ValueError where a shape or dtype of the first three differs.
    """
    for name, given in (("token_ids", token_ids), ("group_ids", group_ids), ("pad_mask", pad_mask)):
        if given is not None:
            _check(name, given, shape, boolean=name == "pad_mask")
    tokens, length = math.prod(shape), shape[-1]  # Size.numel would turn a symbolic size into a number
    if group_ids is not None:
        present, group_T = torch.unique(group_ids.flatten(), return_inverse=True)
        groups = len(present)
    else:
        groups = min(tokens, 1) if len(shape) == 1 else math.prod(shape[:-1])
        group_T = torch.arange(tokens, device=device) // max(length, 1)
    real_T = torch.ones(tokens, dtype=torch.bool, device=device) if pad_mask is None else ~pad_mask.flatten()
    ids_T = None if token_ids is None else token_ids.flatten()
    length = length if group_ids is None and pad_mask is None else None
    return TokenInfo(group_T, groups, real_T, ids_T, length, previous_TE=previous_logits)


class Draws:
    """The random numbers of one pass, by name: drawn once and recorded in `taken`, or those of a replayed pass.

    Without `rng` the default generator of the device draws, whose state `torch.utils.checkpoint` restores before it recomputes.
    """

    def __init__(self, rng: torch.Generator | None, replayed: Mapping[str, Any] | None = None) -> None:
        self.rng = rng
        self.replayed = replayed
        self.taken: dict[str, Tensor] = {}

    def uniform(self, name: str, shape: torch.Size, like: Tensor) -> Tensor:
        """Numbers from U(0, 1) on the device of `like`, in its dtype, at least fp32. Raises ValueError when a replay has no such draws."""
        if self.replayed is None:
            dtype = torch.promote_types(like.dtype, torch.float32)
            self.taken[name] = torch.rand(shape, generator=self.rng, device=like.device, dtype=dtype)
        else:
            require(name in self.replayed, f"replay holds no draws named {name!r}: it was recorded without this noise")
            found = torch.as_tensor(self.replayed[name], device=like.device)
            require(found.shape == shape, f"replay holds draws {name!r} of shape {tuple(found.shape)}; this pass needs {tuple(shape)}")
            self.taken[name] = found
        return self.taken[name]


def on_host(tokens: TokenInfo) -> HostTokens:
    """The same facts as arrays, for what the NumPy level decides; waits for the device."""
    ids_T = None if tokens.token_ids_T is None else tokens.token_ids_T.cpu().numpy()
    return HostTokens(tokens.group_T.cpu().numpy(), tokens.groups, tokens.real_T.cpu().numpy(), ids_T)


class HostDraws:
    """Stands where `reference.tokens.Draws` stands and hands out arrays of what a `Draws` of tensors draws, replays and records."""

    def __init__(self, draws: Draws, like: Tensor) -> None:
        self.draws = draws
        self.like = like

    def uniform(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        """`Draws.uniform`, as an array."""
        return self.draws.uniform(name, torch.Size(shape), self.like).cpu().numpy()


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in its own dtype, or in fp32 where that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A region in which autocast lowers nothing. Inputs must still be cast: asking autocast for fp32 leaves bf16 operands as they are."""
    available = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if available else contextlib.nullcontext()


def checks_values() -> bool:
    """Whether MOEBIUS_CHECK=1 asks for checks that depend on tensor values, each of which waits for the device."""
    return os.environ.get("MOEBIUS_CHECK") == "1"
