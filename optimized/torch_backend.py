"""`backend="torch"`: the experts in stock PyTorch, on any device and without a compiler.

One stable sort on narrow keys, a matrix product per expert into slices of preallocated tensors, and one pass to combine. The gate is
multiplied onto the hidden layer, where it is cheapest: its gradient is then ⟨dh, h⟩, and no expert's output has to be kept.
Equations: (dispatch), (ffn), (combine) of the reference.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.autograd import Routing
from reference.autograd.tokens import at_least_fp32
from reference.config import MoEConfig, require

from .backends import Backend, register
from .contracts import contract
from .experts import ACTIVATIONS, Activation
from .operators import apply_operator, experts_operator, weight_gradients
from .recycling import POOL

# Elements of the widest temporary of a run of experts: large enough to make Python cheap, small enough that what one step writes the
# next still finds in a cache.
BLOCK_ELEMENTS = 1 << 20
FEW_ROWS = 8  # up to here _times_transposed turns the product over; from 12 rows on that was measured to be slower


def sort_by_expert(expert_TK: Tensor, keep_TK: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(order [T·K], bounds [E + 1]) int32: kept assignments t·K + k in expert order, each expert's in their own order, the dropped last.

    The keys are as narrow as the number of experts allows, which makes a radix sort cheap.
    """
    require(expert_TK.numel() < 2**31, f"{expert_TK.numel()} assignments do not fit into 32-bit places; split the batch")
    dtype = next(dtype for dtype in (torch.uint8, torch.int16, torch.int32) if experts <= torch.iinfo(dtype).max)
    kept_TK = keep_TK & (expert_TK >= 0) & (expert_TK < experts)
    key_A, order_A = torch.sort(expert_TK.masked_fill(~kept_TK, experts).to(dtype).flatten(), stable=True)
    # The key dtype of the bounds must match; its range holds 0 … E.
    bounds_P = torch.searchsorted(key_A, torch.arange(experts + 1, dtype=dtype, device=key_A.device), out_int32=True)
    return order_A.to(torch.int32), bounds_P


class _Run:
    """Neighbouring experts that are computed together: their places start … stop, and the rows of each used one."""

    def __init__(self, start: int) -> None:
        self.start = self.stop = start
        self.experts: list[int] = []
        self.rows: list[int] = []

    def take(self, expert: int, rows: int) -> None:
        self.experts.append(expert)
        self.rows.append(rows)
        self.stop += rows


def _runs(ends: list[int], width: int) -> Iterator[_Run]:
    """The used experts in runs of at most BLOCK_ELEMENTS / width rows; an expert with more is a run of its own."""
    run = _Run(0)
    for expert, (start, stop) in enumerate(pairwise(ends)):
        if run.rows and (stop - run.start) * width > BLOCK_ELEMENTS:
            yield run
            run = _Run(start)
        if stop > start:
            run.take(expert, stop - start)
    if run.rows:
        yield run


def _times_transposed(rows_ND: Tensor, weight_MD: Tensor, into_NM: Tensor) -> None:
    """into = rows · weightᵀ, for the [out, in] layout of the parameters.

    For a handful of fp32 rows a CPU's BLAS is up to twice as fast on weight · rowsᵀ with at least two columns, whose small result is
    then turned over.
    """
    count = len(rows_ND)
    if count > FEW_ROWS or weight_MD.dtype != torch.float32 or weight_MD.device.type != "cpu":
        torch.mm(rows_ND, weight_MD.T, out=into_NM)
        return
    if count == 1:
        rows_ND = rows_ND.repeat(2, 1)  # expanding would share a row, which BLAS does not take
    into_NM.copy_(torch.mm(weight_MD, rows_ND.T).T[:count])


