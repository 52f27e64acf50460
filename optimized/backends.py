"""The table of implementations behind `optimized.MoE`, and which of them runs.

A module `optimized/…_backend.py` calls `register` when it is imported; nothing else has to know about it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

import torch
from torch import Tensor

from reference.autograd import Routing
from reference.config import MoEConfig, require

AUTO = "auto"


@dataclass(frozen=True)
class Backend:
    """One implementation of the routed experts.

    name, rank       what it is called; "auto" tries the highest rank first
    devices, dtypes  what it is made for; elsewhere "auto" passes it over without a word. An empty tuple: everything
    unavailable      (device, dtype, config) → why it cannot run, or None; called inside `devices` and `dtypes` alone, and may be slow
                     the first time
    apply_experts    the second seam: (x [T, D], routing, params, config) → y [T, D]
    route            the first seam, with the arguments and results of `reference.autograd.layer.route_forward`; None: that one
    note             what else to say where it is asked to run outside its devices or dtypes
    """

    name: str
    rank: int
    devices: tuple[str, ...]
    dtypes: tuple[torch.dtype, ...]
    unavailable: Callable[[torch.device, torch.dtype, MoEConfig], str | None]
    apply_experts: Callable[[Tensor, Routing, Mapping[str, Tensor], MoEConfig], Tensor]
    route: Callable[..., tuple[Routing, dict[str, Tensor]]] | None = None
    note: str = ""

    def out_of_range(self, device: torch.device, dtype: torch.dtype) -> str | None:
        """Why this device or dtype is none that the backend is made for, or None."""
        note = f" ({self.note})" if self.note else ""
        if self.devices and device.type not in self.devices:
            return f"it runs on {' and '.join(self.devices)}, not on {device.type}{note}"
        if self.dtypes and dtype not in self.dtypes:
            return f"it computes in {', '.join(map(str, self.dtypes))}, not in {dtype}{note}"
        return None


BACKENDS: dict[str, Backend] = {}
"""Name → backend; `register` enters it."""
_warned: set[tuple[str, str]] = set()


def register(backend: Backend) -> None:
    """Enter a backend into the table. Raises ValueError for a name or rank that is taken."""
    require(backend.name != AUTO, f"{AUTO!r} is no backend's name: it picks one")
    require(backend.name not in BACKENDS, f"a backend {backend.name!r} is registered already")
    ranks = {other.rank: other.name for other in BACKENDS.values()}
    require(backend.rank not in ranks, f"backend {backend.name!r} has rank {backend.rank}, which {ranks.get(backend.rank)!r} has")
    BACKENDS[backend.name] = backend


def names() -> tuple[str, ...]:
    """All backends, the one that "auto" prefers first."""
    return tuple(sorted(BACKENDS, key=lambda name: -BACKENDS[name].rank))


def check_name(name: Any) -> str:
    """The name itself. Raises ValueError unless it is "auto" or in the table."""
    require(name == AUTO or name in BACKENDS, f"backend is {name!r}; known: {', '.join((AUTO, *names()))}")
    return name


def why_not(name: str, device: torch.device, dtype: torch.dtype, config: MoEConfig) -> str | None:
    """Why a backend cannot run this layer on this device in this dtype, or None where it can. Raises ValueError for an unknown name."""
    require(name in BACKENDS, f"backend is {name!r}; known: {', '.join(names())}")
    return BACKENDS[name].out_of_range(device, dtype) or BACKENDS[name].unavailable(device, dtype, config)


def resolve(name: str, device: torch.device, dtype: torch.dtype, config: MoEConfig) -> Backend:
    """The backend that runs: the named one, or with "auto" the best that can.

    A better one that was made for this device and dtype and still cannot run is worth one warning with the reason.
    Raises ValueError for an unknown name, and with the reason where the named backend (or every backend) cannot run.
    """
    return BACKENDS[_choose(name, device, dtype, config)]


@torch.compiler.assume_constant_result  # what is asked here (a compiler, an interpreter, a file) is not for a traced program
def _choose(name: str, device: torch.device, dtype: torch.dtype, config: MoEConfig) -> str:
    check_name(name)
    if name != AUTO:
        reason = why_not(name, device, dtype, config)
        require(reason is None, f"backend {name!r} cannot run this layer: {reason}; use backend={AUTO!r}, which finds one that can")
        return name
    reasons = {}
    for candidate in names():
        reasons[candidate] = why_not(candidate, device, dtype, config)
        if reasons[candidate] is None:
            _warn_once({c: r for c, r in reasons.items() if r and not BACKENDS[c].out_of_range(device, dtype)}, candidate)
            return candidate
    listed = "; ".join(f"{candidate}: {reason}" for candidate, reason in reasons.items())
    raise ValueError(f"no backend can run this layer: {listed}")


def _warn_once(skipped: dict[str, str], chosen: str) -> None:
    for name, reason in skipped.items():
        if (name, reason) not in _warned:
            _warned.add((name, reason))
            warnings.warn(f"backend {name!r} would be faster but cannot run: {reason}; {chosen!r} runs instead", stacklevel=5)


def _load() -> None:
    package = __package__ or "optimized"
    for module in iter_modules(import_module(package).__path__):
        if module.name.endswith("_backend"):
            import_module(f"{package}.{module.name}")


_load()
