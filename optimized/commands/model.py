"""`moebius model`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import Result, check_writable

LARGEST = 3_000_000


def run(
    out: Annotated[
        Path | None, typer.Option(help="The exported model; its log goes beside it as .json.", show_default="the committed model")
    ] = None,
    work: Annotated[Path, typer.Option(help="Checkpoints; a run that was cut off goes on from there.")] = Path("runs/model"),
    steps: Annotated[int | None, typer.Option(help="Fewer steps than the full training.")] = None,
) -> Result:
    """Train the tour's model in full and write the committed files again."""
    import dataclasses
    import platform
    import time
    from importlib.metadata import version

    from reference.autograd.checkpoints import checkpoint_files, export
    from reference.autograd.tour_model import MODEL_TRAIN, TOUR_MODEL
    from reference.autograd.training import train
    from reference.text import load_corpus

    from ..tour import COMMITTED
    from ..tracks import fastest
    from ._show import bits_table, console

    target = COMMITTED if out is None else out
    check_writable(target, "--out")
    config = MODEL_TRAIN if steps is None else dataclasses.replace(MODEL_TRAIN, steps=steps)
    corpus = load_corpus()
    resumed = bool(checkpoint_files(work))
    began = time.perf_counter()
    track = fastest(TOUR_MODEL.moe, config.dtype)
    result = train(TOUR_MODEL, config, corpus, moe_class=track.module(), out=work)
    seconds = time.perf_counter() - began
    versions = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "numpy")}}
    taken = None if resumed else round(seconds, 3)  # of a resumed run only the last part was timed
    record = {"model_config": TOUR_MODEL.to_dict(), "track": track.name, "versions": versions, "seconds": taken, **result.record}
    path = export(target, result.model, record=record)
    size = path.stat().st_size
    shown = console()
    heldout = next((row["heldout"] for row in reversed(result.log) if "heldout" in row), None)
    if heldout:
        shown.print(bits_table({"held-out": heldout}, corpus.domains))
    shown.print(f"{path}: {size:,} bytes, {config.steps} steps, {seconds:.0f} s", soft_wrap=True)
    if size > LARGEST:
        shown.print(f"larger than the limit of {LARGEST:,} bytes", style="red")
    return Result({"path": str(path), "bytes": size, "limit": LARGEST, **record}, size <= LARGEST)
