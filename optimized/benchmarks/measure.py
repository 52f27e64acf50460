"""The whole benchmark: the gate, then every measurement of a plan, as plain data."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import torch
from torch import Tensor

from reference.config import require

from . import gate, limits, machine
from .peers import OURS, RIVAL, Peer, Runnable, everybody
from .shapes import DTYPES, EXPERT_COUNTS, LOADS, MODES, SHAPES, TOKENS, Problem, Shape, problem, weights
from .timing import Candidate, Spread, Times, interleave, ratio

SCHEMA = 1
CLOCKS: dict[bool, tuple[str, Callable[[], float]]] = {
    True: ("processor time of the process", time.process_time),
    False: ("wall clock", time.perf_counter),
}


@dataclass(frozen=True)
class Plan:
    """What is measured: every combination of these.

    threads   numbers of threads; one is timed in processor time, more by the wall clock
    seconds   of each measurement, beside its warm-up
    sweeps    also the number of experts at equal FLOPs, and the load's skew
    """

    shapes: tuple[str, ...] = tuple(SHAPES)
    tokens: tuple[int, ...] = TOKENS[:4]
    dtypes: tuple[str, ...] = tuple(DTYPES)
    modes: tuple[str, ...] = MODES
    threads: tuple[int, ...] = (1,)
    seconds: float = 1.5
    sweeps: bool = True

    def __post_init__(self) -> None:
        for name, known in (("shapes", SHAPES), ("dtypes", DTYPES), ("modes", MODES)):
            require(bool(getattr(self, name)), f"{name} is empty; known: {', '.join(known)}")
            for value in getattr(self, name):
                require(value in known, f"{name} names {value!r}; known: {', '.join(known)}")
        cores = os.cpu_count() or 1
        for count in self.threads:
            require(1 <= count <= cores, f"threads is {count}; this machine has {cores}")
        for count in self.tokens:
            require(1 <= count <= 1 << 16, f"tokens is {count}; it must lie between 1 and {1 << 16}")
        require(0 < self.seconds <= 600, f"seconds is {self.seconds}; it must lie above 0 and up to 600")

    @property
    def measurements(self) -> int:
        """How many there are, sweeps aside."""
        return len(self.shapes) * len(self.tokens) * len(self.dtypes) * len(self.modes) * len(self.threads)


QUICK = Plan(tokens=(16, 128), dtypes=("float32",), seconds=0.3, sweeps=False)


class RedGateError(Exception):
    """Something of ours is not equal to the truth, so there are no numbers."""


@dataclass
class Found:
    """The result so far; `data` is what is written as JSON."""

    plan: Plan
    measurements: list[dict[str, Any]] = field(default_factory=list)
    sweeps: list[dict[str, Any]] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)

    def data(self) -> dict[str, Any]:
        """Everything as plain data; without numbers where the gate is red."""
        return {
            "schema": SCHEMA,
            "plan": self.plan,
            "gate": {"green": not self.broken, "broken": self.broken},
            "measurements": [] if self.broken else self.measurements,
            "sweeps": [] if self.broken else self.sweeps,
        }


Tell = Callable[[str], object]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with this many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(plan: Plan, tell: Tell = lambda what: None, *, peers: Callable[[], list[Peer]] = everybody) -> dict[str, Any]:
    """Everything of a plan. A red gate ends it at once, and then there are no numbers. `tell` hears what comes next."""
    found, began, load = Found(plan), time.time(), machine.load_average()
    tell("the gate: contracts")
    with threads(1):
        found.broken = gate.broken_contracts(plan.dtypes, lambda name: tell(f"the gate: {name}"))
    if not found.broken:
        try:
            for shape, dtype in product(plan.shapes, plan.dtypes):
                stacks = weights(SHAPES[shape], DTYPES[dtype])
                for tokens in plan.tokens:
                    _measure_problem(found, problem(SHAPES[shape], tokens, stacks), tell, peers())
            if plan.sweeps:
                found.sweeps += [_sweep_experts(plan, mode, tell, peers()) for mode in plan.modes]
                found.sweeps += [_sweep_loads(plan, mode, tell, peers()) for mode in plan.modes]
        except RedGateError as why:
            found.broken = list(why.args)
    loads = {"before": load, "after": machine.load_average()}
    return found.data() | {"machine": machine.facts(), "load_average": loads, "began": began, "seconds": time.time() - began}


def _measure_problem(found: Found, given: Problem, tell: Tell, peers: list[Peer]) -> None:
    """All modes and numbers of threads of one problem. Raises RedGateError."""
    dtype = str(given.x.dtype).removeprefix("torch.")
    tell(f"the gate: {given.shape.name}, T = {given.tokens}, {dtype}")
    exact = gate.truth(given)
    for mode in found.plan.modes:
        ready, out = build(given, mode, exact, peers)
        for count in found.plan.threads:
            tell(f"{given.shape.name}, T = {given.tokens}, {dtype}, {mode}, {count} thread{'s' * (count > 1)}")
            head = {"shape": given.shape.name, "tokens": given.tokens, "load": given.load, "dtype": dtype, "mode": mode, "threads": count}
            found.measurements.append(head | measure(given, mode, ready, out, count, found.plan.seconds))


Ready = dict[str, tuple[Peer, Runnable]]


def build(given: Problem, mode: str, exact: Mapping[str, Tensor], peers: list[Peer]) -> tuple[Ready, dict[str, str]]:
    """(who takes part, who does not and why), after comparing everybody with the truth. Raises RedGateError where one of ours differs."""
    ready: Ready = {}
    out: dict[str, str] = {}
    for peer in peers:
        reason = peer.refuse(given, mode)
        if reason is None:
            runnable = peer.build(given)
            wrong = gate.differences(gate.outputs(given, runnable, mode), dict(exact), given.x.dtype) if peer.comparable else []
            if wrong and peer.ours:
                raise RedGateError(
                    *(f"{peer.name}, {given.shape.name}, T = {given.tokens}, {given.x.dtype}, {mode}: {why}" for why in wrong)
                )
            reason = "; ".join(wrong) or None
        if reason is None:
            ready[peer.name] = peer, runnable
        else:
            out[peer.name] = reason
    return ready, out


def _candidate(given: Problem, runnable: Runnable, mode: str) -> Candidate:
    if mode == MODES[0]:
        return Candidate(torch.no_grad()(runnable.call))
    return Candidate(lambda: runnable.call().backward(given.dy), lambda: gate.forget_gradients(given, runnable))


def measure(given: Problem, mode: str, ready: Ready, out: Mapping[str, str], count: int, seconds: float) -> dict[str, Any]:
    """One measurement: the limit, and a row for everybody."""
    clock_name, clock = CLOCKS[count == 1]
    candidates = {name: _candidate(given, runnable, mode) for name, (_, runnable) in ready.items()}
    with threads(count):
        times = interleave(candidates | limits.candidates(given, mode), seconds=seconds, clock=clock)
    bound, limit = limits.limit(given, mode, times)
    saved = {name: saved_bytes(given, runnable) for name, (_, runnable) in ready.items()} if mode != MODES[0] and count == 1 else {}
    for _, runnable in ready.values():
        gate.forget_gradients(given, runnable)
    rows = [_row(peer, times, limit, saved.get(name)) for name, (peer, _) in ready.items()]
    return {
        "clock": clock_name,
        "flops": limits.active_flops(given, mode),
        "touched_experts": given.touched,
        "touched_bytes": limits.streamed_bytes(given, mode),
        "limit": {"bound": bound, "milliseconds": _milliseconds(limit)},
        "dense": {name: _milliseconds(times[name]) for name in times if name not in ready},
        "candidates": rows,
        "left_out": dict(out),
    }


def _milliseconds(values: list[float]) -> Spread:
    return Spread.of([1e3 * value for value in values])


def _row(peer: Peer, times: Times, limit: list[float], saved: int | None) -> dict[str, Any]:
    """times_ours: how many times as long as ours; fraction: how much of the limit it reaches."""
    own = times[peer.name]
    return {
        "name": peer.name,
        "ours": peer.ours,
        "same_function": peer.comparable,
        "milliseconds": _milliseconds(own),
        "rounds": len(own),
        "times_ours": ratio(own, times[OURS]) if OURS in times else None,
        "fraction": ratio(limit, own),
        "saved_bytes": saved,
    }


def saved_bytes(given: Problem, runnable: Runnable) -> int:
    """Bytes that a forward keeps for its backward, each storage once; inputs and weights do not count."""
    kept: dict[int, int] = {}
    known = {tensor.untyped_storage().data_ptr() for tensor in (given.x, given.gate, given.expert, *runnable.up, *runnable.down)}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = runnable.call()
    del y
    return sum(kept.values())


def _sweep(plan: Plan, mode: str, name: str, problems: Mapping[str, Problem], peers: list[Peer]) -> dict[str, Any]:
    """Ours and transformers' grouped_mm on several problems, interleaved; ratios to the first problem."""
    candidates: dict[str, Candidate] = {}
    for key, given in problems.items():
        chosen = [peer for peer in peers if peer.name in (OURS, RIVAL)]
        ready, _ = build(given, mode, gate.truth(given), chosen)
        candidates |= {f"{who} | {key}": _candidate(given, runnable, mode) for who, (_, runnable) in ready.items()}
    with threads(1):
        times = interleave(candidates, seconds=4 * plan.seconds, clock=CLOCKS[True][1])
    first, rows = next(iter(problems)), []
    for label, values in times.items():
        who, key = label.split(" | ")
        against = ratio(values, times[f"{who} | {first}"])
        rows.append({"name": who, "at": key, "milliseconds": _milliseconds(values), "times_first": against})
    return {"sweep": name, "mode": mode, "dtype": "float32", "threads": 1, "rows": rows}


def _sweep_experts(plan: Plan, mode: str, tell: Tell, peers: list[Peer]) -> dict[str, Any]:
    tell(f"8 to 512 experts at equal FLOPs, {mode}")
    tokens = max(plan.tokens)
    problems = {name: _fresh(shape, tokens) for name, shape in EXPERT_COUNTS.items()}
    return _sweep(plan, mode, "experts", problems, peers) | {"tokens": tokens}


def _sweep_loads(plan: Plan, mode: str, tell: Tell, peers: list[Peer]) -> dict[str, Any]:
    tell(f"the load's skew, {mode}")
    shape, tokens = SHAPES["deepseek-mini"], max(plan.tokens)
    problems = {load: _fresh(shape, tokens, load) for load in LOADS}
    return _sweep(plan, mode, "load", problems, peers) | {"tokens": tokens, "shape": shape.name}


def _fresh(shape: Shape, tokens: int, load: str = "uniform") -> Problem:
    return problem(shape, tokens, weights(shape, torch.float32), load)
