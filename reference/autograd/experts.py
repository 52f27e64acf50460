"""rows_ND → out_ND in PyTorch; the equations and sources are those of `reference.experts`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..config import ExpertsConfig
from ..experts import CLAMP, STEEPNESS, ffn_keys
from .zero_computation import zero_computation_forward

Params = Mapping[str, Tensor]


def relu_forward(pre_NM: Tensor) -> Tensor:
    """ReLU (act-relu): h = max(u, 0), [N, F] → [N, F]."""
    return nn.functional.relu(pre_NM)


def gelu_forward(pre_NM: Tensor) -> Tensor:
    """GELU in its exact form (act-gelu): h = u · Φ(u), [N, F] → [N, F]."""
    return nn.functional.gelu(pre_NM)


def swiglu_forward(pre_NM: Tensor) -> Tensor:
    """SwiGLU (act-swiglu): h = a σ(a) ⊙ u, a and u the first and the second half of the row; [N, 2F] → [N, F]."""
    gate_proj_NF, up_NF = pre_NM.chunk(2, dim=1)
    return nn.functional.silu(gate_proj_NF) * up_NF


def relu2_forward(pre_NM: Tensor) -> Tensor:
    """ReLU squared (act-relu2): h = max(u, 0)², [N, F] → [N, F]."""
    return nn.functional.relu(pre_NM).square()


def geglu_forward(pre_NM: Tensor) -> Tensor:
    """GEGLU (act-geglu): h = a Φ(a) ⊙ u, [N, 2F] → [N, F]."""
    gate_proj_NF, up_NF = pre_NM.chunk(2, dim=1)
    return nn.functional.gelu(gate_proj_NF) * up_NF


def clamped_swiglu_forward(pre_NM: Tensor) -> Tensor:
    """gpt-oss's SwiGLU (act-clamped-swiglu): h = a σ(1.702 a) ⊙ (u + 1), a clamped above at 7 and u on both sides; [N, 2F] → [N, F]."""
    gate_proj_NF, up_NF = pre_NM.chunk(2, dim=1)
    a_NF = gate_proj_NF.clamp(max=CLAMP)
    return a_NF * torch.sigmoid(STEEPNESS * a_NF) * (up_NF.clamp(-CLAMP, CLAMP) + 1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": relu_forward,
    "gelu": gelu_forward,
    "swiglu": swiglu_forward,
    "relu2": relu2_forward,
    "geglu": geglu_forward,
    "clamped_swiglu": clamped_swiglu_forward,
}


def concatenate_gate_up(weight: Tensor) -> Tensor:
    """Rows gate, up, gate, up, … → all gate rows, then all up rows: [E, 2F, …]."""
    return torch.cat([weight[:, ::2], weight[:, 1::2]], dim=1)


def interleave_gate_up(weight: Tensor) -> Tensor:
    """The inverse of `concatenate_gate_up`."""
    return torch.stack(weight.chunk(2, dim=1), dim=2).reshape(weight.shape)


class FFN(NamedTuple):
    """The tensors of one feed-forward network: up [M, D] and down [D, F], with biases [M] and [D] or None; M = 2F where gated."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None


def ffn_forward(x_ND: Tensor, ffn: FFN, activation: str, factor: Tensor | None = None) -> Tensor:
    """One expert (ffn): [N, D] → [N, D], in the dtype of its operands, or that of autocast; factor [N, F]: of the hidden layer."""
    hidden_NF = ACTIVATIONS[activation](nn.functional.linear(x_ND, ffn.up, ffn.up_bias))
    hidden_NF = hidden_NF if factor is None else hidden_NF * factor
    return nn.functional.linear(hidden_NF, ffn.down, ffn.down_bias)


def _unstacked(params: Params, config: ExpertsConfig) -> list[FFN]:
    # One unbind of each stack has one backward; indexing it E times would make E gradients of the whole stack.
    keys = ffn_keys("experts", config)
    up, down, *biases = (params[key].unbind() for key in keys[: 4 if config.bias else 2])
    up_bias, down_bias = biases or ([None] * config.networks, [None] * config.networks)
    return [FFN(*tensors) for tensors in zip(up, down, up_bias, down_bias, strict=True)]


def experts_forward(rows_ND: Tensor, bounds_P: Tensor, params: Params, config: ExpertsConfig, factor: Tensor | None = None) -> Tensor:
    """Every expert on its own rows (experts): rows [N, D] sorted by expert, bounds [E + 1] → out [N, D].

    The loop needs the bounds on the host and waits for the device. An expert without rows runs on zero rows, so its gradient is a 0.
    """
    # One split has one backward; slicing E times would make E gradients of all rows.
    sizes = bounds_P.diff().tolist()
    own_rows = rows_ND.split(sizes)
    factors = [None] * len(sizes) if factor is None else factor.split(sizes)
    each = zip(own_rows, _unstacked(params, config), factors, strict=False)
    parts = [ffn_forward(own_ND, network, config.activation, own) for own_ND, network, own in each]
    others = zero_computation_forward(own_rows[config.networks :], params, config)
    return torch.cat([*parts, *(part.to(parts[0].dtype) for part in others)])


def shared_forward(x_TD: Tensor, params: Params, config: ExpertsConfig) -> Tensor:
    """The shared experts, which every token passes through (shared): [T, D] → [T, D]."""
    up, down, up_bias, down_bias = ffn_keys("shared", config)
    return ffn_forward(x_TD, FFN(params[up], params[down], params.get(up_bias), params.get(down_bias)), config.activation)


class Shared(NamedTuple):
    """out_TD: of the shared experts, weighed; routed_T: what the routed experts' output is multiplied by, None for 1."""

    out_TD: Tensor
    routed_T: Tensor | None = None


def plain_shared(x_TD: Tensor, out_TD: Tensor, params: Params) -> Shared:
    """Both outputs as they are."""
    return Shared(out_TD)


def sigmoid_shared(x_TD: Tensor, out_TD: Tensor, params: Params) -> Shared:
    """Each token weighs the shared experts (shared-sigmoid): y = routed + σ(w·x) · shared."""
    return Shared(torch.sigmoid(nn.functional.linear(x_TD, params["shared.gate"])) * out_TD)


def softmax_shared(x_TD: Tensor, out_TD: Tensor, params: Params) -> Shared:
    """PR-MoE's two-way softmax (shared-softmax): y = c₀ · routed + c₁ · shared."""
    routed_T, shared_T = nn.functional.linear(x_TD, params["shared.gate"], params["shared.gate_bias"]).softmax(1).unbind(1)
    return Shared(shared_T[:, None] * out_TD, routed_T)


SHARED_GATES: dict[str, Callable[[Tensor, Tensor, Params], Shared]] = {
    "none": plain_shared,
    "sigmoid": sigmoid_shared,
    "softmax": softmax_shared,
}


def weighed_shared(x_TD: Tensor, params: Params, config: ExpertsConfig) -> Shared:
    """The shared experts by the rule of config.shared_gate."""
    return SHARED_GATES[config.shared_gate](x_TD, shared_forward(x_TD, params, config), params)
