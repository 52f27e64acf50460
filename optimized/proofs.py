"""The contracts, put to the proof: what a fast function promises is tried on a case of `reference.proof`, in one dtype, on one device.

Tests and the benchmark's gate call `prove` for every row of `CONTRACTS`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from reference.autograd import apply_experts as eager_apply_experts
from reference.autograd import routing_from_numpy
from reference.autograd.conversion import array_of
from reference.config import require
from reference.proof.cases import Case, Inputs, draw
from reference.proof.equal import Report, compare_all, round_to
from reference.proof.parity import assert_experts_equal, experts_truth

from .comparison import FLOAT64_LIMIT
from .contracts import Contract
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


def _prove_apply_experts(function: Callable, case: Case, dtype: str, device: str) -> list[Report]:
    inputs = draw(case).rounded(partial(round_to, dtype=dtype))
    candidate = experts_outputs(function, inputs, dtype, device)
    truth = experts_truth(inputs)
    if dtype == "float64":  # no arithmetic is coarser than the truth's, so a fixed limit takes the yardstick's place
        reports = compare_all(candidate, truth, candidate, dtype)
        failures = [failure for report in reports for failure in report.failures]
        failures += [f"{r.name}: error {r.max_error:.3g} > {FLOAT64_LIMIT:g}" for r in reports if r.max_error > FLOAT64_LIMIT]
        if failures:
            raise AssertionError("\n".join(failures))
        return assert_experts_equal(inputs, candidate, candidate, dtype)
    eager = farthest(lambda turned, _: experts_outputs(eager_apply_experts, turned, dtype), inputs, truth)
    return assert_experts_equal(inputs, candidate, eager, dtype)


PROOFS: dict[str, Callable[[Callable, Case, str, str], list[Report]]] = {"reference.layer.apply_experts": _prove_apply_experts}


def prove(promise: Contract, case: Case, dtype: str, device: str = "cpu") -> list[Report]:
    """The reports on one contract, case and dtype: output and all gradients by the policy of `reference.proof`, with its teeth.

    Raises AssertionError where the contract is broken, ValueError for a dtype it does not name or a target that has no proof.
    """
    require(dtype in promise.dtypes, f"{promise.name} promises nothing in {dtype!r}, only in {', '.join(promise.dtypes)}")
    require(promise.equals in PROOFS, f"nothing proves equality with {promise.equals!r}; known: {', '.join(PROOFS)}")
    return PROOFS[promise.equals](promise.function, case, dtype, device)
