"""`moebius plan`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import Result
from ._config import read_config

if TYPE_CHECKING:
    from rich.table import Table

    from reference.model_config import ModelConfig

    from ..planning import Spread, Step


def run(
    preset: Annotated[str, typer.Option(help="A published model, at its published size.")] = "deepseek-v3",
    config: Annotated[Path | None, typer.Option(help='A JSON file instead: {"model": …}, fields of ModelConfig.')] = None,
    dtype: Annotated[str, typer.Option(help="Format of the weights: float32, bfloat16, float16, fp8 or mxfp4.")] = "bfloat16",
    tokens: Annotated[str, typer.Option(help="Tokens in a step, separated by commas.")] = "1,16,128,1024,4096",
    ranks: Annotated[str, typer.Option(help="Spread the experts over so many ranks, separated by commas.")] = "1,8,64",
    context: Annotated[int, typer.Option(help="Tokens of the sequence in which a token stands.")] = 4096,
) -> Result:
    """Count what a model needs before there is one: memory, what a step reads and computes, what experts on several ranks send."""
    from reference import presets

    from ..planning import plan
    from ._show import console

    model = presets.model(preset) if config is None else read_config(config)[0]
    counts = _counts(tokens, "--tokens")
    found = plan(model, tokens=counts, ranks=_counts(ranks, "--ranks") if model.moe_layers() else (), context=context, dtype=dtype)
    out = console()
    out.print(_headline(model), markup=False)
    out.print(_parts_table(found))
    out.print(_steps_table(found["steps"]))
    out.print(f"In sequences of {context:,} tokens. Experts: of each MoE layer, by a router without favourites.", style="dim")
    if found["ranks"]:
        out.print(_ranks_table(found["ranks"]))
        unit = found["ranks"][0].unit
        out.print(
            f"Of the rank with most experts, which like all has everything else. Rows: what one {unit} sends to other ranks in a layer, by "
            "an untrained router of these settings; KB: in all layers, there and back.",
            style="dim",
        )
    return Result(found, rows=("steps", "ranks"))


def _counts(text: str, option: str) -> list[int]:
    """The numbers of a comma-separated list. Raises ValueError where one is none, or below 1."""
    from reference.config import require

    words = [word.strip() for word in text.split(",")]
    require(
        all(word.isdecimal() and int(word) >= 1 for word in words), f"{option} is {text!r}; it must be integers ≥ 1, separated by commas"
    )
    return [int(word) for word in words]


def _headline(model: ModelConfig) -> str:
    layers, gating = model.moe_layers(), model.moe.gating
    blocks = f"{model.name}: {model.layers + model.encoder_layers} layers of width {model.d_model:,}, "
    if not layers:
        return f"{blocks}all dense"
    counts = sorted({config.experts.count for config in layers})
    shared = f", {model.moe.experts.shared} shared" if model.moe.experts.shared else ""
    chosen = f"chosen by {gating.choice!r}, K = {gating.top_k}{shared}"
    return f"{blocks}{len(layers)} with experts\n{' or '.join(map(str, counts))} experts, {chosen}"


def _parts_table(found: dict[str, Any]) -> Table:
    from ._show import table

    made = table("part", "stored", "a token meets", f"GB in {found['dtype']}", left=("part",))
    for name, (total, active) in found["parameters"].items():
        made.add_row(name.replace("_", " "), _count(total), _count(active), f"{total * found['bytes_per_weight'] / 1e9:,.2f}")
    return made


def _steps_table(steps: list[Step]) -> Table:
    from ._show import table

    made = table("tokens", "experts read", "GB read", "MB a token", "GFLOP a token", "MB kept")
    for one in steps:
        experts = "–" if one.experts is None else f"{one.experts:.1f}"
        gigabytes, each = f"{one.read_bytes / 1e9:,.2f}", f"{one.read_bytes / one.tokens / 1e6:,.1f}"
        flops, kept = f"{one.flops / one.tokens / 1e9:,.2f}", f"{one.kept_bytes / 1e6:,.1f}"
        made.add_row(f"{one.tokens:,}", experts, gigabytes, each, flops, kept)
    return made


def _ranks_table(spreads: list[Spread]) -> Table:
    from ._show import table

    made = table("ranks", "experts", "GB", "rows sent", "KB forward", "KB backward")
    for one in spreads:
        sent = [f"{size / 1e3:,.1f}" for size in (one.forward_bytes, one.backward_bytes)]
        made.add_row(f"{one.ranks:,}", f"{one.experts:,}", f"{one.weight_bytes / 1e9:,.2f}", f"{one.rows:.2f}", *sent)
    return made


def _count(number: int) -> str:
    """A number of parameters in the largest unit that leaves something before the point."""
    size, unit = next((size, unit) for size, unit in ((10**9, " B"), (10**6, " M"), (10**3, " K"), (1, "")) if number >= size or size == 1)
    return f"{number / size:,.2f}{unit}" if size > 1 else str(number)
