"""`moebius inspect`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import Result

if TYPE_CHECKING:
    from rich.table import Table

    from ..inspection import LayerFacts


def run(
    checkpoint: Annotated[
        Path | None, typer.Option(help="A checkpoint, an exported model or a directory of checkpoints.", show_default="the committed model")
    ] = None,
    windows: Annotated[int, typer.Option(help="Held-out pieces of text of each domain.")] = 24,
) -> Result:
    """Look inside a trained byte model: how even its experts' load is, who routes where, what it costs in bits."""
    import dataclasses

    import torch

    from reference.autograd.checkpoints import load_model
    from reference.autograd.training import heldout_bits
    from reference.config import require

    from .. import MoE, tour
    from ..inspection import layer_facts
    from . import _show

    path = tour.COMMITTED if checkpoint is None else checkpoint
    require(path.exists(), f"--checkpoint is {path}, which does not exist")
    require(windows >= 1, f"--windows is {windows}; there must be at least 1")
    model = load_model(path, moe_class=MoE, dtype=torch.float32)
    corpus, _ = tour.open_corpus()
    size = dataclasses.replace(tour.FULL, heldout=windows)
    out = _show.console()
    bits = heldout_bits(model, corpus, size.window, windows, 8)
    routings, domain_B = tour.heldout_routings(model, corpus, size)
    facts, routing = layer_facts(model, routings), tour.who_routes_where(routings, domain_B, corpus, size)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    out.print(f"{model.config.name}: {parameters:,} parameters, experts in {len(facts)} of {model.config.layers} layers", markup=False)
    out.print(_show.bits_table({"held-out": bits}, corpus.domains))
    if facts:
        out.print(_facts_table(facts))
        out.print(
            "MaxVio, variation: of the load, 0 where it is even. Strongest: the share of a token's gates that its largest one has.",
            style="dim",
        )
        out.print(_show.heat_table(routing, corpus.domains, out.width))
        out.print(_show.information_table(routing))
        out.print(f"A bar: an expert's share of the domain's tokens, in {windows} windows of {size.window} held-out bytes.", style="dim")
    data = {"checkpoint": str(path), "model_config": model.config.to_dict(), "parameters": parameters, "heldout": bits}
    return Result(data | {"layers": facts, "routing": routing})


def _facts_table(facts: Mapping[int, LayerFacts]) -> Table:
    """A line for each MoE layer."""
    from ._show import table

    made = table("layer", "MaxVio", "variation", "dead", "dropped", "strongest", "bias")
    for layer, one in facts.items():
        bias = "–" if one.bias_low is None else f"{one.bias_low:.3f} … {one.bias_high:.3f}"
        load = [f"{value:.3f}" for value in (one.max_violation, one.variation)]
        made.add_row(str(layer), *load, str(one.dead), f"{100 * one.dropped:.1f} %", f"{one.strongest:.3f}", bias)
    return made
