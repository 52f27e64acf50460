"""Compiles one launch and reads the machine code: registers, spills, shared memory, matrix instructions, copies, the matrix loop."""

# pyright: reportAttributeAccessIssue=false
# Triton's modules are loaded on demand, which a type checker does not see.

from __future__ import annotations

import ast
import contextlib
import hashlib
import io
import json
import os
import re
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend

from ..native.build import cache_directories
from .capture import Launch
from .targets import TARGETS, Target

TOOLS = Path(nvidia.__file__).resolve().parent / "bin"
TOOL_SECONDS = 120


class Figures(NamedTuple):
    """What one compiled kernel needs and does.

    registers               of one lane
    spilled                 bytes that a lane's registers spill to memory (AMD: vector registers that spill, and bytes of scratch)
    shared                  bytes of one program;  resident: programs that a core holds at once;  occupancy: share of its warps
    matrix, matrix_count    kind of the matrix instructions ("" where there is none) and how many the code has
    async_copies            instructions that copy from global to shared memory without passing through registers
    loop                    instructions of the loop around the arithmetic, 0 without one; loop_matrix, loop_async, loop_local: how many of
                            them are matrix instructions, asynchronous copies, and accesses to local memory
    """

    registers: int
    spilled: int
    shared: int
    resident: int
    occupancy: float
    matrix: str
    matrix_count: int
    async_copies: int
    loop: int
    loop_matrix: int
    loop_async: int
    loop_local: int


class Code(NamedTuple):
    """How one kind of processor's instructions are told apart, by their names."""

    instruction: re.Pattern[str]
    label: re.Pattern[str]
    branch: re.Pattern[str]
    matrix: re.Pattern[str]
    multiply: re.Pattern[str]
    copies: re.Pattern[str]
    local: re.Pattern[str]


NVIDIA = Code(
    instruction=re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);"),
    label=re.compile(r"^\s*(\.L_\w+):"),
    branch=re.compile(r"\bBRA\b.*?(\.L_\w+)"),
    matrix=re.compile(r"\b(?:[HQI]MMA|[HQI]GMMA|UTC\w*MMA)\b"),
    multiply=re.compile(r"\bFFMA2?\b"),
    copies=re.compile(r"\b(?:LDGSTS|UTMALDG)\b"),
    local=re.compile(r"\b(?:LDL|STL)\b"),
)
AMD = Code(
    instruction=re.compile(r"^\s+([a-z]+_\w+.*)"),
    label=re.compile(r"^(\.LBB\w+):"),
    branch=re.compile(r"\bs_c?branch\w*\s+(\.LBB\w+)"),
    matrix=re.compile(r"\bv_mfma_"),
    multiply=re.compile(r"\bv_(?:pk_)?(?:fma|fmac|mac)_f32"),
    copies=re.compile(r"\b(?:global_load_lds|buffer_load_\w+.*\blds\b)"),
    local=re.compile(r"\bscratch_(?:load|store)"),
)
KINDS = {"wgmma": r"wgmma\.mma_async", "tcgen05": r"tcgen05\.mma", "mma": r"mma\.sync"}


def instructions(text: str, code: Code) -> tuple[list[str], dict[str, int]]:
    """All instructions in their order, and the place of each label among them."""
    found: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        if label := code.label.match(line):
            labels[label[1]] = len(found)
        elif instruction := code.instruction.search(line):
            found.append(instruction[1])
    return found, labels


def arithmetic_loop(found: Sequence[str], labels: dict[str, int], code: Code) -> list[str]:
    """The shortest loop that holds every matrix instruction that any loop holds, or most of the multiplications; else nothing."""
    loops = []
    for place, instruction in enumerate(found):
        branch = code.branch.search(instruction)
        if branch and labels.get(branch[1], place + 1) <= place:
            loops.append(list(found[labels[branch[1]] : place + 1]))
    for kind in (code.matrix, code.multiply):
        counts = [count(loop, kind) for loop in loops]
        if counts and max(counts):
            return min((loop for loop, number in zip(loops, counts, strict=True) if number == max(counts)), key=len)
    return []


def count(lines: Sequence[str], pattern: re.Pattern[str]) -> int:
    """How many lines the pattern is found in."""
    return sum(bool(pattern.search(line)) for line in lines)


def _tool(name: str, *arguments: str) -> str:
    done = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True, timeout=TOOL_SECONDS, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise RuntimeError(f"{name} fails: {done.stderr.strip()[-400:]}")
    return done.stdout


