"""The contracts, put to the proof: what a fast function promises is tried on a case of `reference.proof`, in one dtype, on one device.

Tests and the benchmark's gate call `prove` for every row of `CONTRACTS`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from reference.config import require
from reference.proof.cases import CASES, Case
from reference.proof.equal import Report, compare_all
from reference.proof.parity import cancellation_scales, layer_truth

from . import backends, expert_parallel, ladder, layer  # noqa: F401 (their contracts)
from .comparison import case_inputs, rounded_to, teeth
from .contracts import CONTRACTS, Contract
from .expert_parallel.pair import pair
from .experts_proof import experts_outputs, prove_experts, require_good
from .route_proof import prove_route
from .yardstick import eager_outputs

__all__ = ["CONTRACTS", "FEW_CASES", "PROOFS", "experts_outputs", "prove", "why_not"]

FEW_CASES = ("few-tokens", "empty-experts", "drops", "gelu-bias", "swiglu-bias")
"""One of every kind, for where all of them would take too long."""


def _prove_parallelize(function: Callable, case: Case, dtype: str, device: str) -> list[Report]:
    """The whole layer, changed by `function` on each of two processes, on the case's routing."""
    from .expert_parallel.pair_worker import one_pass

    inputs, conditions = case_inputs(case)
    inputs = rounded_to(inputs, dtype)
    arguments = conditions._asdict()
    truth, scales = layer_truth(inputs, **arguments), cancellation_scales(inputs, **arguments)
    found = pair().run(one_pass, function, inputs, dtype, conditions).outputs
    eager = found if dtype == "float64" else eager_outputs(inputs, truth, dtype, conditions)
    accepted = () if dtype == "float64" else teeth(inputs, conditions, dtype).accepted
    if accepted:
        raise AssertionError(f"the comparison accepts what is wrong: {', '.join(accepted)}")
    return require_good(compare_all(found, truth, eager, dtype, scales=scales), dtype)


PROOFS: dict[str, Callable[[Callable, Case, str, str], list[Report]]] = {
    "reference.layer.apply_experts": prove_experts,
    "reference.autograd.layer.route_forward": prove_route,
    "reference.layer.moe_forward": _prove_parallelize,
}


def prove(promise: Contract, case: Case, dtype: str, device: str = "cpu") -> list[Report]:
    """The reports on one contract, case and dtype: output and all gradients by the policy of `reference.proof`, with its teeth.

    Raises AssertionError where the contract is broken, ValueError for a dtype it does not name or a target that has no proof.
    """
    require(dtype in promise.dtypes, f"{promise.name} promises nothing in {dtype!r}, only in {', '.join(promise.dtypes)}")
    require(promise.equals in PROOFS, f"nothing proves equality with {promise.equals!r}; known: {', '.join(PROOFS)}")
    return PROOFS[promise.equals](promise.function, case, dtype, device)


def why_not(promise: Contract, dtype: str, device: str = "cpu") -> str | None:
    """Why the backend of a contract cannot run on this machine's device in this dtype, or None."""
    if promise.backend == backends.AUTO:
        return None
    kind = torch.float32 if dtype == "tf32" else getattr(torch, dtype)
    return backends.why_not(promise.backend, torch.device(device), kind, CASES[0].config())
