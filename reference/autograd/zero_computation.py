"""Experts that are no networks, in PyTorch; the equations and sources are those of `reference.zero_computation`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..config import ExpertsConfig
from ..zero_computation import KINDS as NUMPY_KINDS
from ..zero_computation import members
from .tokens import at_least_fp32

Arrays = Mapping[str, Tensor]


def zero_forward(x_ND: Tensor, arrays: Arrays) -> Tensor:
    """Nothing (expert-zero): [N, D] → [N, D]."""
    return torch.zeros_like(x_ND)


def copy_forward(x_ND: Tensor, arrays: Arrays) -> Tensor:
    """The token itself (expert-copy): [N, D] → [N, D]."""
    return x_ND


def constant_forward(x_ND: Tensor, arrays: Arrays) -> Tensor:
    """A mix of the token with a learned vector (expert-constant), in fp32 or better: x [N, D], v [D], W_c [2, D] → [N, D]."""
    x_ND, constant, gate = (at_least_fp32(tensor) for tensor in (x_ND, arrays["constant"], arrays["constant_gate"]))
    own_N, learned_N = (x_ND @ gate.T).softmax(1).unbind(1)
    return own_N[:, None] * x_ND + learned_N[:, None] * constant


KINDS: dict[str, Callable[[Tensor, Arrays], Tensor]] = {"zero": zero_forward, "copy": copy_forward, "constant": constant_forward}


def own_arrays(kind: str, number: int, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What one of these experts learns, by name; nothing for most kinds."""
    return {name: params[f"experts.{name}"][number] for name in NUMPY_KINDS[kind].arrays}


def zero_computation_forward(own_rows: Sequence[Tensor], params: Mapping[str, Tensor], config: ExpertsConfig) -> list[Tensor]:
    """Each of these experts on its own rows, in the order of their ids."""
    return [KINDS[kind](own_ND, own_arrays(kind, number, params)) for own_ND, (kind, number) in zip(own_rows, members(config), strict=True)]
