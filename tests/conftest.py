"""What every test shares: one thread, fixed seeds, NaN in uninitialised memory, and the rule for tools that a machine may lack."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when NumPy and torch are imported, so set before

import importlib.util
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, which torch has not done yet; what compiles kernels runs in a process of its own without it.
    os.environ.setdefault("TRITON_INTERPRET", "1")

REPOSITORY = Path(__file__).resolve().parent.parent


def needs_tool(name: str) -> str:
    """Path of the program `name`, or `name` where a module is called so; without either the test skips, and under MOEBIUS_CI=1 it fails."""
    beside_python = os.path.dirname(sys.executable)
    found = shutil.which(name, path=os.pathsep.join([beside_python, os.environ.get("PATH", "")]))
    if found or importlib.util.find_spec(name):
        return found or name
    reason = f"needs tool: {name}"
    if os.environ.get("MOEBIUS_CI") == "1":
        pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture
def rng() -> np.random.Generator:
    """A NumPy generator in the same state for every test."""
    return np.random.default_rng(0)


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that leaves an element unwritten (an expert without tokens) must not pass because memory happened to hold zeros."""
    for owner, name in [(torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")]:
        monkeypatch.setattr(owner, name, nan_filled(getattr(owner, name)))


def nan_filled(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`allocate`, but what it returns to a function of this project holds NaN."""

    def allocate_nan(*args, **kwargs):
        out = allocate(*args, **kwargs)
        if torch.compiler.is_compiling() or not out.is_floating_point():
            return out
        caller = sys._getframe(1).f_globals.get("__name__", "").split(".")[0]
        return out.fill_(float("nan")) if caller in ("reference", "optimized") else out

    return allocate_nan
