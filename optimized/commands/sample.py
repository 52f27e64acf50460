"""`moebius sample`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from . import Result


def run(
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint, an exported model or a directory of checkpoints.", show_default="the committed model")
    ] = None,
    prompt: Annotated[str, typer.Option(help="The text to go on from.")] = "def ",
    count: Annotated[int, typer.Option(help="How many bytes.")] = 400,
    temperature: Annotated[float, typer.Option(help="0: always the most probable byte.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Only the most probable bytes that hold this share together.")] = 0.95,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal text.")] = 0,
) -> Result:
    """Let a trained byte model go on from a prompt."""
    import torch

    from reference.autograd.checkpoints import load_model
    from reference.autograd.sampling import sample
    from reference.config import require
    from reference.text import decode, encode

    from ..tour import COMMITTED, printable
    from ._show import console

    path = COMMITTED if checkpoint is None else checkpoint
    require(checkpoint is not None or path.is_file(), f"{path} does not exist: `moebius model` makes it, or name a --checkpoint")
    require(path.exists(), f"--checkpoint is {path}, which does not exist")
    model = load_model(path, dtype=torch.float32)
    given = encode(prompt).astype("uint8").tobytes()
    text = sample(model, given, count, temperature=temperature, top_p=top_p, seed=seed)
    shown = decode(list(text), "replace")
    out = console()
    out.print(prompt, style="bold", end="", markup=False, soft_wrap=True)
    out.print(printable(shown), markup=False, soft_wrap=True)
    return Result({"checkpoint": str(path), "prompt": prompt, "text": shown, "temperature": temperature, "top_p": top_p, "seed": seed})
