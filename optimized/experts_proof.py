"""The second seam, put to the proof: the experts for a given routing, output and all gradients, by the policy with its teeth."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._python_dispatch import TorchDispatchMode

from reference.autograd import apply_experts as eager_apply_experts
from reference.autograd import routing_from_numpy
from reference.autograd.conversion import array_of
from reference.proof.cases import Case, Inputs, draw
from reference.proof.equal import Report, compare_all, round_to
from reference.proof.parity import assert_experts_equal, experts_truth

from .comparison import FLOAT64_LIMIT
from .yardstick import farthest


def experts_outputs(apply_experts: Callable, inputs: Inputs, dtype: str, device: str = "cpu") -> dict[str, NDArray]:
    """What an `apply_experts` on tensors computes in `dtype`, forward and backward, under the names of `parity.experts_truth`.

    The gates are in fp32, or in fp64 with the rest. A tensor that gets no gradient is an error, not a zero.
    """
    kind = getattr(torch, dtype)
    params = {name: torch.tensor(array, dtype=kind, device=device, requires_grad=True) for name, array in inputs.params.items()}
    x_TD, dy_TD = (torch.from_numpy(array).to(device, kind) for array in (inputs.x, inputs.dy))  # keeps the strides
    gate_TK = torch.tensor(inputs.routing.gate, dtype=torch.promote_types(kind, torch.float32), device=device, requires_grad=True)
    x_TD.requires_grad_()
    routing = routing_from_numpy(inputs.routing, device=device)._replace(gate=gate_TK)
    y_TD = apply_experts(x_TD, routing, params, inputs.config)
    leaves = {"dx": x_TD, "dgate": gate_TK, **{name: tensor for name, tensor in params.items() if name.startswith("experts.")}}
    gradients = torch.autograd.grad(y_TD, list(leaves.values()), dy_TD)
    outputs = {"y": y_TD, **dict(zip(leaves, gradients, strict=True))}
    return {name: np.asarray(array_of(tensor), np.float64) for name, tensor in outputs.items()}


def prove_experts(function: Callable, case: Case, dtype: str, device: str = "cpu") -> list[Report]:
    """The reports on an `apply_experts` for the routing of a case, which drops and pads as the case says. Raises AssertionError."""
    kind = "float32" if dtype == "tf32" else dtype
    inputs = draw(case).rounded(partial(round_to, dtype=kind))
    with matmul_precision("high" if dtype == "tf32" else "highest"):
        candidate = experts_outputs(function, inputs, kind, device)
    truth = experts_truth(inputs)
    if dtype == "float64":
        require_good(compare_all(candidate, truth, candidate, dtype), dtype)
        return assert_experts_equal(inputs, candidate, candidate, dtype)

    def eager(turned: Inputs, _: NDArray) -> dict[str, NDArray]:
        with Tf32Products() if dtype == "tf32" else contextlib.nullcontext():
            return experts_outputs(eager_apply_experts, turned, kind)

    return assert_experts_equal(inputs, candidate, farthest(eager, inputs, truth), dtype)


class Tf32Products(TorchDispatchMode):
    """Inside the block every matrix product takes its fp32 operands as a tensor core does that is given them as they are: it ignores
    the low 13 bits of the mantissa. In the backward too."""

    # Where the two operands stand; addmm and baddbmm begin with what is added.
    OPERANDS: ClassVar[dict[Any, int]] = {torch.ops.aten.mm: 0, torch.ops.aten.bmm: 0, torch.ops.aten.addmm: 1, torch.ops.aten.baddbmm: 1}

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """The call itself, on shortened operands where it is a product."""
        first = self.OPERANDS.get(function.overloadpacket)
        if first is not None and args[first].dtype == torch.float32:
            cut = ((operand.detach().contiguous().view(torch.int32) & ~0x1FFF).view(torch.float32) for operand in args[first : first + 2])
            args = (*args[:first], *cut, *args[first + 2 :])
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """Inside the block `torch.set_float32_matmul_precision` is this: "high" allows tf32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def require_good(reports: list[Report], dtype: str) -> list[Report]:
    """The reports. Raises AssertionError for a failure; in float64 no arithmetic is coarser than the truth's, and a fixed limit holds."""
    failures = [failure for report in reports for failure in report.failures]
    if dtype == "float64":
        failures += [f"{r.name}: error {r.max_error:.3g} > {FLOAT64_LIMIT:g}" for r in reports if r.max_error > FLOAT64_LIMIT]
    if failures:
        raise AssertionError("\n".join(failures))
    return reports
