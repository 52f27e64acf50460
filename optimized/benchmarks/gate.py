"""No number without this: everything that is timed is first compared with float64, and ours with its contracts."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

from reference.proof import cases

from .. import backends
from ..contracts import CONTRACTS
from ..proofs import prove
from .peers import Runnable
from .shapes import MODES, Problem

TIMED = "reference.layer.apply_experts"
CASES = ("few-tokens", "empty-experts", "one-takes-all", "drops")
# Largest RMS error relative to the truth's RMS that a whole tensor of these sizes may have; some ten times what plain PyTorch has.
LIMITS = {torch.float32: 2e-5, torch.bfloat16: 5e-2}


def broken_contracts(dtypes: Iterable[str], tell: Callable[[str], object] = lambda name: None) -> list[str]:
    """Every promise about what is timed, by the backends that run here, proven on a few cases, output and all gradients; the broken ones,
    in words.
    """
    broken = []
    for promise in CONTRACTS.values():
        if promise.equals != TIMED or not _runs_on_cpu(promise.backend):
            continue
        for dtype in (dtype for dtype in dtypes if dtype in promise.dtypes):
            for name in CASES:
                tell(f"{promise.name}, {dtype}, {name}")
                try:
                    prove(promise, cases.get(name), dtype)
                except Exception as error:  # whatever a fast path raises keeps its numbers out
                    broken.append(f"{promise.name}, {dtype}, {name}: {type(error).__name__}: {error}")
    return broken


def _runs_on_cpu(backend: str) -> bool:
    config = cases.get(CASES[0]).config()
    device = torch.device("cpu")
    return backend == backends.AUTO or (backend != "triton" and backends.why_not(backend, device, torch.float32, config) is None)


Tensors = dict[str, Tensor]


def truth(problem: Problem) -> Tensors:
    """Output and all gradients of (combine) in float64, one expert after the other."""
    x, gate, dy = (tensor.detach().double() for tensor in (problem.x, problem.gate, problem.dy))
    y, dx, dgate = torch.zeros_like(x), torch.zeros_like(x), torch.zeros_like(gate)
    dup, ddown = (torch.zeros(tensor.shape, dtype=problem.x.dtype) for tensor in (problem.up, problem.down))
    for number in problem.expert.unique().tolist():
        token_N, slot_N = torch.where(problem.expert == number)
        rows, gates = x[token_N].requires_grad_(), gate[token_N, slot_N].requires_grad_()
        up, down = (stack.detach()[number].double().requires_grad_() for stack in (problem.up, problem.down))
        with torch.enable_grad():
            gate_proj_NF, up_NF = F.linear(rows, up).chunk(2, dim=1)
            out_ND = F.linear(F.silu(gate_proj_NF) * up_NF, down) * gates[:, None]
        drows, dgates, dup_e, ddown_e = torch.autograd.grad(out_ND, (rows, gates, up, down), dy[token_N])
        y.index_add_(0, token_N, out_ND.detach())
        dx.index_add_(0, token_N, drows)
        dgate[token_N, slot_N] = dgates
        dup[number], ddown[number] = dup_e, ddown_e  # rounded to the dtype of the problem, which is all that is compared
    return {"y": y, "dx": dx, "dgate": dgate, "dup": dup, "ddown": ddown}


def outputs(problem: Problem, runnable: Runnable, mode: str) -> Tensors:
    """What a candidate computes, under the names of `truth`; no gradients in the forward mode."""
    if mode == MODES[0]:
        with torch.no_grad():
            return {"y": runnable.call()}
    forget_gradients(problem, runnable)
    y = runnable.call()
    y.backward(problem.dy)
    found = {"y": y.detach(), "dx": problem.x.grad, "dgate": problem.gate.grad}
    found |= {"dup": _stacked(runnable.up), "ddown": _stacked(runnable.down)}
    forget_gradients(problem, runnable)
    return found  # type: ignore[return-value]


def _stacked(weights: Iterable[Tensor]) -> Tensor:
    gradients = [weight.grad if weight.grad is not None else torch.zeros_like(weight) for weight in weights]
    return gradients[0] if len(gradients) == 1 else torch.stack(gradients)


def forget_gradients(problem: Problem, runnable: Runnable) -> None:
    """Drop all .grad, so that each backward makes them anew."""
    for tensor in (problem.x, problem.gate, *runnable.up, *runnable.down):
        tensor.grad = None


def _norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor, dtype=torch.promote_types(tensor.dtype, torch.float32)))


def differences(found: Tensors, exact: Tensors, dtype: torch.dtype) -> list[str]:
    """Each tensor that is farther from the truth than rounding explains, or not 0 where an expert has no token, in words."""
    wrong = []
    for name, tensor in found.items():
        reference = exact[name]
        same = tensor.shape == reference.shape
        error = _norm(tensor.detach() - reference) / _norm(reference) if same else None
        if error is None:
            wrong.append(f"{name} has shape {tuple(tensor.shape)} instead of {tuple(reference.shape)}")
        elif not error <= LIMITS[dtype]:
            wrong.append(f"{name}: relative error {error:.1e} > {LIMITS[dtype]:.0e}")
        if name in ("dup", "ddown") and error is not None:
            unused = ~reference.flatten(1).any(1)
            if bool(tensor[unused].any()):
                wrong.append(f"{name} is not 0 for an expert without tokens")
    return wrong
