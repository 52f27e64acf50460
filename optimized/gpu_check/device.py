"""The seam between the check and the device: everything that differs between a GPU and the processor that stands in for it in tests."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any, Protocol

import torch

CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.limit", "temperature.gpu", "driver_version")


class Device(Protocol):
    """What the parts ask of a device."""

    name: str

    def facts(self) -> dict[str, Any]:
        """Model, architecture and memory."""
        ...

    def clocks(self) -> dict[str, str]:
        """Clocks, power limit, temperature and driver as they are now; empty where no tool tells."""
        ...

    def free_bytes(self) -> int:
        """Memory that is free now."""
        ...

    def clock(self) -> float:
        """Seconds, after everything that was started is done."""
        ...

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        """Bytes that a call had allocated at most beyond what was there before; None where nobody counts."""
        ...

    def replayed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        """A function that does the same again as one recorded graph, and returns the tensors of the recording."""
        ...


class Cuda:
    """A GPU by PyTorch's name for it, "cuda" (ROCm's too)."""

    name = "cuda"

    def facts(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(0)
        return {
            "device": found.name,
            "architecture": getattr(found, "gcnArchName", None) or f"{found.major}.{found.minor}",
            "processors": found.multi_processor_count,
            "memory": found.total_memory,
            "runtime": torch.version.cuda or torch.version.hip,
        }

    def clocks(self) -> dict[str, str]:
        return read_clocks(shutil.which("nvidia-smi"))

    def free_bytes(self) -> int:
        return torch.cuda.mem_get_info()[0]

    def clock(self) -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        kept = call()
        torch.cuda.synchronize()
        del kept
        return torch.cuda.max_memory_allocated() - before

    def replayed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            call()  # kernels are compiled before a recording
        torch.cuda.current_stream().wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            kept = call()

        def replay() -> Any:
            graph.replay()
            torch.cuda.synchronize()
            return kept

        return replay


class Cpu:
    """The processor with kernels in Triton's interpreter: no time that it measures means anything."""

    name = "cpu"

    def facts(self) -> dict[str, Any]:
        return {"device": "Triton's interpreter", "architecture": "none", "processors": 1, "memory": 0, "runtime": None}

    def clocks(self) -> dict[str, str]:
        return {}

    def free_bytes(self) -> int:
        return 1 << 30

    def clock(self) -> float:
        return time.perf_counter()

    def peak_bytes(self, call: Callable[[], Any]) -> int | None:
        call()
        return None

    def replayed(self, call: Callable[[], Any]) -> Callable[[], Any]:
        return call


DEVICES: dict[str, Callable[[], Device]] = {"cuda": Cuda, "cpu": Cpu}


def read_clocks(tool: str | None) -> dict[str, str]:
    """What `nvidia-smi` at this path tells of the first GPU; empty where there is no such tool or it fails."""
    if tool is None:
        return {}
    try:
        done = subprocess.run(
            [tool, f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=30,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired):
        return {}
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        return {}
    return dict(zip(CLOCKS, (value.strip() for value in lines[0].split(",")), strict=False))
