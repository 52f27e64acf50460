"""From two plain functions to one differentiable PyTorch operator: what every backend shares.

A backend brings a forward and a backward that know nothing of autograd, `torch.compile` or fake tensors. Registered here they become
opaque operators with shapes, gradients and a place in exported programs; host synchronisation inside them is theirs to decide.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

from reference.autograd import Routing
from reference.autograd.layer import apply_experts_forward
from reference.config import MoEConfig
from reference.expert_dropout import NAME as DROPOUT
from reference.experts import ffn_keys

from .recycling import POOL
from .zero_computation import add_zero_computation

# PyTorch has no public name for these; a version without them gets the longer way.
_any_autocast: Callable[[], bool] = getattr(torch._C, "_is_any_autocast_enabled", lambda: True)
_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transforms: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: True)
_innermost: Callable[[], Any] = getattr(getattr(torch._C, "_functorch", None), "peek_interpreter_stack", lambda: None)

FORWARD_SCHEMA = (
    "(Tensor x, Tensor expert, Tensor gate, Tensor keep, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, "
    "str activation, bool save) -> (Tensor y, Tensor pre, Tensor order, Tensor bounds)"
)
BACKWARD_SCHEMA = (
    "(Tensor dy, Tensor x, Tensor gate, Tensor up, Tensor down, Tensor? up_bias, Tensor? down_bias, "
    "Tensor pre, Tensor order, Tensor bounds, str activation, bool weights)"
    " -> (Tensor dx, Tensor dgate, Tensor dup, Tensor ddown, Tensor dup_bias, Tensor ddown_bias)"
)


_PLAIN: dict[Any, Callable[..., tuple[Tensor, ...]]] = {}  # operator → the function that it was made from


def _shortest(operator: Any, tensor: Tensor) -> Callable[..., tuple[Tensor, ...]]:
    """The operator's own function, where nobody looks at the operator: its way through the dispatcher costs as much as a token's experts.

    Only where no gradient is wanted. Not for tracing, for a mode, for a transform of functions, for a subclass of tensors, and for tensors
    without numbers.
    """
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # pyright: ignore[reportPrivateImportUsage]
    watched = traced or tensor.is_meta or type(tensor) not in (Tensor, Parameter)
    return operator if watched or _modes() or _transforms() else _PLAIN[operator]


def lacks_derivative() -> bool:
    """Whether a derivative is taken that no operator of ours has: forward mode, whose tangents it would drop, or `torch.func.grad`."""
    if getattr(forward_ad, "_current_level", -1) >= 0:
        return True
    transform = None if torch.compiler.is_compiling() else _innermost()
    return transform is not None and transform.key().name == "Grad"


def experts_operator(name: str, forward: Callable[..., tuple[Tensor, ...]], backward: Callable[..., tuple[Tensor, ...]]) -> Any:
    """Register `moebius::{name}_experts` with `moebius::{name}_experts_backward` as its gradient, and return it.

    forward   FORWARD_SCHEMA. x [T, D] and y are of one dtype, up [E, M, D] and down [E, D, F] of the dtype that is computed in, gate [T, K]
              in fp32 or better, expert [T, K] int64, keep [T, K] bool. An expert id outside 0 … E − 1 is a dropped assignment.
              pre [T·K, M], the layer before its activation in expert order, is wanted where `save` says so, else it is [0, M].
              order [T·K] int32: the assignment t·K + k in place n of expert order, dropped ones last; bounds [E + 1] int32: whose
              places are whose. pre is 0 in the places after the last bound.
    backward  BACKWARD_SCHEMA, with the saved tensors of the forward. The gradient of an expert without rows, and of a dropped
              assignment, is exactly 0. Weight gradients that are not wanted, or have no weight, are returned with shape [0].
    Saved for the backward: x, the gates, pre, order, bounds and the weights; nothing that was gathered.
    """
    operator = torch.library.custom_op(f"moebius::{name}_experts", forward, mutates_args=(), schema=FORWARD_SCHEMA)
    gradient = torch.library.custom_op(f"moebius::{name}_experts_backward", backward, mutates_args=(), schema=BACKWARD_SCHEMA)
    _PLAIN[operator] = forward
    operator.register_fake(_forward_shapes)
    gradient.register_fake(_backward_shapes)

    def run_backward(ctx: Any, dy: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if dy is None:
            return (None,) * 10
        wanted = [ctx.needs_input_grad[place] for place in (0, 2, 4, 5, 6, 7)]
        gradients = gradient(dy, *ctx.saved_tensors, ctx.activation, any(wanted[2:]))
        dx, dgate, *dweights = (value if want else None for value, want in zip(gradients, wanted, strict=True))
        return dx, None, dgate, None, *dweights, None, None

    def refuse(ctx: Any, *_: Any) -> None:
        raise NotImplementedError(f"{name}_experts has no second derivative; reference.autograd.MoE has, and takes the same state dict")

    operator.register_autograd(run_backward, setup_context=_save)
    gradient.register_autograd(refuse)
    return operator


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, _, gate, _, up, down, up_bias, down_bias, activation, _ = inputs
    _, pre, order, bounds = output
    ctx.set_materialize_grads(False)  # or autograd would fill a cotangent of pre with zeros
    ctx.mark_non_differentiable(pre, order, bounds)
    ctx.save_for_backward(x, gate, up, down, up_bias, down_bias, pre, order, bounds)
    ctx.activation = activation


def _forward_shapes(
    x: Tensor, expert: Tensor, gate: Tensor, keep: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, activation: str, save: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    places = expert.numel()
    order, bounds = (expert.new_empty(size, dtype=torch.int32) for size in (places, up.shape[0] + 1))
    return x.new_empty(x.shape), up.new_empty(places if save else 0, up.shape[1]), order, bounds


def _backward_shapes(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
    pre: Tensor, order: Tensor, bounds: Tensor, activation: str, weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    return x.new_empty(x.shape), gate.new_empty(gate.shape), *weight_gradients((up, down, up_bias, down_bias), weights)


def weight_gradients(tensors: tuple[Tensor | None, ...], wanted: bool) -> list[Tensor]:
    """Uninitialised contiguous gradients of up, down and the two biases; shape [0] where there is nothing to fill."""
    like = next(tensor for tensor in tensors if tensor is not None)
    return [POOL.empty(tensor.shape if wanted and tensor is not None else (0,), like) for tensor in tensors]


def apply_operator(operator: Any, x_TD: Tensor, routing: Routing, params: Mapping[str, Tensor], config: MoEConfig) -> Tensor:
    """The second seam through a registered operator: y [T, D] in the dtype of x. Under autocast the experts compute in its dtype.

    A pass with expert dropout, in forward mode or inside `torch.func.grad` takes the reference's way.
    """
    if DROPOUT in routing.draws or lacks_derivative():  # no operator drops hidden units, or carries tangents
        return apply_experts_forward(x_TD, routing, params, config)
    dtype = compute_dtype(x_TD)
    weights = [params.get(key) for key in ffn_keys("experts", config.experts)]
    needs_gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x_TD, routing.gate, *weights))
    cast = [tensor if tensor is None else tensor.to(dtype) for tensor in weights]
    x, expert, gate, keep = x_TD, routing.expert, routing.gate, routing.keep
    if config.experts.gate_inputs:  # each assignment becomes a token of its own, whose gate is in its input (gate-input)
        x = (x_TD[:, None] * gate[..., None]).to(x_TD.dtype).flatten(0, 1)
        expert, gate, keep = expert.reshape(-1, 1), torch.ones_like(gate).reshape(-1, 1), keep.reshape(-1, 1)
    run = operator if needs_gradient else _shortest(operator, x)
    out = run(x, expert, gate, keep, *cast, config.experts.activation, needs_gradient)[0]
    if config.experts.gate_inputs:
        return out.view(*routing.expert.shape, x_TD.shape[1]).sum(1, dtype=routing.gate.dtype).to(x_TD.dtype)
    return add_zero_computation(out, x_TD, routing, params, config.experts) if config.experts.zero_computation else out


def compute_dtype(x_TD: Tensor) -> torch.dtype:
    """The dtype in which the experts multiply: that of x, or autocast's."""
    if not _any_autocast():
        return x_TD.dtype
    device = x_TD.device.type
    under_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if under_autocast else x_TD.dtype
