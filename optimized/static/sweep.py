"""Every distinct specialisation of the kernels at the published shapes, compiled once for each target, in processes of their own."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from reference.config import require

SCHEMA = 1
INTEGERS, SINGLE = ("histogram", "scan", "scatter", "restore"), ("route", "router's gradient")
ORIGINS = ("default", "alternative", "rejected")
MODEL_NAMES = ("Mixtral-8x7B", "DeepSeekMoE-16B", "Qwen3-30B-A3B", "OLMoE-1B-7B", "gpt-oss-20b", "DeepSeek-V3")
TARGET_NAMES = ("sm80", "sm90", "sm100", "gfx942")
DTYPE_NAMES = ("bfloat16", "float16", "tf32", "float32")
HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Plan:
    """What is compiled.

    targets, models, dtypes   names;  quick: bf16 at every model, the other dtypes at one, and the default blocks alone
    origins                   of ORIGINS: the blocks of the tables, what autotuning may choose beside them, what was tried and refused
    """

    targets: tuple[str, ...] = TARGET_NAMES
    models: tuple[str, ...] = MODEL_NAMES
    dtypes: tuple[str, ...] = DTYPE_NAMES
    quick: bool = False
    origins: tuple[str, ...] = ORIGINS[:2]

    def __post_init__(self) -> None:
        known = {"targets": TARGET_NAMES, "models": MODEL_NAMES, "dtypes": DTYPE_NAMES, "origins": ORIGINS}
        for field, names in known.items():
            given = getattr(self, field)
            require(bool(given), f"{field} is empty; known: {', '.join(names)}")
            for name in given:
                require(name in names, f"{field} holds {name!r}; known: {', '.join(names)}")

    def models_of(self, dtype: str, origin: str) -> tuple[str, ...]:
        """The models whose shapes are compiled in a dtype. What autotuning may choose is compiled with and without biases."""
        if self.quick and dtype != self.dtypes[0]:
            return self.models[:1] if "Qwen3-30B-A3B" not in self.models else ("Qwen3-30B-A3B",)
        return self.models


class Job(NamedTuple):
    """One specialisation: who asks for it, and the launch itself."""

    target: str
    origin: str
    role: str
    kernel: str
    blocks: dict[str, int]
    identity: str
    dtypes: list[str]
    models: list[str]
    launch: Any

    def row(self) -> dict[str, Any]:
        """Everything but the launch, as plain data."""
        return {name: value for name, value in self._asdict().items() if name != "launch"}


def _variants(plan: Plan, target: str, dtype: str) -> Iterator[tuple[str, str | None, dict[str, Any]]]:
    """(origin, the one kernel that is meant or None for all, blocks that replace the tables')."""
    from ..kernels.choices import ALTERNATIVES, REJECTED
    from .targets import TARGETS

    if "default" in plan.origins:
        yield "default", None, {}
    for origin, table in (("alternative", ALTERNATIVES), ("rejected", REJECTED)):
        if origin in plan.origins and dtype in HALVES and not plan.quick:
            for kernel, choices in table[TARGETS[target].family].items():
                for blocks in choices:
                    yield origin, kernel, {kernel: blocks}


def _dtype_of(role: str, dtype: str) -> str:
    return "int32" if role in INTEGERS else "float32" if role in SINGLE else dtype


@functools.cache
def jobs(plan: Plan) -> tuple[Job, ...]:
    """Every distinct specialisation of a plan, always in the same order."""
    from .capture import TILED, launches

    found: dict[tuple[str, str], Job] = {}
    for target in plan.targets:
        for dtype in plan.dtypes:
            for origin, only, blocks in _variants(plan, target, dtype):
                for model in plan.models_of(dtype, origin):
                    for one in (one for some in launches(target, model, dtype, **blocks).values() for one in some):
                        if only is not None and TILED.get(one.role) != only:
                            continue
                        identity, label = one.identity(), _dtype_of(one.role, dtype)
                        fresh = Job(target, origin, one.role, one.kernel, _blocks(one), identity, [], [], one)
                        job = found.setdefault((target, identity), fresh)
                        for names, name in ((job.dtypes, label), (job.models, model)):
                            if name not in names:
                                names.append(name)
    return tuple(found.values())


def _blocks(one: Any) -> dict[str, int]:
    names = {"rows": "BLOCK_ROWS", "columns": "BLOCK_COLUMNS", "depth": "BLOCK_DEPTH", "block": "BLOCK"}
    sizes = {name: one.constant(argument) for name, argument in names.items() if argument in one.function.arg_names}
    sizes = {name: value for name, value in sizes.items() if value is not None}
    return sizes | {"warps": one.options.num_warps, "stages": one.options.num_stages}


def measure(plan: Plan, number: int, cached: bool) -> dict[str, Any]:
    """The row of one job: its figures, or the compiler's refusal as "error"."""
    from .figures import figures

    job = jobs(plan)[number]
    try:
        return job.row() | figures(job.launch, job.target, cached=cached)._asdict()
    except Exception as error:  # whatever the compiler raises is what this row has to say
        return job.row() | {"error": f"{type(error).__name__}: {' '.join(str(error).split())[-300:]}"}


def layers(plan: Plan) -> list[dict[str, Any]]:
    """Launches, bytes and FLOPs of one layer of every model on every target with the default blocks, in bf16."""
    from reference import presets

    from ..kernels.blocks import blocks_of
    from .capture import DTYPES, MODELS, TOKENS, launches, noted
    from .work import Sizes, uniform_load, work

    found = []
    for target in plan.targets:
        for model in plan.models:
            config, kind = presets.get(MODELS[model]), DTYPES["bfloat16"][0]
            with noted(target):
                blocks = {name: blocks_of(name, kind, "ieee") for name in ("up", "product", "activation", "weight", "route", "combine")}
            load = uniform_load(TOKENS, config.experts.count, config.gating.top_k)
            counts = {name: len(some) for name, some in launches(target, model, "bfloat16").items()}
            roles = {role: done._asdict() for role, done in work(Sizes(config, TOKENS, load, 2, blocks)).items()}
            found.append({"target": target, "model": model, "tokens": TOKENS, "launches": counts, "work": roles})
    return found


def _versions() -> dict[str, str]:
    import torch
    import triton

    return {"triton": triton.__version__, "torch": torch.__version__.partition("+")[0]}


def count(plan: Plan) -> int:
    """How many specialisations a plan has."""
    return len(jobs(plan))


@contextlib.contextmanager
def compiling_processes(workers: int) -> Iterator[ProcessPoolExecutor]:
    """Fresh processes that compile kernels, whatever this one does with them: without TRITON_INTERPRET, one thread each."""
    changed = {"TRITON_INTERPRET": None, "OMP_NUM_THREADS": "1", "TRITON_DEFAULT_FP_FUSION": "1"}
    before = {name: os.environ.get(name) for name in changed}
    _set(changed)
    try:
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            yield pool
    finally:
        _set(before)


def _set(variables: dict[str, str | None]) -> None:
    for name, value in variables.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def run(
    plan: Plan, tell: Callable[[int, int], object] = lambda done, total: None, *, workers: int = 2, cached: bool = True
) -> dict[str, Any]:
    """Compile and count everything of a plan; `tell` hears how many of how many are done."""
    began = time.time()
    with compiling_processes(workers) as pool:
        total = pool.submit(count, plan).result()
        tell(0, total)
        futures = {pool.submit(measure, plan, number, cached): number for number in range(total)}
        rows: dict[int, dict[str, Any]] = {}
        try:
            for future in as_completed(futures):
                rows[futures[future]] = future.result()
                tell(len(rows), total)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        versions, counted = pool.submit(_versions).result(), pool.submit(layers, plan).result()
    ordered = [rows[number] for number in range(total)]
    return {
        "schema": SCHEMA,
        **versions,
        "plan": asdict(plan),
        "rows": ordered,
        "layers": counted,
        "seconds": round(time.time() - began, 1),
    }
