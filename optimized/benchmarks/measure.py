"""The whole benchmark: the gate, then every measurement of a plan, as plain data."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from reference.config import require

from . import gate, limits, machine
from .journal import Journal, Nowhere, fingerprint
from .memory import peak_bytes, saved_bytes
from .peers import OURS, RIVAL, Peer, Runnable, everybody
from .shapes import BATCHES, DTYPES, EXPERT_COUNTS, LOADS, MODES, SHAPES, TOKENS, Problem, Shape, problem, weights
from .timing import ROUNDS, Candidate, Spread, Times, interleave, ratio, steadiest

SCHEMA = 2
CLOCKS: dict[bool, tuple[str, Callable[[], float]]] = {
    True: ("processor time of the process", time.process_time),
    False: ("wall clock", time.perf_counter),
}
MANY_TOKENS = 1024  # from here on a peer that was far behind with fewer tokens is left out, as with more threads always
FAR_BEHIND = 3.0
FEWER_ROUNDS = 3  # with so many tokens one step is long enough to be a mean of its own
ALONE_TOKENS = 4096  # from here on one thread only, and of ours only what `auto` runs, which keeps the whole run short


@dataclass(frozen=True)
class Plan:
    """What is measured: every combination of these.

    threads   numbers of threads; one is timed in processor time, more by the wall clock
    seconds   of each measurement, beside its warm-up
    sweeps    also the number of experts at equal FLOPs, the load's skew, and what a growing batch touches
    close     only the peers that are ever near
    """

    shapes: tuple[str, ...] = tuple(SHAPES)
    tokens: tuple[int, ...] = TOKENS
    dtypes: tuple[str, ...] = tuple(DTYPES)
    modes: tuple[str, ...] = MODES
    threads: tuple[int, ...] = (1,)
    seconds: float = 0.7
    sweeps: bool = True
    close: bool = False

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

    def threads_at(self, tokens: int) -> tuple[int, ...]:
        """The numbers of threads that are measured with so many tokens: one alone where there are very many."""
        return tuple(count for count in self.threads if count == 1) or self.threads if tokens >= ALONE_TOKENS else self.threads

    @property
    def parts(self) -> list[tuple[str, str, int, str]]:
        """(shape, dtype, tokens, mode) of every problem, in the order in which they are measured."""
        return list(product(self.shapes, self.dtypes, sorted(self.tokens), self.modes))

    @property
    def swept(self) -> list[tuple[str, str]]:
        """(what is varied, mode) of every sweep."""
        return list(product(SWEEPS, self.modes)) if self.sweeps else []


QUICK = Plan(tokens=(16, 128), dtypes=("float32",), seconds=0.3, sweeps=False, close=True)


class RedGateError(Exception):
    """Something of ours is not equal to the truth, so there are no numbers."""


@dataclass
class Found:
    """The result so far; `data` is what is written as JSON."""

    plan: Plan
    journal: Journal | Nowhere = field(default_factory=Nowhere)
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


class Tell(Protocol):
    """Hears what comes next, and how many of the plan's parts are done."""

    def __call__(self, what: str, done: int | None = None, /) -> object: ...


def _nobody(what: str, done: int | None = None, /) -> None:
    return None


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """torch with this many threads inside the block."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run(
    plan: Plan, tell: Tell = _nobody, *,
    peers: Callable[[], list[Peer]] = everybody, keep: Path | None = None, resume: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Everything of a plan. A red gate ends it at once, and then there are no numbers. `tell` hears what comes next.

    keep: a file that gets each finished part at once; with resume, those that it holds of the same run are taken from it.
    """
    found, began, load = Found(plan), time.time(), machine.load_average()
    tell("the gate: contracts")
    with threads(1):
        found.broken = gate.broken_contracts(plan.dtypes, lambda name: tell(f"the gate: {name}"))
    if keep is not None and not found.broken:
        found.journal = Journal(keep, {"plan": plan, "machine": machine.facts(), "code": fingerprint()}, resume=resume)
    if not found.broken:
        try:
            for number, part in enumerate(plan.parts):
                tell(", ".join(map(str, part)), number)
                found.measurements += found.journal.take("; ".join(map(str, part)), partial(_measure_part, found, part, tell, peers))
            for number, (name, mode) in enumerate(plan.swept, len(plan.parts)):
                tell(f"by {name}, {mode}", number)
                found.sweeps.append(found.journal.take(f"{name}; {mode}", partial(_sweep, plan, mode, name, peers())))
        except RedGateError as why:
            found.broken = list(why.args)
    loads = {"before": load, "after": machine.load_average()}
    return found.data() | {"machine": machine.facts(), "load_average": loads, "began": began, "seconds": time.time() - began}


