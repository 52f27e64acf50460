"""`moebius train`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import Result
from ._config import read_config

if TYPE_CHECKING:
    from reference.autograd.training import TrainConfig
    from reference.model_config import ModelConfig

SETTINGS = ("steps", "batch", "length", "accumulation", "lr", "seed", "dtype", "checkpoint_every")
TOUR = "tour"


def _read_preset(name: str) -> tuple[ModelConfig, dict[str, Any]]:
    """(model, fields of TrainConfig): the tiny model of a preset, or that of the tour with its settings."""
    from reference import presets
    from reference.autograd.tour_model import TOUR_MODEL, TOUR_TRAIN

    if name != TOUR:
        return presets.model(name, tiny=True), {}
    return TOUR_MODEL, {**TOUR_TRAIN.to_dict(), "checkpoint_every": TOUR_TRAIN.evaluate_every}


def run(
    preset: Annotated[str, typer.Option(help="The tiny model of this preset, or tour: the model of the tour.")] = "deepseek-v3",
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
    checkpoint_every: Annotated[int | None, typer.Option(help="Steps between checkpoints; 0: at the end only.")] = None,
    track: Annotated[str | None, typer.Option(help="Whose layer the model is built from.", show_default="the fastest here")] = None,
    out: Annotated[Path, typer.Option(help="Where checkpoints and the model go.")] = Path("runs/train"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint there.")] = False,
    nproc: Annotated[int | None, typer.Option(help="Spread whole experts over so many processes (torchrun); resume on any number.")] = None,
    max_restarts: Annotated[int, typer.Option(help="With --nproc: how often a lost process is replaced, from the last checkpoint.")] = 0,
) -> Result:
    """Train a byte model on the text that Python ships; checkpoints survive a kill, and --resume goes on bit by bit."""
    from reference.autograd.training import TrainConfig
    from reference.config import require

    from ..tracks import fastest, select

    given = dict(zip(SETTINGS, (steps, batch, length, accumulation, lr, seed, dtype, checkpoint_every), strict=True))
    model_config, settings = _read_preset(preset) if config is None else read_config(config)
    settings |= {name: value for name, value in given.items() if value is not None}
    train_config = TrainConfig.from_dict(settings)
    chosen = fastest(model_config.moe, train_config.dtype) if track is None else select(track)[0]
    moe_class = chosen.module()
    if nproc is None:
        require(max_restarts == 0, f"--max-restarts is {max_restarts}, but without --nproc there is one process, which nobody restarts")
        return _alone(model_config, train_config, moe_class, out, resume)
    return _spread(model_config, train_config, {"track": chosen.name, "out": str(out), "resume": resume}, nproc, max_restarts)


def _alone(model_config: ModelConfig, train_config: TrainConfig, moe_class: Any, out: Path, resume: bool) -> Result:
    """In this process; 1 where its gradients stayed NaN or infinite."""
    from reference.autograd.checkpoints import export
    from reference.autograd.training import heldout_bits, train

    from ..tour import open_corpus
    from ._show import console

    corpus, _ = open_corpus()
    try:
        result = train(model_config, train_config, corpus, moe_class=moe_class, out=out, resume=resume)
    except FloatingPointError as error:
        console().print(str(error), style="red", markup=False, soft_wrap=True)
        return Result({"error": str(error)}, False)
    path = export(out / "model.safetensors", result.model, record=result.record)
    bits = heldout_bits(result.model, corpus, train_config.length, train_config.heldout, train_config.batch)
    data = {"model": str(path), "heldout": bits, **result.record, "model_config": model_config.to_dict()}
    _show(data)
    return Result(data)


def _spread(model_config: ModelConfig, train_config: TrainConfig, rest: dict[str, Any], nproc: int, max_restarts: int) -> Result:
    """In many processes; 1 where one of them was lost for good."""
    from reference.autograd.training import start_from

    from ..expert_parallel.launch import RankFailedError, launch
    from ..expert_parallel.training import check_run
    from ..tour import open_corpus
    from ._show import console, table

    check_run(model_config, train_config.batch, train_config.accumulation, nproc)
    corpus, _ = open_corpus()
    start_from(model_config, train_config, corpus, rest["out"], rest["resume"])  # said here once, and not by every process
    try:
        data = launch({"model": model_config.to_dict(), "train": train_config.to_dict(), **rest}, nproc, max_restarts)
    except RankFailedError as error:
        console().print(str(error), style="red", markup=False, soft_wrap=True)
        return Result({"error": str(error)}, False)
    made = table("rank", "experts", "assignments", "share", "MB sent", left=("experts",))
    total = max(sum(row["assignments"] for row in data["ranks"]), 1)
    for row in data["ranks"]:
        names = f"{row['experts'][0]} … {row['experts'][-1]}" if row["experts"] else "none"
        share = f"{100 * row['assignments'] / total:.1f} %"
        made.add_row(str(row["rank"]), names, f"{row['assignments']:,}", share, f"{row['bytes_sent'] / 1e6:,.1f}")
    console().print(made)
    _show(data)
    return Result(data)


def _show(data: dict[str, Any]) -> None:
    """Held-out bits, and what to do with the model."""
    from ._show import bits_table, console

    shown = console()
    shown.print(bits_table({"held-out": data["heldout"]}, list(data["heldout"])))
    shown.print(f"moebius sample --checkpoint {data['model']}", soft_wrap=True)
