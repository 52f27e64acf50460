"""`moebius conformance`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import Result

if TYPE_CHECKING:
    from rich.table import Table

    from reference.proof.cases import Case

    from ..contracts import Contract


def run(
    backend: Annotated[str | None, typer.Option(help="Only the promises of this backend.", show_default="every one")] = None,
    dtypes: Annotated[str, typer.Option(help="In these dtypes, separated by commas.")] = "float64,float32,bfloat16",
    cases: Annotated[
        str | None, typer.Option(help="On these cases of the proof, separated by commas, or all.", show_default="a few, of every kind")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> Result:
    """Put every promise of the fast track to the proof on this machine: what each function says it equals, in which dtypes."""
    import torch

    from reference.config import require

    from ..backends import AUTO, names
    from ..proofs import CONTRACTS
    from ._show import console

    known = (AUTO, *names())
    require(backend is None or backend in known, f"--backend is {backend!r}; known: {', '.join(known)}")
    require(
        device == "cpu" or (device == "cuda" and torch.cuda.is_available()),
        f"--device is {device!r}; here: {'cpu, cuda' if torch.cuda.is_available() else 'cpu'}",
    )
    promises = [promise for promise in CONTRACTS.values() if backend in (None, promise.backend)]
    kinds, tried = _dtypes(dtypes), _cases(cases)
    out, rows = console(), []
    with out.status("proving") as status:
        for promise in promises:
            for dtype in (kind for kind in kinds if kind in promise.dtypes):
                status.update(f"{promise.name}, {dtype}")
                rows.append(_row(promise, dtype, tried, device))
    require(bool(rows), f"the backend {backend!r} promises nothing in {dtypes}")
    out.print(_table(rows, kinds))
    out.print(f"Output and gradients of {len(tried)} cases; each proof must also reject answers that are wrong on purpose.", style="dim")
    for verdict, style in (("cannot", "dim"), ("broken", "red")):
        for why in dict.fromkeys(row["why"] for row in rows if row["verdict"] == verdict):
            functions = dict.fromkeys(_short(row["function"]) for row in rows if row["why"] == why)
            out.print(f"{', '.join(functions)}: {why}", style=style, markup=False)
    data = {"cases": [case.name for case in tried], "rows": rows}
    return Result(data, all(row["verdict"] != "broken" for row in rows), ("rows",))


def _short(function: str) -> str:
    return function.removeprefix("optimized.")


def _dtypes(text: str) -> list[str]:
    from reference.config import require
    from reference.proof.equal import MANTISSA_BITS

    kinds = [name.strip() for name in text.split(",")]
    for name in kinds:
        require(name in MANTISSA_BITS, f"--dtypes names {name!r}; known: {', '.join(MANTISSA_BITS)}")
    return kinds


def _cases(text: str | None) -> list[Case]:
    from reference.proof.cases import CASES, get

    from ..proofs import FEW_CASES

    if text is None:
        return [get(name) for name in FEW_CASES]
    return list(CASES) if text == "all" else [get(name.strip()) for name in text.split(",")]


def _row(promise: Contract, dtype: str, cases: list[Case], device: str) -> dict[str, Any]:
    """One promise in one dtype: kept on every case, broken on the first that it fails, or not to be tried here."""
    from ..proofs import prove, why_not

    row = {"function": promise.name, "equals": promise.equals, "dtype": dtype, "limits": promise.limits}
    if reason := why_not(promise, dtype, device):
        return row | {"verdict": "cannot", "why": f"cannot run here: {reason}"}
    for case in cases:
        try:
            prove(promise, case, dtype, device)
        except Exception as error:  # whatever a function raises is its failure, and the others are still tried
            told = str(error).strip().splitlines() or [type(error).__name__]
            return row | {"verdict": "broken", "why": f"{dtype}, case {case.name}: {told[0]}"}
    return row | {"verdict": "equal", "why": ""}


def _table(rows: list[dict[str, Any]], kinds: list[str]) -> Table:
    """A line for each function, a column for each dtype."""
    from ._show import table, verdict

    found = {(row["function"], row["dtype"]): verdict(row["verdict"]) for row in rows}
    made = table("function", *kinds, left=("function",))
    for name in dict.fromkeys(row["function"] for row in rows):
        made.add_row(_short(name), *(found.get((name, kind), "–") for kind in kinds))
    return made