def _measure_part(found: Found, part: tuple[str, str, int, str], tell: Tell, peers: Callable[[], list[Peer]]) -> list[dict[str, Any]]:
    """One problem in one mode, by each number of threads. Raises RedGateError."""
    shape, dtype, tokens, mode = part
    where = f"{shape}, T = {tokens}, {dtype}, {mode}"
    tell(f"the gate: {where}")
    given = _problem(shape, dtype, tokens)
    ready, out = build(given, mode, _exact(shape, dtype, tokens), _invited(found.plan, tokens, peers()), _far_behind(found, part))
    measured: list[dict[str, Any]] = []
    for count in found.plan.threads_at(tokens):
        tell(f"{where}, {count} thread{'s' * (count > 1)}")
        head = {"shape": shape, "tokens": tokens, "load": given.load, "dtype": dtype, "mode": mode, "threads": count}
        measured.append(head | measure(given, mode, ready, out, count, found.plan.seconds))
        far = _far_in(measured[-1], "on one thread") if count == 1 else {}
        ready, out = {name: one for name, one in ready.items() if name not in far}, {**out, **far}
    return measured


def _invited(plan: Plan, tokens: int, peers: list[Peer]) -> list[Peer]:
    if tokens >= ALONE_TOKENS:
        return [peer for peer in peers if peer.name == OURS or peer.near]
    return [peer for peer in peers if peer.ours or peer.near] if plan.close else peers


@lru_cache(maxsize=1)
def _stacks(shape: str, dtype: str) -> tuple[Tensor, Tensor]:
    return weights(SHAPES[shape], DTYPES[dtype])


@lru_cache(maxsize=1)
def _problem(shape: str, dtype: str, tokens: int) -> Problem:
    return problem(SHAPES[shape], tokens, _stacks(shape, dtype))


@lru_cache(maxsize=1)
def _exact(shape: str, dtype: str, tokens: int) -> Mapping[str, Tensor]:
    return gate.truth(_problem(shape, dtype, tokens))


def _far_behind(found: Found, part: tuple[str, str, int, str]) -> dict[str, str]:
    """Peer → why it is not worth its time here: the best of them was far ahead of it with fewer tokens."""
    shape, dtype, tokens, mode = part
    key = {"shape": shape, "dtype": dtype, "mode": mode, "threads": 1}
    earlier = [m for m in found.measurements if all(m[name] == value for name, value in key.items()) and m["tokens"] < tokens]
    if tokens < MANY_TOKENS or not earlier:
        return {}
    return _far_in(earlier[-1], f"at T = {earlier[-1]['tokens']}")


def _far_in(measured: Mapping[str, Any], where: str) -> dict[str, str]:
    """Peer → by how much the best of them was ahead of it in a measurement, for those that it was far ahead of."""
    rows = [row for row in measured["candidates"] if not row["ours"]]
    times = {row["name"]: row["milliseconds"].median for row in rows if row["name"] != RIVAL}
    best = min((row["milliseconds"].median for row in rows if row["same_function"]), default=0.0)
    far = {name: value / best for name, value in times.items() if value > FAR_BEHIND * best}
    return {name: f"it took {behind:.0f} × the time of the best peer {where}" for name, behind in far.items()}


Ready = dict[str, tuple[Peer, Runnable]]


