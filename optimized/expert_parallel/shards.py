"""How one expert is cut: its hidden width F goes to several ranks, and what they compute adds up to what it computes.

    FFN(x) = Σ_parts down[:, part] · act(up[part] · x)

The activation acts on each hidden unit alone, so that a part needs its own rows of the first matrix (of both its halves, where there is a
gate) and its own columns of the second. The second bias may be added once only: every part adds its own slice of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import Shard
from torch.distributed.tensor.placement_types import Placement, _StridedShard
from torch.nn import functional

from reference.config import ExpertsConfig
from reference.experts import ACTIVATIONS, first_matrix

DOWN, DOWN_BIAS = "down_proj", "down_proj_bias"


def _where(name: str, config: ExpertsConfig) -> tuple[int, int]:
    """(dimension along which a stack is cut, how many pieces lie one behind the other there and are cut each)."""
    halves = 2 if ACTIVATIONS[config.activation].gated and name.startswith(first_matrix(config)) else 1
    return (2 if name == DOWN else 1), halves


def cut(stack: Tensor, name: str, config: ExpertsConfig, part: int, parts: int) -> Tensor:
    """One of `parts` parts of a stack of the experts, by its name in the layer: gate_up_proj [L, 2F, D] → [L, 2F / parts, D], …"""
    dimension, halves = _where(name, config)
    return torch.cat([half.chunk(parts, dimension)[part] for half in stack.chunk(halves, dimension)], dimension)


def placements(name: str, config: ExpertsConfig, dimensions: int) -> list[Placement]:
    """The same as a DTensor says it, on a mesh ("ep") or ("ep", "etp")."""
    dimension, halves = _where(name, config)
    width: Any = Shard(dimension) if halves == 1 else _StridedShard(dimension, split_factor=halves)
    return [Shard(0), width][:dimensions]


def is_down_bias(name: str) -> bool:
    """Whether a parameter, named as in the layer, is the bias of the experts' second matrix."""
    return name.rpartition(".")[2] == DOWN_BIAS


def padded_bias(local: Tensor, d_model: int, part: int, parts: int) -> Tensor:
    """A part's slice of the second bias [L, D / parts] in its place, zeros elsewhere: [L, D]."""
    width = d_model // parts
    return functional.pad(local, (part * width, d_model - (part + 1) * width))
