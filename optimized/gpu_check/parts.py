"""The parts of the check, in the order in which they run."""

from __future__ import annotations

import functools
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..benchmarks.shapes import Shape
from . import problems
from .device import Device
from .results import Results, Step

PACKAGES = ("torch", "triton", "numpy", "transformers", "scattermoe", "megablocks", "sonicmoe", "pytest")
ROOT = Path(__file__).resolve().parents[2]
TEST_SECONDS = 420


@dataclass
class Check:
    """What the parts work with: the device, the results so far, and sizes that a test makes small."""

    device: Device
    results: Results
    shapes: tuple[Shape, ...] = problems.SHAPES
    tokens: tuple[int, ...] = problems.TOKENS
    seconds: float = 1.0
    cases: tuple[str, ...] = ()
    tests: tuple[str, ...] = field(default_factory=lambda: tuple(sorted(str(path) for path in (ROOT / "tests").glob("test_kernels*.py"))))


def environment(check: Check) -> Iterator[Step]:
    """Versions, device and clocks."""
    yield "versions", _versions
    yield "device", lambda: _device(check.device)
    yield "clocks", check.device.clocks


def _versions() -> dict[str, Any]:
    found: dict[str, Any] = {"python": platform.python_version(), "system": platform.platform()}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _device(device: Device) -> dict[str, Any]:
    from ..kernels.blocks import family

    return {**device.facts(), "free": device.free_bytes(), "family of blocks": family()}


def parity(check: Check) -> Iterator[Step]:
    """Every promise of the Triton backend, on every case, in every dtype, on the device."""
    from reference.proof.cases import CASES, get

    from .. import triton_backend
    from ..contracts import CONTRACTS
    from ..experts_proof import prove_experts
    from ..route_proof import prove_route

    cases = tuple(map(get, check.cases)) or CASES
    for prover, function in ((prove_experts, triton_backend.apply_experts), (prove_route, triton_backend.route)):
        name = function.__name__
        for dtype in CONTRACTS[f"{function.__module__}.{name}"].dtypes:
            for case in cases:
                yield f"{name}, {dtype}, {case.name}", functools.partial(_proven, prover, function, case, dtype, check.device.name)


def _proven(prover: Callable[..., list[Any]], function: Callable, case: Any, dtype: str, device: str) -> dict[str, Any]:
    try:
        reports = prover(function, case, dtype, device)
    except AssertionError as error:
        return {"good": False, "why": " ".join(str(error).split())[:800]}
    return {"good": True, "rms_error": max((report.rms_error for report in reports), default=0.0)}


def behaviour(check: Check) -> Iterator[Step]:
    """Bits that must be the same."""
    from . import behaviour as checks

    yield from checks.steps(
        check.device, check.shapes[-1] if len(check.shapes) == 1 else Shape("mixed", 512, 384, 16, 4), min(check.tokens)
    )


def tests(check: Check) -> Iterator[Step]:
    """The kernels' own tests on the device, where pytest is there."""
    for path in check.tests:
        yield Path(path).name, lambda path=path: _pytest(path)


def _pytest(path: str) -> dict[str, Any]:
    from importlib.util import find_spec

    if find_spec("pytest") is None:
        return {"left out": "pytest is not installed"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", path]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TEST_SECONDS, cwd=ROOT, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        return {"good": False, "last": f"not done after {TEST_SECONDS} s"}
    lines = done.stdout.strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
    return {"good": done.returncode in (0, 5), "last": lines[-1] if lines else done.stderr.strip()[-300:], "failed": failed[:20]}


def autotune(check: Check) -> Iterator[Step]:
    """The fastest blocks of every kernel."""
    from . import tuning

    yield from tuning.steps(check.device, check.shapes, check.tokens, check.seconds)


def benchmark(check: Check) -> Iterator[Step]:
    """Ours, tuned and not, against everybody and the dense products."""
    from . import racing

    yield from racing.steps(check.device, check.shapes, check.tokens, check.seconds, check.results.part("autotune")["results"].get)


PARTS: dict[str, Callable[[Check], Iterator[Step]]] = {
    "environment": environment, "parity": parity, "behaviour": behaviour, "tests": tests, "autotune": autotune, "benchmark": benchmark
}  # fmt: skip
