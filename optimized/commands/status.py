"""`moebius status`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import Result


def run(
    docs: Annotated[Path, typer.Option(help="The directory of the pages.")] = Path("docs"),
) -> Result:
    """Measure every preset against its recipe, autograd and transformers, and write docs/status.md again."""
    from reference.config import require

    from ..status import broken, measure, write
    from ._show import console

    require((docs / "results").is_dir(), f"--docs is {docs}, which has no results/; run this at the top of a checkout, or name its docs")
    out = console()
    with out.status("measuring") as shown:
        results = measure(shown.update)
    page, numbers = write(results, docs)
    failures = broken(results)
    for line in failures:
        out.print(line, style="red", markup=False)
    out.print(f"{len(results['rows'])} presets, {len(failures)} comparisons beyond their bound: {page}, {numbers}")
    return Result(results, not failures)
