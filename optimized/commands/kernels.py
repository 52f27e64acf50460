"""`moebius kernels`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import Result

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from ..static.sweep import Plan

SHOWN = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "tf32": "tf32", "int32": "int"}
ROWS = ("rows", "layers", "problems")


def run(
    quick: Annotated[bool, typer.Option("--quick", help="bf16 at every shape, the other dtypes at one, default blocks only.")] = False,
    target: Annotated[
        str | None, typer.Option(help="Only these targets, separated by commas.", show_default="sm80,sm90,sm100,gfx942")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Only the shapes of these models, separated by commas.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Only these of bfloat16, float16, tf32, float32.")] = None,
    rejected: Annotated[bool, typer.Option("--rejected", help="Also compile what was refused: each must still have a fault.")] = False,
    against: Annotated[Path | None, typer.Option(help="A result of the same Triton: registers must be within 16 of it.")] = None,
    processes: Annotated[int, typer.Option(help="How many compile at once.")] = 2,
    fresh: Annotated[bool, typer.Option("--fresh", help="Compile everything again, whatever the cache holds.")] = False,
) -> Result:
    """Compile every kernel for every target at published shapes, without a GPU, and look at the machine code."""
    from importlib.util import find_spec

    from reference.config import require

    from ..static import verdicts
    from ._show import console

    require(find_spec("triton") is not None, "there is no Triton here, which compiles the kernels; it comes with PyTorch's builds for GPUs")
    require(1 <= processes <= 64, f"--processes is {processes}; it must lie between 1 and 64")
    recorded = None if against is None else _recorded(against)
    out = console()
    data = _with_progress(_plan(quick, rejected, target=target, model=model, dtype=dtype), out, processes, fresh)
    if recorded is not None:
        same = f"{against} was recorded with Triton {recorded['triton']}, this is {data['triton']}; registers differ between versions"
        require(recorded["triton"] == data["triton"], same)
    broken = verdicts.problems(data, recorded)
    _show(data, broken, out)
    return Result(data | {"problems": broken}, not broken, ROWS)


def _plan(quick: bool, rejected: bool, **options: str | None) -> Plan:
    from ..static.sweep import ORIGINS, Plan

    given = {
        f"{name}s": tuple(part.strip() for part in text.split(",") if part.strip()) for name, text in options.items() if text is not None
    }
    return Plan(**given, quick=quick, origins=ORIGINS if rejected else ORIGINS[:2])  # type: ignore[arg-type]


def _recorded(path: Path) -> dict[str, Any]:
    from reference.config import require

    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        data = None
    usable = isinstance(data, dict) and {"rows", "triton"} <= data.keys()
    require(usable, f"--against is {path}, which is no result of `moebius kernels --json`")
    return data  # type: ignore[return-value]


def _with_progress(plan: Plan, out: Console, processes: int, fresh: bool) -> dict[str, Any]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from ..static import sweep

    columns = TextColumn("compiling"), BarColumn(bar_width=24), MofNCompleteColumn(), TimeElapsedColumn()
    with Progress(*columns, console=out, transient=True) as progress:
        task = progress.add_task("", total=None)
        return sweep.run(plan, lambda done, total: progress.update(task, completed=done, total=total), workers=processes, cached=not fresh)


def _show(data: Mapping[str, Any], broken: Sequence[str], out: Console) -> None:
    rows = data["rows"]
    for target in dict.fromkeys(row["target"] for row in rows):
        out.rule(f"[bold]{target}", align="left")
        out.print(_figure_table([row for row in rows if row["target"] == target]))
    out.rule("[bold]one layer, bf16, default blocks", align="left")
    out.print(_layer_table(data["layers"]))
    for line in broken:
        out.print(line, style="red", markup=False)
    out.print(
        f"{len(rows)} specialisations with Triton {data['triton']} in {data['seconds']:.0f} s, {len(broken)} problems. "
        "Statically verified, not benchmarked: nothing here is a time.",
        style="bold red" if broken else "bold green",
    )


def _span(values: Sequence[float], form: str = "{:g}") -> str:
    """One value, or the lowest and the highest."""
    low, high = form.format(min(values)), form.format(max(values))
    return low if low == high else f"{low}–{high}"


def _figure_table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """A line for each kernel, dtype and block size; the figures of its specialisations as a span."""
    from ._show import table

    names = "kernel", "dtype", "blocks", "w/s", "n", "regs", "spill", "KiB", "occ.", "matrix", "async", "loop"
    made = table(*names, left=("kernel", "dtype", "blocks", "matrix"))
    groups: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        key = row["role"], "/".join(SHOWN[dtype] for dtype in row["dtypes"]), row["origin"], tuple(row["blocks"].items())
        groups.setdefault(key, []).append(row)
    for (role, dtype, origin, blocks), own in groups.items():
        sizes, good = dict(blocks), [row for row in own if "error" not in row]
        tile = "×".join(str(sizes[name]) for name in ("rows", "columns", "depth", "block") if name in sizes)
        head = role, dtype, tile, f"{sizes['warps']}/{sizes['stages']}", str(len(own))
        style = "dim" if origin == "rejected" else None
        if not good:
            made.add_row(*head, "does not compile", style="red")
            continue
        matrix = {row["matrix"] for row in good}
        counted = _span([row["matrix_count"] for row in good])
        figures = [_span([row[name] for row in good]) for name in ("registers", "spilled")]
        figures += [_span([row["shared"] / 1024 for row in good], "{:.0f}"), _span([row["occupancy"] for row in good], "{:.2f}")]
        copies = _span([row["loop_async"] for row in good])
        made.add_row(
            *head, *figures, f"{'/'.join(sorted(matrix))} {counted}" if matrix != {""} else "–", copies,
            _span([row["loop"] for row in good]), style=style,
        )  # fmt: skip
    return made


def _layer_table(layers: Sequence[Mapping[str, Any]]) -> Table:
    """Launches, and the worst ratios of bytes to their minimum and of executed to useful FLOPs."""
    from ._show import table

    names = "model", "target", "launches f/b", "bytes: products", "the others", "FLOPs", "bound"
    made = table(*names, left=("model", "target"))
    for layer in layers:
        bytes_of = {role: done["touched"] / done["least"] for role, done in layer["work"].items()}
        products = {role: done for role, done in layer["work"].items() if done["useful"]}
        flops, bound = max((done["executed"] / done["useful"], done["bound"]) for done in products.values())
        others = max(ratio for role, ratio in bytes_of.items() if role not in products)
        launches = f"{layer['launches']['forward']}/{layer['launches']['backward']}"
        ratios = f"{max(bytes_of[role] for role in products):.3f}", f"{others:.3f}", f"{flops:.2f}", f"{bound:.2f}"
        made.add_row(layer["model"], layer["target"], launches, *ratios)
    return made
