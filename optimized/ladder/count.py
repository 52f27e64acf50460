"""`python -m optimized.ladder.count [PATH]`: what each rung launches, multiplies, moves and keeps; counted, not timed.

On a CPU with TRITON_INTERPRET=1, or on a GPU. A launch is an operation of PyTorch that computes (no view, no allocation), or a Triton
kernel; it moves every tensor that it reads or writes once. FLOPs are those of matrix products: all rows that a product of PyTorch is
given, zeros too; of a kernel, the rows of the experts, not what its last tiles lack.
"""

from __future__ import annotations

import collections
import dataclasses
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
from torch.utils.flop_counter import flop_registry

from reference.autograd import routing_from_numpy
from reference.config import require
from reference.proof.cases import Case, draw

from .. import backends
from .rungs import RUNGS, Rung

CASE = Case("ladder", "the layer on which the rungs are counted", T=256, D=128, F=64, E=16, K=4, load="skewed")
LAYERS = [CASE] + [
    dataclasses.replace(CASE, E=experts, load=load)
    for experts in (8, 16, 32)
    for load in ("even", "skewed", "one_takes_all")
    if (experts, load) != (CASE.E, CASE.load)
]
"""The one of the chapter's table, and those of its figure."""
DTYPE = torch.bfloat16
RESULTS = Path(__file__).resolve().parents[2] / "docs/results/ladder.json"
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "_local_scalar_dense")


# An operator of the project is opaque to PyTorch; these run kernels.
LAUNCHERS = {"triton_experts": "experts_forward", "triton_experts_backward": "experts_backward"}

MATRICES = {
    "project_up_kernel": "UP", "expert_product_kernel": "WEIGHT", "activation_gradient_kernel": "DOWN", "weight_gradient_kernel": "DWEIGHT",
}  # fmt: skip
"""Kernel with a product → its argument that holds all experts' matrices; each row meets one of them."""
RUN = {"histogram_kernel", "scan_kernel", "scatter_kernel", "restore_kernel"}
"""Kernels that run while they are counted, for others go where they say. The rest would take minutes in the interpreter, and no count
hangs on what they compute."""


class Counter(TorchDispatchMode):
    """Launches by name, bytes of the tensors that they read and write, products and their FLOPs (None where a call hides them)."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: collections.Counter[str] = collections.Counter()
        self.bytes = self.products = 0
        self.flops: int | None = 0
        self.inside_kernel = False  # what Triton's interpreter does with tensors is no launch

    @property
    def launches(self) -> int:
        """How many there were."""
        return self.operations.total()

    def add(self, name: str, *values: Any, flops: int | None = 0) -> None:
        """One launch that touches these tensors."""
        tensors = {(t.data_ptr(), t.numel(), t.dtype): t for t in tree_leaves(values) if isinstance(t, Tensor) and t.numel()}
        self.operations[name] += 1
        self.bytes += sum(t.numel() * t.element_size() for t in tensors.values())
        self.products += bool(flops)
        self.flops = None if self.flops is None or flops is None else self.flops + flops

    def result(self) -> dict[str, Any]:
        """As the report holds it."""
        operations = dict(self.operations)
        return {"launches": self.launches, "bytes": self.bytes, "products": self.products, "flops": self.flops, "operations": operations}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Counts an operation; of the project's own, what its launcher launches."""
        kwargs, packet = kwargs or {}, function.overloadpacket
        if launcher := LAUNCHERS.get(packet.__name__):
            from ..kernels import launch

            with self:
                return getattr(launch, launcher)(*args, **kwargs)
        out = function(*args, **kwargs)
        if not self.inside_kernel and not function.is_view and packet.__name__ not in ALLOCATIONS:
            flops = flop_registry[packet](*args, **kwargs, out_val=out) if packet in flop_registry else 0
            self.add(packet.__name__, args, kwargs, out, flops=None if function.namespace == "moebius" else flops)
        return out


class _Counted:
    """A kernel whose launches are counted."""

    def __init__(self, kernel: Any, name: str, counter: Counter) -> None:
        self.kernel, self.name, self.counter = kernel, name, counter

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        def launch(*arguments: Any, **named: Any) -> Any:
            self.counter.inside_kernel = True
            try:
                self.counter.add(self.name, arguments, named, flops=self.flops(arguments))
                return self.kernel[grid](*arguments, **named) if self.name in RUN else None
            finally:
                self.counter.inside_kernel = False

        return launch

    def flops(self, arguments: tuple[Any, ...]) -> int:
        """Twice the entries of an expert's matrix for each row that has an expert."""
        given = dict(zip(self.kernel.arg_names, arguments, strict=False))
        if self.name not in MATRICES:
            return 0
        matrices = given[MATRICES[self.name]]
        return 2 * int(given["BOUNDS"][-1]) * matrices.numel() // len(matrices)


@contextmanager
def counted() -> Iterator[Counter]:
    """Inside the block every launch of PyTorch and of the kernels is counted."""
    from ..kernels import launch

    counter = Counter()
    kernels = {name: value for name, value in vars(launch).items() if name.endswith("_kernel")}
    launch.__dict__.update({name: _Counted(kernel, name, counter) for name, kernel in kernels.items()})
    try:
        with counter:
            yield counter
    finally:
        launch.__dict__.update(kernels)


def count(rung: Rung, device: str, case: Case = CASE) -> dict[str, Any]:
    """What both passes launch, multiply and move, and the bytes that the forward keeps for the backward beside its arguments."""
    inputs = draw(case)
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
    return {"forward": forward.result(), "backward": backward.result(), "saved_bytes": sum(saved.values())}


def describe(case: Case) -> dict[str, Any]:
    """A layer as the report names it: its shape, its kind of load, and how many rows each expert gets."""
    return {"shape": {letter: getattr(case, letter) for letter in "TDFEK"}, "load": case.load, "rows": draw(case).routing.load.tolist()}


def report() -> dict[str, Any]:
    """All rungs on the same layers. Raises ValueError where one of them cannot run, with the reason."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rungs = [rung for rung in RUNGS if rung.backend != "native" or device == "cpu"]
    for rung in rungs:
        reason = backends.why_not(rung.backend, torch.device(device), DTYPE, CASE.config())
        require(reason is None, f"the rung {rung.name!r} cannot be counted: {reason}")
    told = [
        {"name": rung.name, "saves": rung.saves, "backend": rung.backend, "function": f"{rung.apply_experts.__module__}.apply_experts"}
        for rung in rungs
    ]
    layers = [{**describe(case), "counts": [count(rung, device, case) for rung in rungs]} for case in LAYERS]
    return {"dtype": str(DTYPE).removeprefix("torch."), "rungs": told, "layers": layers}


def main() -> None:
    """Write the report."""
    result = report()
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    path.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    for rung, row in zip(result["rungs"], result["layers"][0]["counts"], strict=True):
        forward, backward = ([row[part][key] for key in ("launches", "flops", "bytes")] for part in ("forward", "backward"))
        print(f"{rung['name']:18} launches, FLOPs, bytes: forward {forward}, backward {backward}; saved {row['saved_bytes']} bytes")


if __name__ == "__main__":
    main()
