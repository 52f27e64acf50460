"""`python -m optimized.ladder.count [PATH]`: what each rung launches, moves and keeps, counted on one layer; nothing is timed.

On a CPU with TRITON_INTERPRET=1, or on a GPU. A launch is an operation of PyTorch that computes (no view, no allocation), or a Triton
kernel; it moves every tensor that it reads or writes once.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from reference.autograd import routing_from_numpy
from reference.config import require
from reference.proof.cases import Case, draw

from .. import backends
from .rungs import RUNGS, Rung

CASE = Case("ladder", "the layer on which the rungs are counted", T=256, D=128, F=64, E=16, K=4, load="skewed")
DTYPE = torch.bfloat16
RESULTS = Path(__file__).resolve().parents[2] / "docs/results/ladder.json"
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_local_scalar_dense")


# An operator of the project is opaque to PyTorch; these run kernels.
LAUNCHERS = {"triton_experts": "experts_forward", "triton_experts_backward": "experts_backward"}


class Counter(TorchDispatchMode):
    """Launches, and bytes of the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0
        self.inside_kernel = False  # what Triton's interpreter does with tensors is no launch

    def add(self, *values: Any) -> None:
        """One launch that touches these tensors."""
        tensors = {(t.data_ptr(), t.numel(), t.dtype): t for t in tree_leaves(values) if isinstance(t, Tensor) and t.numel()}
        self.launches += 1
        self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts an operation; of the project's own, what its launcher launches."""
        kwargs = kwargs or {}
        if launcher := LAUNCHERS.get(function.overloadpacket.__name__):
            from ..kernels import launch

            with self:
                return getattr(launch, launcher)(*args, **kwargs)
        out = function(*args, **kwargs)
        if not self.inside_kernel and not function.is_view and function.overloadpacket.__name__ not in ALLOCATIONS:
            self.add(args, kwargs, out)
        return out


class _Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any, counter: Counter) -> None:
        self.kernel, self.counter = kernel, counter

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **named: Any) -> Any:
            self.counter.add(arguments, named)
            self.counter.inside_kernel = True
            try:
                return self.kernel[grid](*arguments, **named)
            finally:
                self.counter.inside_kernel = False

        return launch


@contextmanager
def counted() -> Iterator[Counter]:
    """Inside the block every launch of PyTorch and of the kernels is counted."""
    from ..kernels import launch

    counter = Counter()
    kernels = {name: value for name, value in vars(launch).items() if name.endswith("_kernel")}
    launch.__dict__.update({name: _Counted(kernel, counter) for name, kernel in kernels.items()})
    try:
        with counter:
            yield counter
    finally:
        launch.__dict__.update(kernels)


def count(rung: Rung, device: str) -> dict[str, Any]:
    """Launches and bytes of the forward and the backward, and the bytes that the forward keeps for the backward beside its arguments."""
    inputs = draw(CASE)
    make: Callable[[Any], Tensor] = lambda array: torch.from_numpy(array).to(device, DTYPE).requires_grad_()  # noqa: E731
    params = {name: make(array) for name, array in inputs.params.items()}
    x_TD, dy_TD, routing = make(inputs.x), make(inputs.dy).detach(), routing_from_numpy(inputs.routing, device=device)
    routing = routing._replace(gate=routing.gate.float().requires_grad_())
    given = {t.untyped_storage().data_ptr() for t in (x_TD, routing.expert, routing.gate, routing.keep, *params.values())}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in given:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaves = [x_TD, routing.gate, *(tensor for name, tensor in params.items() if name.startswith("experts."))]
    with saved_tensors_hooks(keep, lambda tensor: tensor), counted() as forward:
        y_TD = rung.apply_experts(x_TD, routing, params, inputs.config)
    with counted() as backward:
        torch.autograd.grad(y_TD, leaves, dy_TD)
    return {
        "name": rung.name, "saves": rung.saves, "backend": rung.backend, "function": f"{rung.apply_experts.__module__}.apply_experts",
        "forward": {"launches": forward.launches, "bytes": forward.bytes},
        "backward": {"launches": backward.launches, "bytes": backward.bytes},
        "saved_bytes": sum(saved.values()),
    }  # fmt: skip


def report() -> dict[str, Any]:
    """All rungs on the same layer. Raises ValueError where one of them cannot run, with the reason."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rungs = [rung for rung in RUNGS if rung.backend != "native" or device == "cpu"]
    for rung in rungs:
        reason = backends.why_not(rung.backend, torch.device(device), DTYPE, CASE.config())
        require(reason is None, f"the rung {rung.name!r} cannot be counted: {reason}")
    shape = {letter: getattr(CASE, letter) for letter in "TDFEK"}
    return {"shape": shape, "load": CASE.load, "dtype": str(DTYPE).removeprefix("torch."), "rungs": [count(rung, device) for rung in rungs]}


def main() -> None:
    """Write the report."""
    result = report()
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for row in result["rungs"]:
        print(f"{row['name']:18} forward {row['forward']}, backward {row['backward']}, saved {row['saved_bytes']} bytes")


if __name__ == "__main__":
    main()
