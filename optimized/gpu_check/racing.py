"""Ours against everybody who can be imported, and against dense products of equal FLOPs by the vendor's library."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from ..benchmarks import gate, limits
from ..benchmarks.peers import Runnable
from ..benchmarks.shapes import MODES, Problem, Shape
from ..benchmarks.timing import Candidate, Spread, interleave, ratio
from ..kernels.blocks import Blocks
from .device import Device
from .peers import OURS, TUNED, builders
from .problems import forward_and_backward, needed_bytes, problem
from .results import Step
from .tuning import best, key, with_blocks

COMPARED = ("y", "dx")  # weights lie differently at every peer


def _step(given: Problem, runnable: Runnable, mode: str) -> Callable[[], Any]:
    return torch.no_grad()(runnable.call) if mode == MODES[0] else forward_and_backward(given, runnable)


def differences(given: Problem, runnable: Runnable, mode: str, exact: Mapping[str, torch.Tensor]) -> list[str]:
    """What a candidate computes otherwise than float64 does, in words."""
    y = _step(given, runnable, mode)()
    found = {"y": y.detach()} if mode == MODES[0] else {"y": y.detach(), "dx": given.x.grad}
    return gate.differences(found, dict(exact), given.x.dtype)  # type: ignore[arg-type]


def admitted(given: Problem, mode: str) -> tuple[dict[str, Runnable], dict[str, str]]:
    """(who takes part, who does not and why): everybody who is there and computes what float64 computes."""
    with torch.device(given.x.device):
        exact = {name: tensor for name, tensor in gate.truth(given).items() if name in COMPARED}
    ready: dict[str, Runnable] = {}
    out: dict[str, str] = {}
    for name, build in builders(given, mode).items():
        if isinstance(build, str):
            out[name] = build
            continue
        try:
            runnable = build()
            wrong = differences(given, runnable, mode, exact)
        except Exception as error:  # a package of another version may raise anything
            wrong = [f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"]
        if wrong:
            out[name] = "; ".join(wrong)
        else:
            ready[name] = runnable
    return ready, out


def race(device: Device, given: Problem, mode: str, tuned: dict[str, Blocks], seconds: float) -> dict[str, Any]:
    """Milliseconds, ratios to ours and to the dense products, and memory of all who take part; good: whether ours is one of them."""
    ready, out = admitted(given, mode)
    calls = {name: _step(given, runnable, mode) for name, runnable in ready.items()}
    if tuned and OURS in calls:
        calls[TUNED] = with_blocks(calls[OURS], **tuned)
    with torch.device(given.x.device):
        dense = limits.candidates(given, given.rows)
        times = interleave({name: Candidate(call) for name, call in calls.items()} | dense, seconds=seconds, clock=device.clock)
    bound, limit = limits.limit(given, mode, times)
    rows = {
        name: {
            "milliseconds": Spread.of([1e3 * value for value in times[name]])._asdict(),
            "times_ours": ratio(times[name], times[OURS])._asdict() if OURS in times else None,
            "fraction_of_dense": ratio(limit, times[name])._asdict(),
            "peak_bytes": device.peak_bytes(call),
        }
        for name, call in calls.items()
    }
    spread = Spread.of([1e3 * value for value in limit])._asdict()
    dense_row = {"what": bound, "flops": limits.active_flops(given, mode), "milliseconds": spread}
    return {"good": OURS in ready, "clocks": device.clocks(), "dense": dense_row, "candidates": rows, "left_out": out}


def steps(
    device: Device, shapes: tuple[Shape, ...], counts: tuple[int, ...], seconds: float, tuned: Callable[[str], Any]
) -> Iterator[Step]:
    """Every shape, number of tokens and mode, in bf16; tuned: key of a problem → its result of `tuning.tune`, or None."""
    for shape in shapes:
        for tokens in counts:
            for mode in MODES:
                yield f"{key(shape, tokens)}, {mode}", lambda s=shape, t=tokens, m=mode: _raced(device, s, t, m, seconds, tuned)


def _raced(device: Device, shape: Shape, tokens: int, mode: str, seconds: float, tuned: Callable[[str], Any]) -> dict[str, Any]:
    if 2 * needed_bytes(shape, tokens) > device.free_bytes():
        return {"left out": "it does not fit into memory"}
    given = problem(device.name, shape, tokens, torch.bfloat16)
    return race(device, given, mode, best(tuned(key(shape, tokens))), seconds)