def combine(rows_AD: Tensor, order_A: Tensor, tokens: int, dtype: torch.dtype) -> Tensor:
    """y_t = Σ_k rows[place of t, k] (combine), the gates being in the rows already: [T·K, D] → [T, D], summed in fp32 or better."""
    if tokens == 0:
        return rows_AD.new_zeros(0, rows_AD.shape[1], dtype=dtype)
    place_A = torch.empty_like(order_A)
    place_A[order_A] = torch.arange(len(order_A), dtype=order_A.dtype, device=order_A.device)
    return F.embedding_bag(place_A.view(tokens, -1), rows_AD.to(dtype), mode="sum")


def _functions(activation: str | Activation) -> Activation:
    return ACTIVATIONS[activation] if isinstance(activation, str) else activation


def experts_forward(
    x: Tensor, expert: Tensor, gate: Tensor, keep: Tensor, up: Tensor, down: Tensor,
    up_bias: Tensor | None, down_bias: Tensor | None, activation: str | Activation, save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y, pre, order, bounds) of `operators.FORWARD_SCHEMA`; an activation may also be given as its two functions."""
    order_A, bounds_P = sort_by_expert(expert, keep, len(up))
    ends = bounds_P.tolist()
    token_A, gate_A1 = order_A // max(expert.shape[1], 1), gate.flatten().index_select(0, order_A).unsqueeze(1)
    out_AD = up.new_empty(len(order_A), x.shape[1])
    out_AD[ends[-1] :] = 0
    pre_AM = POOL.empty((len(order_A) if save else 0, up.shape[1]), up)
    if save:
        pre_AM[ends[-1] :] = 0
    for run in _runs(ends, up.shape[1]):
        own = slice(run.start, run.stop)
        rows_ND = x.index_select(0, token_A[own]).to(up.dtype)
        own_NM = pre_AM[own] if save else up.new_empty(len(rows_ND), up.shape[1])
        for e, rows, into in zip(run.experts, rows_ND.split(run.rows), own_NM.split(run.rows), strict=True):
            _times_transposed(rows, up[e], into)
            if up_bias is not None:
                into += up_bias[e]
        hidden_NF = _functions(activation).forward(at_least_fp32(own_NM)).mul_(gate_A1[own]).to(up.dtype)
        own_gates = gate_A1[own].split(run.rows)
        for e, hidden, gates, into in zip(run.experts, hidden_NF.split(run.rows), own_gates, out_AD[own].split(run.rows), strict=True):
            _times_transposed(hidden, down[e], into)
            if down_bias is not None:
                into += gates * down_bias[e]
    return combine(out_AD, order_A, len(x), x.dtype), pre_AM, order_A, bounds_P


def experts_backward(
    dy: Tensor, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None,
    pre: Tensor, order: Tensor, bounds: Tensor, activation: str | Activation, weights: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    """The six gradients of `operators.BACKWARD_SCHEMA`.

    With dh' = dy W_down: dg = ⟨dh', h⟩ + ⟨dy, b_down⟩, du = act'(g dh'), dx = Σ_k du W_up, dW_up = duᵀ x, dW_down = dyᵀ (g h).
    """
    ends, dtype = bounds.tolist(), up.dtype
    token_A, gate_A1 = order // max(gate.shape[1], 1), gate.flatten().index_select(0, order).unsqueeze(1)
    drows_AD, dgate_A = up.new_empty(len(order), x.shape[1]), gate.new_zeros(len(order))
    drows_AD[ends[-1] :] = 0
    dup, ddown, dup_bias, ddown_bias = gradients = weight_gradients((up, down, up_bias, down_bias), weights)
    unused = [e for e, (start, stop) in enumerate(pairwise(ends)) if start == stop] if weights else []
    for gradient in gradients:
        for e in unused if len(gradient) else ():
            gradient[e].zero_()
    for run in _runs(ends, up.shape[1]):
        own = slice(run.start, run.stop)
        dout_ND = dy.index_select(0, token_A[own]).to(dtype)
        dhidden_NF = up.new_empty(len(dout_ND), down.shape[2])
        for e, dout, into in zip(run.experts, dout_ND.split(run.rows), dhidden_NF.split(run.rows), strict=True):
            torch.mm(dout, down[e], out=into)
        dhidden_NF, own_N1 = at_least_fp32(dhidden_NF), gate_A1[own]
        hidden_NF, dpre_NM = _functions(activation).backward(dhidden_NF * own_N1, at_least_fp32(pre[own]))
        dgate_A[own] = torch.linalg.vecdot(dhidden_NF, hidden_NF)
        _bias_gradients(run, dout_ND, dpre_NM, own_N1, dgate_A[own], down_bias, dup_bias, ddown_bias)
        dpre_NM = dpre_NM.to(dtype)
        for e, dpre, into in zip(run.experts, dpre_NM.split(run.rows), drows_AD[own].split(run.rows), strict=True):
            torch.mm(dpre, up[e], out=into)
        if weights:
            hidden_NF, rows_ND = hidden_NF.mul_(own_N1).to(dtype), x.index_select(0, token_A[own]).to(dtype)
            parts = (part.split(run.rows) for part in (dpre_NM, rows_ND, dout_ND, hidden_NF))
            for e, dpre, rows, dout, hidden in zip(run.experts, *parts, strict=True):
                torch.mm(dpre.T, rows, out=dup[e])
                torch.mm(dout.T, hidden, out=ddown[e])
    dgate = gate.new_empty(gate.shape)
    dgate.view(-1)[order] = dgate_A
    return combine(drows_AD, order, len(x), x.dtype), dgate, *gradients


def _bias_gradients(
    run: _Run, dout_ND: Tensor, dpre_NM: Tensor, gate_N1: Tensor, dgate_N: Tensor,
    down_bias: Tensor | None, dup_bias: Tensor, ddown_bias: Tensor,
) -> None:  # fmt: skip
    """db_up = Σ du and db_down = Σ g dy of a run's experts, and the part ⟨dy, b_down⟩ of their gates' gradient, all in fp32 or better."""
    if down_bias is None:
        return
    dout_ND = at_least_fp32(dout_ND)
    parts = (part.split(run.rows) for part in (dout_ND, dpre_NM, gate_N1, dgate_N))
    for e, dout, dpre, gates, dgate in zip(run.experts, *parts, strict=True):
        dgate += dout @ at_least_fp32(down_bias[e])
        if len(ddown_bias):
            dup_bias[e] = dpre.sum(0)
            ddown_bias[e] = (gates * dout).sum(0)


OPERATOR = experts_operator("torch", experts_forward, experts_backward)


@contract(
    equals="reference.layer.apply_experts",
    backend="torch",
    grads=("x", "gate", "params"),
    dtypes=("float64", "float32", "bfloat16", "float16"),
    limits="waits for the device once per pass, for the bounds; fp16 is slow on a CPU; no second derivative",
)
def apply_experts(x_TD: Tensor, routing: Routing, params: Mapping[str, Tensor], config: MoEConfig) -> Tensor:
    """The second seam in stock PyTorch (combine): y_t = Σ_k g_tk FFN_{e_tk}(x_t).

    Shapes: x [T, D] → y [T, D], params as `reference.parameter_shapes` names them, fp64, fp32, bf16 or fp16; sums run in fp32 or better.
    Gradient: x, routing.gate and every expert parameter; an unused expert's is exactly 0.
    An expert id that names no expert is a dropped assignment.
    """
    return apply_operator(OPERATOR, x_TD, routing, params, config)


def _unavailable(device: torch.device, dtype: torch.dtype, config: MoEConfig) -> str | None:
    name = config.experts.activation
    return None if name in ACTIVATIONS else f"it has no activation {name!r}, only {', '.join(ACTIVATIONS)}"


register(Backend("torch", 0, (), (torch.float64, torch.float32, torch.bfloat16, torch.float16), _unavailable, apply_experts))
