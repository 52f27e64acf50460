"""Every fast path carries a contract, every contract is well formed, and every one that can run here is kept, on every case."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch

import optimized
from optimized import backends, contracts, proofs
from optimized.contracts import CONTRACTS, Contract, contract
from optimized.layer import apply_experts
from optimized.torch_backend import apply_experts as torch_apply_experts
from reference.layer import apply_experts as specification
from reference.proof.cases import CASES, Case, get

CPU = torch.device("cpu")
DTYPES = ("float64", "float32", "tf32", "bfloat16", "float16")


def cases_of(promise: Contract, dtype: str) -> tuple[Case, ...]:
    """All cases; a few where fp16 is emulated, a kernel interpreted (its own tests run them all), or a backend only picked."""
    few = dtype == "float16" or promise.backend in ("triton", backends.AUTO)
    return tuple(map(get, proofs.FEW_CASES)) if few else CASES


KEPT_HERE = [
    pytest.param(promise, dtype, case, id=f"{promise.name}-{dtype}-{case.name}")
    for promise in CONTRACTS.values()
    for dtype in DTYPES
    if promise.equals in proofs.PROOFS and dtype in promise.dtypes and proofs.why_not(promise, dtype) is None
    for case in cases_of(promise, dtype)
]


def seam(x_TD, routing, params, config): ...


@pytest.mark.parametrize("promise, dtype, case", KEPT_HERE)
def test_contracts_are_kept(promise: Contract, dtype: str, case: Case) -> None:
    assert proofs.prove(promise, case, dtype)


def test_something_is_kept_here() -> None:
    kept = {(parameters.values[0].name, parameters.values[1]) for parameters in KEPT_HERE}
    assert {("optimized.torch_backend.apply_experts", dtype) for dtype in DTYPES if dtype != "tf32"} <= kept
    assert proofs.PROOFS.keys() >= {promise.equals for promise in CONTRACTS.values()}, "a promise that nothing proves"
    if proofs.why_not(CONTRACTS["optimized.triton_backend.route"], "float32") is None:
        assert {("optimized.triton_backend.route", "bfloat16"), ("optimized.triton_backend.apply_experts", "tf32")} <= kept
    assert ("optimized.layer.apply_experts", "bfloat16") in kept


def scaled(x_TD, routing, params, config):
    return torch_apply_experts(x_TD, routing, params, config) * 1.001


def gateless(x_TD, routing, params, config):
    return torch_apply_experts(x_TD, routing._replace(gate=routing.gate.detach() + 0 * routing.gate), params, config)


def undropped(x_TD, routing, params, config):
    return torch_apply_experts(x_TD, routing._replace(keep=torch.ones_like(routing.keep)), params, config)


@pytest.mark.parametrize(
    "broken, case, noticed",
    [
        (scaled, "tile", "^y"),
        (scaled, "top-1", "^y"),
        (gateless, "tile", "^dgate"),
        (undropped, "swiglu-bias", "dgate must be exactly 0"),  # its gate of 0 hides the row of a padded token from y, not from dgate
    ],
)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_a_broken_promise_is_noticed(broken: Callable, case: str, noticed: str, dtype: str) -> None:
    promise = Contract("a.b", broken, "reference.layer.apply_experts", "torch", ("x",), (dtype,), "")
    with pytest.raises(AssertionError) as failure:
        proofs.prove(promise, get(case), dtype)
    assert re.search(noticed, str(failure.value), re.MULTILINE)


def seams() -> list[str]:
    """The public functions of `optimized` modules that are called like a seam, or are a backend's: what a fast path looks like."""
    names = []
    for path in sorted(Path(optimized.__path__[0]).glob("*.py")):
        public = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef) and node.name[0] != "_"]
        if path.stem.endswith("_backend") or path.stem == "layer":
            module = import_module(f"optimized.{path.stem}")
            for name in public:
                parameters = list(inspect.signature(getattr(module, name)).parameters)
                if parameters[:1] == ["x_TD"] and "params" in parameters:
                    names.append(f"optimized.{path.stem}.{name}")
    return names


def test_every_fast_path_has_a_contract() -> None:
    assert len(seams()) >= 2 and set(seams()) <= set(CONTRACTS)
    functions = {promise.function for promise in CONTRACTS.values()}
    for backend in backends.BACKENDS.values():
        assert backend.apply_experts in functions, backend.name
        assert backend.route is None or backend.route in functions, backend.name


@pytest.mark.parametrize("promise", CONTRACTS.values(), ids=lambda promise: promise.name)
def test_contracts_belong_to_a_backend_and_state_their_limits(promise: Contract) -> None:
    assert promise.backend in (backends.AUTO, *backends.BACKENDS)
    assert promise.limits and promise.target() is not promise.function
    assert CONTRACTS[promise.name] is promise and inspect.getdoc(promise.function)


def test_the_decorator_returns_the_function_and_registers_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contracts, "CONTRACTS", {})
    terms = {"equals": "reference.layer.apply_experts", "backend": "torch", "grads": ("x",), "dtypes": ("float32",), "limits": "none"}
    assert contract(**terms)(seam) is seam
    (promise,) = contracts.CONTRACTS.values()
    assert promise.function is seam and promise.name.endswith(".seam") and promise.target() is specification
    with pytest.raises(ValueError, match="has a contract already"):
        contract(**terms)(seam)


def swapped(routing, x_TD, params, config): ...


def shorter(x_TD, routing, params): ...


def longer(x_TD, routing, params, config, speed=1): ...


def keyed(x_TD, routing, params, config, *, speed=1): ...


TERMS = {"name": "a.b", "function": seam, "equals": "reference.layer.apply_experts", "backend": "torch",
         "grads": ("x", "gate", "params"), "dtypes": ("float32",), "limits": "none"}  # fmt: skip


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"equals": "reference.layer.nothing"}, "no such function"),
        ({"equals": "reference.nowhere.apply_experts"}, "no such function"),
        ({"equals": "optimized.layer.apply_experts"}, "no such function"),
        ({"function": swapped}, r"takes \(routing, x_TD, params, config\) but"),
        ({"function": shorter}, r"takes \(x_TD, routing, params\) but"),
        ({"function": longer}, "has speed, .* keyword-only"),
        ({"grads": ("x", "y")}, "gradient 'y'; known: x, gate, params"),
        ({"dtypes": ("float33",)}, "dtype 'float33'; known: float64"),
        ({"dtypes": ()}, "names no dtype"),
    ],
)
def test_a_contract_that_cannot_hold_is_refused(changed: dict, message: str) -> None:
    Contract(**TERMS | {"function": keyed})
    with pytest.raises(ValueError, match=message):
        Contract(**TERMS | changed)


def test_only_what_is_promised_is_proven() -> None:
    promise = CONTRACTS["optimized.layer.apply_experts"]
    assert promise.function is apply_experts
    with pytest.raises(ValueError, match="promises nothing in 'float16'"):
        proofs.prove(promise, CASES[0], "float16")
    other = Contract(**TERMS | {"equals": "reference.layer.check_params", "function": lambda params, config: None})
    with pytest.raises(ValueError, match=r"nothing proves equality with 'reference\.layer\.check_params'"):
        proofs.prove(other, CASES[0], "float32")
