"""Activations of the fast track: forward and hand-derived backward in PyTorch, row by row, in fp32 or better.

The equations are those of `reference.experts`; a backward returns the hidden layer too, so that nobody has to save it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

_aten = torch.ops.aten


def relu_backward(dhidden_NF: Tensor, pre_NM: Tensor) -> tuple[Tensor, Tensor]:
    """(h, du) of (act-relu): du = dh where u > 0."""
    return F.relu(pre_NM), _aten.threshold_backward(dhidden_NF, pre_NM, 0)


def gelu_backward(dhidden_NF: Tensor, pre_NM: Tensor) -> tuple[Tensor, Tensor]:
    """(h, du) of (act-gelu), the exact form: du = dh (Φ(u) + u φ(u))."""
    return F.gelu(pre_NM), _aten.gelu_backward(dhidden_NF, pre_NM)


def swiglu_forward(pre_NM: Tensor) -> Tensor:
    """h = a σ(a) ⊙ u (act-swiglu): [N, 2F] → [N, F]."""
    gate_proj_NF, up_NF = pre_NM.chunk(2, dim=1)
    return F.silu(gate_proj_NF).mul_(up_NF)


def swiglu_backward(dhidden_NF: Tensor, pre_NM: Tensor) -> tuple[Tensor, Tensor]:
    """(h, [da | du]) of (act-swiglu): da = dh ⊙ u σ(a) (1 + a (1 − σ(a))), du = dh ⊙ a σ(a)."""
    gate_proj_NF, up_NF = pre_NM.chunk(2, dim=1)
    dpre_NM = torch.empty_like(pre_NM)
    dgate_proj_NF, dup_NF = dpre_NM.chunk(2, dim=1)
    silu_NF = F.silu(gate_proj_NF)
    torch.mul(dhidden_NF, silu_NF, out=dup_NF)
    _aten.silu_backward.grad_input(dhidden_NF * up_NF, gate_proj_NF, grad_input=dgate_proj_NF)
    return silu_NF.mul_(up_NF), dpre_NM


class Activation(NamedTuple):
    """forward: pre [N, M] → h [N, F]; backward: (dh, pre) → (h, dpre). Neither writes to its arguments."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, relu_backward),
    "gelu": Activation(F.gelu, gelu_backward),
    "swiglu": Activation(swiglu_forward, swiglu_backward),
}
