"""`backend="native"`: the experts as one C call on a CPU, compiled for the machine on first use.

The call sorts, gathers, multiplies with the activation in the epilogue of the first product, and combines; the small operations between
them, which cost more than the mathematics where there are few tokens, are gone. Source: `native/moe.c`.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from reference.autograd import Routing
from reference.config import MoEConfig, require

from .backends import Backend, register
from .contracts import contract
from .native.build import UnavailableError
from .native.library import DTYPES, load, make_call
from .native.packing import forget, packed
from .operators import apply_operator, experts_operator, weight_gradients
from .recycling import POOL


def experts_forward(
    x: Tensor, expert: Tensor, gate: Tensor, keep: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, activation: str, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, pre, order, bounds) of `operators.FORWARD_SCHEMA`."""
    library, threads, places = load(), torch.get_num_threads(), expert.numel()
    require(places < 2**31, f"{places} assignments do not fit into 32-bit places; split the batch")
    rows, up, down = x.to(up.dtype).contiguous(), up.contiguous(), down.contiguous()
    y, pre = torch.empty_like(rows), POOL.empty((places if save else 0, up.shape[1]), up)
    order, bounds = expert.new_empty(places, dtype=torch.int32), expert.new_empty(len(up) + 1, dtype=torch.int32)
    trained = save and (up.requires_grad or down.requires_grad)
    if trained:
        forget(up)
    packed_up, packed_down = (None, None) if trained else packed(library, up, down, library.activations[activation], threads)
    inputs = {"x": rows, "expert": expert.contiguous(), "gate": gate.float().contiguous(), "keep": keep.contiguous()}
    weights = {"up": up, "down": down, "up_bias": _dense(up_bias), "down_bias": _dense(down_bias)}
    results = {"packed_up": packed_up, "packed_down": packed_down, "order": order, "bounds": bounds, "pre": pre, "y": y}
    library.forward(make_call(library.activations[activation], threads, **inputs, **weights, **results))
    return y.to(x.dtype), pre, order, bounds


def experts_backward(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
    pre: Tensor, order: Tensor, bounds: Tensor, activation: str, weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The six gradients of `operators.BACKWARD_SCHEMA`."""
    library = load()
    rows, dy, up, down = x.to(up.dtype).contiguous(), dy.to(up.dtype).contiguous(), up.contiguous(), down.contiguous()
    gates = gate.float().contiguous()
    dx, dgate = torch.empty_like(rows), torch.empty_like(gates)
    gradients = weight_gradients((up, down, up_bias, down_bias), weights)
    inputs = {"x": rows, "expert": order.view(gate.shape), "gate": gates, "dy": dy, "pre": pre, "order": order, "bounds": bounds}
    parameters = {"up": up, "down": down, "up_bias": _dense(up_bias), "down_bias": _dense(down_bias)}
    results = dict(zip(("dup", "ddown", "dup_bias", "ddown_bias"), gradients, strict=True))
    call = make_call(library.activations[activation], torch.get_num_threads(), **inputs, **parameters, **results, dx=dx, dgate=dgate)
    library.backward(call)
    return dx.to(x.dtype), dgate.to(gate.dtype), *gradients


def _dense(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


OPERATOR = experts_operator("native", experts_forward, experts_backward)


@contract(
    equals="reference.layer.apply_experts",
    backend="native",
    grads=("x", "gate", "params"),
    dtypes=("float32", "bfloat16"),
    limits="CPU; needs a C compiler once; combines in fp32; no second derivative",
)
def apply_experts(x_TD: Tensor, routing: Routing, params: Mapping[str, Tensor], config: MoEConfig) -> Tensor:
    """The second seam in one C call (combine): y_t = Σ_k g_tk FFN_{e_tk}(x_t).

    Shapes: x [T, D] → y [T, D], params as `reference.parameter_shapes` names them, fp32 or bf16 on a CPU; sums run in fp32. Results do
    not depend on the number of threads, which is `torch.get_num_threads()`.
    Gradient: x, routing.gate and every expert parameter; an unused expert's is exactly 0.
    An expert id that names no expert is a dropped assignment. Raises `native.build.UnavailableError` where there is no compiler.
    """
    return apply_operator(OPERATOR, x_TD, routing, params, config)


def _unavailable(device: torch.device, dtype: torch.dtype, config: MoEConfig) -> str | None:
    try:
        library = load()
    except UnavailableError as reason:
        return str(reason)
    name = config.experts.activation
    return None if name in library.activations else f"it has no activation {name!r}, only {', '.join(library.activations)}"


register(Backend("native", 10, ("cpu",), DTYPES, _unavailable, apply_experts))
