"""`moebius train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import Result

if TYPE_CHECKING:
    from reference.model_config import ModelConfig

SETTINGS = ("steps", "batch", "length", "accumulation", "lr", "seed", "dtype")


def _read_config(path: Path) -> tuple[ModelConfig, dict[str, Any]]:
    """(model, fields of TrainConfig) of a JSON file {"model": …, "train": …}."""
    from reference.config import require
    from reference.model_config import ModelConfig

    require(path.is_file(), f"--config is {path}, which is no file")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"--config is {path}, which is no JSON: {error}") from error
    require(isinstance(data, dict) and "model" in data, f'{path} must hold {{"model": …, "train": …}}, the second optional')
    for key in data:
        require(key in ("model", "train"), f"{path} has the unknown field {key!r}; known: model, train")
    try:
        return ModelConfig.from_dict(data["model"]), dict(data.get("train", {}))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} holds a model that cannot be read: {error}") from error


def run(
    preset: Annotated[str, typer.Option(help="The tiny model of this preset.")] = "deepseek-v3",
    config: Annotated[
        Path | None, typer.Option(help='A JSON file instead: {"model": …, "train": …}, fields of ModelConfig and TrainConfig.')
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps.")] = None,
    batch: Annotated[int | None, typer.Option(help="Sequences a step.")] = None,
    length: Annotated[int | None, typer.Option(help="Bytes a sequence.")] = None,
    accumulation: Annotated[int | None, typer.Option(help="Micro-batches a step.")] = None,
    lr: Annotated[float | None, typer.Option(help="Peak learning rate.")] = None,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal runs.")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, float64 or bfloat16.")] = None,
    track: Annotated[str, typer.Option(help="Whose layer the model is built from.")] = "reference.autograd",
    out: Annotated[Path, typer.Option(help="Where checkpoints and the model go.")] = Path("runs/train"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint there.")] = False,
) -> Result:
    """Train a byte model on the text that Python ships; checkpoints survive a kill, and --resume goes on bit by bit."""
    from reference import presets
    from reference.autograd.checkpoints import export
    from reference.autograd.training import TrainConfig, heldout_bits, train
    from reference.config import require

    from ..tour import open_corpus
    from ..tracks import select
    from ._show import bits_table, console

    given = dict(zip(SETTINGS, (steps, batch, length, accumulation, lr, seed, dtype), strict=True))
    model_config, settings = (presets.model(preset, tiny=True), {}) if config is None else _read_config(config)
    settings |= {name: value for name, value in given.items() if value is not None}
    train_config = TrainConfig.from_dict(settings)
    (chosen,) = select(track)[:1]
    require(chosen.moe_class is not None, f"--track is {track}, which is no module that a model can be built from")
    corpus, _ = open_corpus()
    result = train(model_config, train_config, corpus, moe_class=chosen.moe_class, out=out, resume=resume)  # type: ignore[arg-type]
    path = export(out / "model.safetensors", result.model, record=result.record)
    bits = heldout_bits(result.model, corpus, train_config.length, train_config.heldout, train_config.batch)
    shown = console()
    shown.print(bits_table({"held-out": bits}, corpus.domains))
    shown.print(f"moebius sample --checkpoint {path}", soft_wrap=True)
    return Result({"model": str(path), "heldout": bits, **result.record, "model_config": model_config.to_dict()})
