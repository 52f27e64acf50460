"""Activations of the fast track: forward and hand-derived backward in PyTorch, row by row, in fp32 or better.

The equations are those of `reference.experts`; a backward returns the hidden layer too, so that nobody has to save it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.experts import CLAMP, STEEPNESS

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


def relu2_forward(pre_NM: Tensor) -> Tensor:
    """h = max(u, 0)² (act-relu2): [N, F] → [N, F]."""
    return F.relu(pre_NM).square_()


def relu2_backward(dhidden_NF: Tensor, pre_NM: Tensor) -> tuple[Tensor, Tensor]:
    """(h, du) of (act-relu2): du = 2 max(u, 0) dh."""
    positive_NF = F.relu(pre_NM)
    return positive_NF.square(), positive_NF.mul_(dhidden_NF).mul_(2)


def geglu_forward(pre_NM: Tensor) -> Tensor:
    """h = a Φ(a) ⊙ u (act-geglu): [N, 2F] → [N, F]."""
    gate_proj_NF, up_NF = pre_NM.chunk(2, dim=1)
    return F.gelu(gate_proj_NF).mul_(up_NF)


def geglu_backward(dhidden_NF: Tensor, pre_NM: Tensor) -> tuple[Tensor, Tensor]:
    """(h, [da | du]) of (act-geglu): da = dh ⊙ u (Φ(a) + a φ(a)), du = dh ⊙ a Φ(a)."""
    gate_proj_NF, up_NF = pre_NM.chunk(2, dim=1)
    gelu_NF = F.gelu(gate_proj_NF)
    dgate_proj_NF = _aten.gelu_backward(dhidden_NF * up_NF, gate_proj_NF)
    return gelu_NF * up_NF, torch.cat([dgate_proj_NF, gelu_NF.mul(dhidden_NF)], dim=1)


def clamped_swiglu_forward(pre_NM: Tensor) -> Tensor:
    """h = a σ(1.702 a) ⊙ (u + 1), a clamped above at 7 and u on both sides (act-clamped-swiglu): [N, 2F] → [N, F]."""
    gate_proj_NF, up_NF = pre_NM.chunk(2, dim=1)
    a_NF = gate_proj_NF.clamp(max=CLAMP)
    return torch.sigmoid(STEEPNESS * a_NF).mul_(a_NF).mul_(up_NF.clamp(-CLAMP, CLAMP).add_(1))


def clamped_swiglu_backward(dhidden_NF: Tensor, pre_NM: Tensor) -> tuple[Tensor, Tensor]:
    """(h, [da | du]) of (act-clamped-swiglu): da = dh ⊙ (u + 1) σ (1 + 1.702 a (1 − σ)), du = dh ⊙ a σ, each 0 where it was clamped."""
    gate_proj_NF, up_NF = pre_NM.chunk(2, dim=1)
    a_NF, above_NF = gate_proj_NF.clamp(max=CLAMP), up_NF.clamp(-CLAMP, CLAMP).add_(1)
    s_NF = torch.sigmoid(STEEPNESS * a_NF)
    share_NF = a_NF * s_NF
    slope_NF = s_NF + STEEPNESS * share_NF * (1 - s_NF)
    dgate_proj_NF = (dhidden_NF * above_NF * slope_NF).masked_fill_(gate_proj_NF > CLAMP, 0)
    dup_NF = (dhidden_NF * share_NF).masked_fill_(up_NF.abs() > CLAMP, 0)
    return share_NF.mul_(above_NF), torch.cat([dgate_proj_NF, dup_NF], dim=1)


class Activation(NamedTuple):
    """forward: pre [N, M] → h [N, F]; backward: (dh, pre) → (h, dpre). Neither writes to its arguments."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


ACTIVATIONS: dict[str, Activation] = {
    "relu": Activation(F.relu, relu_backward),
    "gelu": Activation(F.gelu, gelu_backward),
    "swiglu": Activation(swiglu_forward, swiglu_backward),
    "relu2": Activation(relu2_forward, relu2_backward),
    "geglu": Activation(geglu_forward, geglu_backward),
    "clamped_swiglu": Activation(clamped_swiglu_forward, clamped_swiglu_backward),
}
