"""`moebius bench`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..environment import prepare_process
from . import Result, check_writable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..benchmarks.measure import Plan
    from ..benchmarks.verdicts import Verdict

COLORS = {"beyond": "bold green", "reached": "green", "missed": "yellow", "far under": "bold red"}


def run(
    quick: Annotated[bool, typer.Option("--quick", help="A smaller plan, for continuous integration.")] = False,
    shape: Annotated[str | None, typer.Option(help="Only these shapes, separated by commas.")] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Numbers of tokens, separated by commas.", show_default="1,16,128,1024,4096; --quick: 16,128")
    ] = None,
    dtypes: Annotated[str | None, typer.Option(help="float32, bfloat16 or both.", show_default="both")] = None,
    threads: Annotated[str | None, typer.Option(help="Numbers of threads, or all.", show_default="1,all; --quick: 1")] = None,
    seconds: Annotated[float | None, typer.Option(help="Of each measurement.", show_default="0.7; --quick: 0.3")] = None,
    work: Annotated[Path, typer.Option(help="Every finished part is kept in this file at once.")] = Path("runs/bench.jsonl"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with that file, where it is of the same plan, machine and code.")] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 where any goal is missed, not only where one is far.")] = False,
) -> Result:
    """Time the fast path against the machine's limit and against everybody else, after proving that all compute the same."""
    late = prepare_process()
    from ..benchmarks.verdicts import losses, verdicts
    from ._show import console

    check_writable(work, "--work")
    plan = _plan(quick, shape=shape, tokens=tokens, dtypes=dtypes, threads=threads, seconds=seconds)
    out = console()
    data = _with_progress(plan, out, work, resume)
    if late:
        out.print(f"PyTorch was imported before {' and '.join(late)} could be set: page faults or waits weigh more.", style="yellow")
    if not data["gate"]["green"]:
        for line in data["gate"]["broken"]:
            out.print(line, style="red", markup=False)
        out.print(
            "The gate is red: something of ours does not compute what the reference computes, so there are no numbers.", style="bold red"
        )
        return Result(data, False)
    found, lost = verdicts(data), losses(data)
    _show(data, found, lost, out)
    data |= {"verdicts": [_plain(verdict) for verdict in found], "losses": lost}
    bad = [verdict for verdict in found if verdict.verdict == "far under" or (strict and verdict.verdict == "missed")]
    for verdict in bad:
        out.print(f"{verdict.verdict}: {verdict.where}, {verdict.measure}: {verdict.value:.2f}", style="red", markup=False)
    return Result(data, not bad)


def _numbers(option: str, text: str) -> tuple[int, ...]:
    from reference.config import require

    parts = [part.strip() for part in text.split(",") if part.strip()]
    whole = bool(parts) and all(part.removeprefix("-").isdigit() for part in parts)
    require(whole, f"--{option} is {text!r}; it takes whole numbers, separated by commas")
    return tuple(dict.fromkeys(map(int, parts)))


def _names(text: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))


def _plan(quick: bool, **options: Any) -> Plan:
    """The plan that the options ask for; what is not given is the plan's own."""
    import dataclasses

    from ..benchmarks.measure import QUICK, Plan

    cores = os.cpu_count() or 1
    base = QUICK if quick else Plan(threads=tuple(dict.fromkeys((1, cores))))
    given: dict[str, Any] = {}
    if options["shape"] is not None:
        given["shapes"] = _names(options["shape"])
    if options["dtypes"] is not None:
        given["dtypes"] = _names(options["dtypes"])
    if options["tokens"] is not None:
        given["tokens"] = _numbers("tokens", options["tokens"])
    if options["threads"] is not None:
        given["threads"] = _numbers("threads", options["threads"].replace("all", str(cores)))
    if options["seconds"] is not None:
        given["seconds"] = options["seconds"]
    return dataclasses.replace(base, **given)


def _with_progress(plan: Plan, out: Console, work: Path, resume: bool) -> dict[str, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..benchmarks import measure

    columns = BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}", markup=False)
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task("", total=len(plan.parts) + len(plan.swept))
        tell = lambda what, done=None: progress.update(task, description=what, completed=done)  # noqa: E731
        return measure.run(plan, tell, keep=work, resume=resume)