def build(
    given: Problem, mode: str, exact: Mapping[str, Tensor], peers: list[Peer], behind: Mapping[str, str] | None = None
) -> tuple[Ready, dict[str, str]]:
    """(who takes part, who does not and why), after comparing everybody with the truth. Raises RedGateError where one of ours differs.

    behind: who is left out without a look, and why.
    """
    ready: Ready = {}
    out: dict[str, str] = {}
    for peer in peers:
        reason = (behind or {}).get(peer.name) or peer.refuse(given, mode)
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
        least = FEWER_ROUNDS if given.tokens >= MANY_TOKENS else ROUNDS
        everyone = candidates | limits.candidates(given)
        times, takes = steadiest(
            lambda: interleave(everyone, seconds=seconds, clock=clock, least=least),
            lambda times: [limits.limit(given, mode, times)[1], *([times[OURS]] if OURS in times else [])],
        )
    bound, limit = limits.limit(given, mode, times)
    saved: dict[str, int] = {}
    peak: dict[str, int | None] = {}
    for name, (_, runnable) in ready.items() if count == 1 else ():
        if mode != MODES[0]:
            saved[name] = saved_bytes(given, runnable)
        if given.tokens >= MANY_TOKENS and name in (OURS, RIVAL):
            with threads(1):
                peak[name] = peak_bytes(candidates[name].step)
        gate.forget_gradients(given, runnable)
    for _, runnable in ready.values():
        gate.forget_gradients(given, runnable)
    rows = [_row(peer, times, limit, saved.get(name), peak.get(name)) for name, (peer, _) in ready.items()]
    return {
        "clock": clock_name,
        "takes": takes,
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


def _row(peer: Peer, times: Times, limit: list[float], saved: int | None, peak: int | None) -> dict[str, Any]:
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
        "peak_bytes": peak,
    }


def _sweep(plan: Plan, mode: str, name: str, peers: list[Peer]) -> dict[str, Any]:
    """Ours and transformers' grouped_mm on several problems, interleaved, in fp32 on one thread; ratios to the first problem."""
    problems = SWEEPS[name](plan)
    candidates: dict[str, Candidate] = {}
    for key, given in problems.items():
        chosen = [peer for peer in peers if peer.name in (OURS, RIVAL)]
        ready, _ = build(given, mode, gate.truth(given), chosen)
        candidates |= {f"{who} | {key}": _candidate(given, runnable, mode) for who, (_, runnable) in ready.items()}
    with threads(1):
        times = interleave(candidates, seconds=3 * plan.seconds, clock=CLOCKS[True][1], least=3)
    first, rows = next(iter(problems)), []
    for label, values in times.items():
        who, key = label.split(" | ")
        against, given = ratio(values, times[f"{who} | {first}"]), problems[key]
        counts = {"tokens": given.tokens, "touched_experts": given.touched, "touched_bytes": limits.streamed_bytes(given, MODES[0])}
        rows.append({"name": who, "at": key, "milliseconds": _milliseconds(values), "times_first": against, **counts})
    given = problems[first]
    return {"sweep": name, "mode": mode, "dtype": "float32", "threads": 1, "shape": given.shape.name, "tokens": given.tokens, "rows": rows}


def _sweep_tokens(plan: Plan) -> int:
    return min(max(plan.tokens), MANY_TOKENS)


def _by_experts(plan: Plan) -> dict[str, Problem]:
    return {name: _fresh(shape, _sweep_tokens(plan)) for name, shape in EXPERT_COUNTS.items()}


def _by_load(plan: Plan) -> dict[str, Problem]:
    return {load: _fresh(SHAPES["deepseek-mini"], _sweep_tokens(plan), load) for load in LOADS}


def _by_batch(plan: Plan) -> dict[str, Problem]:
    stacks = weights(SHAPES["deepseek-mini"], torch.float32)
    return {f"T = {tokens}": problem(SHAPES["deepseek-mini"], tokens, stacks) for tokens in BATCHES}


# What is varied → the problems.
SWEEPS: dict[str, Callable[[Plan], dict[str, Problem]]] = {"experts": _by_experts, "load": _by_load, "batch": _by_batch}


def _fresh(shape: Shape, tokens: int, load: str = "uniform") -> Problem:
    return problem(shape, tokens, weights(shape, torch.float32), load)
