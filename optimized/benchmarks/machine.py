"""Where numbers were taken: versions, processor, settings and how busy the machine was."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from ..environment import DEFAULTS

RELEVANT = (*DEFAULTS, "OMP_NUM_THREADS", "OMP_WAIT_POLICY", "MOEBIUS_PACK")
PACKAGES = ("torch", "transformers", "numpy")


def load_average() -> list[float]:
    """Of the last 1, 5 and 15 minutes; empty where the system has none."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def _processor(described: Path = Path("/proc/cpuinfo")) -> str:
    """Its name, and on x86 its generation, which a virtual machine's name leaves out."""
    try:
        lines = described.read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    said = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in reversed(lines))}
    generation = f" (family {said['cpu family']}, model {said['model']})" if {"cpu family", "model"} <= said.keys() else ""
    return said.get("model name", platform.processor()) + generation


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def facts() -> dict[str, Any]:
    """The machine and the software, as plain data."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "cores": os.cpu_count(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "native": _native(),
        "python": platform.python_version(),
        "versions": {package: _version(package) for package in PACKAGES},
        "environment": {name: os.environ.get(name) for name in RELEVANT},
    }


def _native() -> str:
    """The instruction set that the compiled kernel uses, or why there is none."""
    from .. import backends
    from ..native.library import load
    from .shapes import SHAPES

    config = next(iter(SHAPES.values())).config
    return backends.why_not("native", torch.device("cpu"), torch.float32, config) or load().instruction_set
