"""`moebius lab`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import Result

if TYPE_CHECKING:
    from rich.console import Console


def run(
    name: Annotated[str, typer.Argument(help="Which experiment: collapse, bias, beginnings, specialization, drop, or all.")],
    smoke: Annotated[bool, typer.Option("--smoke", help="Everything, but small: seconds instead of minutes.")] = False,
    seeds: Annotated[str | None, typer.Option(help="Seeds, separated by commas.", show_default="0,1,2; --smoke: 0,1")] = None,
) -> Result:
    """Train small models to put a claim of the field to the test; --json docs/results/… writes the result that the site shows."""
    from ..lab import EXPERIMENTS, runner
    from ._show import console

    names = list(EXPERIMENTS) if name == "all" else [name]
    runners = {one: runner(one) for one in names}
    numbers = _seeds(("0,1" if smoke else "0,1,2") if seeds is None else seeds)
    out, results = console(), {}
    for one in names:
        out.rule(f"[bold]{one}", align="left")
        out.print(EXPERIMENTS[one].question, markup=False)
        with out.status("training"):
            results[one] = runners[one](numbers, smoke)
        _show_result(out, results[one])
    return Result(results if name == "all" else results[name])


def _seeds(text: str) -> list[int]:
    """The seeds of a comma-separated list. Raises ValueError unless they are different integers ≥ 0."""
    from reference.config import require

    parts = [part.strip() for part in text.split(",")]
    require(all(part.isdecimal() for part in parts), f"--seeds is {text!r}; it must be integers ≥ 0, separated by commas")
    numbers = [int(part) for part in parts]
    require(len(set(numbers)) == len(numbers), f"--seeds is {text!r}, which names a seed twice")
    return numbers


def _show_result(out: Console, result: dict[str, Any]) -> None:
    """The experiment's table, and each claim with whether it held."""
    from ._show import table

    columns = result["table"]["columns"]
    made = table(*columns, left=columns[:1])
    for row in result["table"]["rows"]:
        made.add_row(*row)
    out.print(made)
    for one in result["claims"]:
        held = "held" if one["held"] else "did not hold"
        said = f"{held}: {one['claim']} ({one['source']}). {one['seen']}. To hold asks for: {one['rule']}."
        out.print(said, markup=False, style="green" if one["held"] else "yellow")
    out.print(f"{len(result['seeds'])} seeds, {result['seconds']} s", style="dim")
