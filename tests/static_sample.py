"""Work for the processes that compile kernels, which must not import what sets up the interpreter (`conftest.py`)."""

from __future__ import annotations

import random

from optimized.static import figures
from optimized.static.sweep import Plan, jobs
from optimized.static.targets import TARGETS

DATAFLOW = ("--print-code",)  # the disassembler's own way: it follows the flow of data


def readings(plan: Plan, number: int) -> list[tuple[str, bool]]:
    """Compiles a sample; (its kernel and target, whether all is read as after the analysis of the flow of data)."""
    stock, found = figures.disassembled, []

    def both(cubin: bytes) -> str:
        texts = stock(cubin), stock(cubin, *DATAFLOW)
        one, other = ((figures.read_loop(text, figures.NVIDIA), *figures.instructions(text, figures.NVIDIA)) for text in texts)
        found.append((f"{job.role}, {job.target}, {one[0]}", one == other and bool(one[1])))
        return texts[0]

    figures.disassembled = both
    try:
        for job in random.Random(number).sample(jobs(plan), number):
            figures.compiled_figures(job.launch, TARGETS[job.target])
    finally:
        figures.disassembled = stock
    return found
