"""`moebius parity`."""

from __future__ import annotations

from typing import Annotated

import typer

from . import Result


def run(
    preset: Annotated[str | None, typer.Option(help="Only the tiny layer of this preset, in training, with its noise and losses.")] = None,
    case: Annotated[str | None, typer.Option(help="Only this case of the proof.")] = None,
    tracks: Annotated[str | None, typer.Option(help="Only these tracks, separated by commas.")] = None,
    dtypes: Annotated[str, typer.Option(help="In these dtypes, separated by commas.")] = "float64,float32,bfloat16",
) -> Result:
    """Compare every track with the NumPy reference: output and all gradients, on every case and preset."""
    from reference import presets
    from reference.config import require
    from reference.proof import cases

    from ..comparison import Teeth, case_inputs, compare_tracks, preset_inputs, teeth
    from ..tour import worst_of_layers
    from ..tracks import DTYPES, TRUTH, YARDSTICK, select
    from ._show import absences, console, failures, parity_table

    chosen = select(tracks)
    kinds = tuple(name.strip() for name in dtypes.split(",") if name.strip())
    require(bool(kinds), f"dtypes is {dtypes!r}; known: {', '.join(DTYPES)}")
    for name in kinds:
        require(name in DTYPES, f"dtype {name!r} is unknown; known: {', '.join(DTYPES)}")
    require(preset is None or case is None, f"--preset {preset} and --case {case} exclude each other")
    some = preset is not None or case is not None
    all_cases = [cases.get(case)] if case is not None else [] if some else list(cases.CASES)
    all_presets = [preset] if preset is not None else [] if some else list(presets.names())
    inputs = {f"case {c.name}": case_inputs(c) for c in all_cases} | {f"preset {p}": preset_inputs(p) for p in all_presets}
    out = console()
    rows, bites = [], []
    with out.status("comparing") as status:
        for where, given in inputs.items():
            status.update(where)
            rows += compare_tracks(where, *given, tracks=chosen, dtypes=kinds)
            if where.startswith("case"):
                bites += [teeth(*given, dtype) for dtype in kinds if dtype != "float64"]
    require(bool(rows), f"no track of {tracks} computes in {dtypes} (the track {TRUTH} is what the others are compared with)")
    tried = Teeth(sum(b.tried for b in bites), tuple(name for b in bites for name in b.accepted))
    broken = [row for row in rows if row.broken]
    out.print(parity_table(worst_of_layers(rows), out.width))
    out.print(f"The worst of {len(inputs)} inputs for each track and dtype; errors relative to the RMS of NumPy in float64.", style="dim")
    out.print(f"yardstick: {YARDSTICK} in that dtype, whose error others may have twice, and a rounding more.", style="dim")
    if tried.tried:
        out.print(
            f"The verdict rejects {tried.tried - len(tried.accepted)} of {tried.tried} outputs that are wrong on purpose.", style="dim"
        )
    for line in absences(rows):
        out.print(line, style="dim", markup=False)
    for line in [*failures(rows), *(f"accepted although wrong: {name}" for name in tried.accepted[:6])]:
        out.print(line, style="red", markup=False)
    data = {"inputs": list(inputs), "rows": rows, "broken": len(broken), "teeth": tried}
    return Result(data, not broken and not tried.accepted, ("rows",))