def _plain(verdict: Verdict) -> dict[str, Any]:
    import dataclasses

    return dataclasses.asdict(verdict) | {"verdict": verdict.verdict}


def _show(data: Mapping[str, Any], found: list[Verdict], lost: list[str], out: Console) -> None:
    from ..benchmarks.verdicts import inside_transformers

    for mode in dict.fromkeys(measurement["mode"] for measurement in data["measurements"]):
        out.rule(f"[bold]{mode}", align="left")
        out.print(_table([m for m in data["measurements"] if m["mode"] == mode]))
    out.print(
        "of limit: a dense product of the same FLOPs by the better of two libraries, or one stream of the touched weights.", style="dim"
    )
    out.print("× peer: how many times as long the fastest other implementation of the same function takes.", style="dim")
    out.rule("[bold]how near to the goals", align="left")
    out.print(_goal_table(found))
    for verdict in sorted((v for v in found if v.verdict in ("missed", "far under")), key=lambda v: v.measure):
        out.print(
            f"  {verdict.measure}: {verdict.value:.2f} of {verdict.must:g} ({verdict.where})", style=COLORS[verdict.verdict], markup=False
        )
    for sweep in data["sweeps"]:
        rows = [f"{row['at']} {row['times_first'].median:.2f}" for row in sweep["rows"] if row["name"] == "moebius"]
        where = "" if sweep["sweep"] == "batch" else f", T = {sweep['tokens']}"
        out.print(f"by {sweep['sweep']}, {sweep['mode']}{where}: {', '.join(rows)} × the first", markup=False)
    inside = inside_transformers(data)
    if inside:
        worst = max(inside, key=lambda pair: pair[1].median)
        out.print(f"Inside transformers it takes at most {worst[1].median:.2f} × the time ({worst[0]}).", markup=False)
    out.print(f"We lose in {len(lost)} of {len(data['measurements'])} measurements" + (":" if lost else "."), style="bold")
    for line in lost:
        out.print(f"  {line}", markup=False)
    loads = data["load_average"]
    out.print(
        f"Load average {loads['before']} before, {loads['after']} after; {data['seconds']:.0f} s; {data['machine']['processor']}.",
        style="dim",
    )


def _table(measurements: list[Mapping[str, Any]]) -> Table:
    from ..benchmarks.peers import OURS
    from ..benchmarks.verdicts import best_peer
    from ._show import table

    made = table("shape", "T", "dtype", "thr", "ms", "of limit", "× peer", "best peer", left=("shape", "dtype", "best peer"))
    for measurement in measurements:
        ours = next((row for row in measurement["candidates"] if row["name"] == OURS), None)
        if ours is None:
            continue
        peer = best_peer(measurement)
        rival = ("", "") if peer is None else (f"{peer['times_ours'].median:.2f}", peer["name"].replace("transformers", "tf."))
        shown = {"float32": "fp32", "bfloat16": "bf16"}[measurement["dtype"]]
        sizes = measurement["shape"], str(measurement["tokens"]), shown, str(measurement["threads"])
        made.add_row(*sizes, f"{ours['milliseconds'].median:.2f}", f"{ours['fraction'].median:.2f}", *rival)
    return made


def _goal_table(found: list[Verdict]) -> Table:
    """How many of each kind of goal are reached, and the one that is farthest away."""
    from ._show import table

    made = table("measure", "goals", "reached", "farthest", "must", left=("measure",))
    for measure in dict.fromkeys(verdict.measure for verdict in found):
        own = [verdict for verdict in found if verdict.measure == measure]
        reached = sum(verdict.verdict in ("reached", "beyond") for verdict in own)
        worst = min(own, key=lambda v: v.must / v.value if v.smaller else v.value / v.must)
        cells = measure, str(len(own)), str(reached), f"{worst.value:.2f}", f"{worst.must:g}"
        made.add_row(*cells, style=COLORS[worst.verdict])
    return made
