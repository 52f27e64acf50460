"""What each fast function promises, as data: which reference function it equals, with which gradients, in which dtypes.

Tests, documentation and the benchmark's gate enumerate `CONTRACTS`; a fast path without a contract is a failing test.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import TypeVar

from reference.config import require
from reference.proof.equal import MANTISSA_BITS

Function = TypeVar("Function", bound=Callable)

GRADIENTS = ("x", "gate", "params")
"""Of what a fast function can promise gradients."""


@dataclass(frozen=True)
class Contract:
    """One promise: `function` computes what `equals` computes, judged by `reference.proof`.

    name       "module.function" of the fast one;  equals: "module.function" of its specification
    backend    the row of the backend table that it belongs to, or "auto" where it picks one itself
    grads      which gradients exist, of GRADIENTS
    dtypes     names in which the equality is tested; limits: what it cannot do, in words
    of_module  the function changes a module, whose calls then compute what `equals` computes: its own arguments are others
    """

    name: str
    function: Callable
    equals: str
    backend: str
    grads: tuple[str, ...]
    dtypes: tuple[str, ...]
    limits: str
    of_module: bool = False

    def __post_init__(self) -> None:
        for kind, values, known in (("gradient", self.grads, GRADIENTS), ("dtype", self.dtypes, tuple(MANTISSA_BITS))):
            for value in values:
                require(value in known, f"the contract of {self.name} names the {kind} {value!r}; known: {', '.join(known)}")
        require(bool(self.dtypes), f"the contract of {self.name} names no dtype")
        target = self.target()
        if not self.of_module:
            _check_parameters(self.name, self.function, self.equals, target)

    def target(self) -> Callable:
        """The reference function. Raises ValueError where there is none of this name."""
        module, _, function = self.equals.rpartition(".")
        try:
            found = getattr(import_module(module), function, None) if module.split(".")[0] == "reference" else None
        except ModuleNotFoundError:
            found = None
        require(callable(found), f"the contract of {self.name} equals {self.equals!r}, but the reference has no such function")
        return found  # type: ignore[return-value]


def _check_parameters(name: str, function: Callable, equals: str, target: Callable) -> None:
    """Same parameters in the same order and of the same kind; what the fast function has beside them can only be given by keyword."""
    own, expected = (list(inspect.signature(f).parameters.values()) for f in (function, target))
    extra = [parameter for parameter in own if parameter.name not in inspect.signature(target).parameters]
    common = [parameter for parameter in own if parameter not in extra]
    wanted, got = ([(p.name, p.kind) for p in parameters] for parameters in (expected, common))
    require(wanted == got, f"{name} takes ({_names(common)}) but {equals} takes ({_names(expected)})")
    positional = [parameter.name for parameter in extra if parameter.kind is not inspect.Parameter.KEYWORD_ONLY]
    require(not positional, f"{name} has {', '.join(positional)}, which {equals} has not; it can only be keyword-only")


def _names(parameters: list[inspect.Parameter]) -> str:
    return ", ".join(parameter.name for parameter in parameters)


CONTRACTS: dict[str, Contract] = {}
"""Name of the fast function → its contract; `contract` enters it."""


def contract(
    *, equals: str, grads: tuple[str, ...], dtypes: tuple[str, ...], limits: str, backend: str, of_module: bool = False
) -> Callable[[Function], Function]:
    """Decorator that enters a function into CONTRACTS and returns it unchanged; the arguments are the fields of `Contract`.

    Raises ValueError where the reference has no such function or one with other parameters, and for a second contract of one name.
    """

    def register(function: Function) -> Function:
        name = f"{function.__module__}.{function.__qualname__}"
        require(name not in CONTRACTS, f"{name} has a contract already")
        CONTRACTS[name] = Contract(name, function, equals, backend, grads, dtypes, limits, of_module)
        return function

    return register