def disassembled(cubin: bytes, *options: str) -> str:
    """The instructions of a binary for NVIDIA, with their labels.

    Without options the flow of data is not looked into: that only labels jumps over the branch stack, of which no loop is made.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool("nvdisasm", "-c", *(options or ("-ndf",)), file.name)


def _read_nvidia(compiled: Any, log: str) -> dict[str, Any]:
    used, spilled = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    if used is None or spilled is None:
        raise RuntimeError(f"ptxas said neither registers nor spills of {compiled.metadata.name}: {log[-400:]!r}")
    counts = {kind: len(re.findall(pattern, compiled.asm["ptx"])) for kind, pattern in KINDS.items()}
    kind = next((kind for kind, number in counts.items() if number), "")
    read = {"registers": int(used[1]), "spilled": max(map(int, spilled.groups())), "matrix": kind, "matrix_count": counts.get(kind, 0)}
    return read | read_loop(disassembled(compiled.asm["cubin"]), NVIDIA)


def _read_amd(compiled: Any, log: str) -> dict[str, Any]:
    text = compiled.asm["amdgcn"]
    fields = {}
    for name in ("vgpr_count", "vgpr_spill_count", "private_segment_fixed_size"):  # a scalar register spills into a lane, not to memory
        fields[name] = int(re.search(rf"\.{name}:\s+(\d+)", text)[1])  # type: ignore[index]
    spilled = fields["vgpr_spill_count"] + fields["private_segment_fixed_size"]
    matrix = len(AMD.matrix.findall(text))
    read = {"registers": fields["vgpr_count"], "spilled": spilled, "matrix": "mfma" if matrix else "", "matrix_count": matrix}
    return read | read_loop(text, AMD)


def read_loop(text: str, code: Code) -> dict[str, int]:
    """The figures of the whole code and of its loop."""
    found, labels = instructions(text, code)
    loop = arithmetic_loop(found, labels, code)
    inside = {"loop_matrix": code.matrix, "loop_async": code.copies, "loop_local": code.local}
    return {"async_copies": count(found, code.copies), "loop": len(loop)} | {name: count(loop, kind) for name, kind in inside.items()}


READERS = {"cuda": _read_nvidia, "hip": _read_amd}


@contextlib.contextmanager
def _private_cache() -> Iterator[None]:
    """Triton's own cache would keep ptxas from running, and with it from saying how many registers it spilled."""
    with tempfile.TemporaryDirectory() as directory:
        before, triton.knobs.cache.dir = triton.knobs.cache.dir, directory
        try:
            yield
        finally:
            triton.knobs.cache.dir = before


def compiled_figures(one: Launch, target: Target) -> Figures:
    """Compile a launch for a target and read it. Raises what the compiler raises."""
    gpu, source = (
        GPUTarget(target.backend, target.arch, target.lanes),
        ASTSource(one.function, one.signature, one.constants, one.attributes),
    )
    log = io.StringIO()
    triton.knobs.nvidia.dump_ptxas_log = True
    with _private_cache(), contextlib.redirect_stdout(log):
        compiled = triton.compile(source, target=gpu, options=one.options.__dict__)
    read = READERS[target.backend](compiled, log.getvalue())
    shared, warps = compiled.metadata.shared, one.options.num_warps
    needs = read["registers"], shared, warps
    return Figures(shared=shared, resident=target.resident(*needs), occupancy=target.occupancy(*needs), **read)


def fingerprint(one: Launch, target: Target) -> str:
    """Name of a launch's figures in the cache: its source with all it calls, its specialisation, the compiler, and this file."""
    gpu = GPUTarget(target.backend, target.arch, target.lanes)
    source = ASTSource(one.function, one.signature, one.constants, one.attributes)
    reader = ast.dump(ast.parse(Path(__file__).read_text(encoding="utf-8")))
    parts = [triton.__version__, source.hash(), make_backend(gpu).hash(), one.options.hash(), reader]
    return hashlib.sha256("\n".join([*parts, repr(target)]).encode()).hexdigest()[:32]


def figures(one: Launch, name: str, *, cached: bool = True) -> Figures:
    """The figures of a launch on a target of TARGETS, from the cache where it has them."""
    target = TARGETS[name]
    directory = next(iter(cache_directories()), None)
    path = None if directory is None else directory / "kernels" / f"{fingerprint(one, target)}.json"
    if cached and path is not None:
        with contextlib.suppress(OSError, ValueError, TypeError):
            return Figures(**json.loads(path.read_text(encoding="utf-8")))
    found = compiled_figures(one, target)
    if path is not None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh = path.with_suffix(f".{os.getpid()}")
            fresh.write_text(json.dumps(found._asdict()), encoding="utf-8")
            fresh.replace(path)
    return found
