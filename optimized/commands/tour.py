"""`moebius tour`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from . import Result, check_writable

if TYPE_CHECKING:
    from rich.console import Console

    from reference.text import Corpus

    from ..tour import Trained
    from ..tracks import Track


def run(
    smoke: Annotated[bool, typer.Option("--smoke", help="Everything, but small: a few seconds instead of minutes.")] = False,
    seconds: Annotated[float | None, typer.Option(help="Train for about this long.", show_default="60")] = None,
    out: Annotated[Path, typer.Option(help="The report.")] = Path("runs/tour/report.html"),
) -> Result:
    """Train a small model on text, compare the tracks on it, and see who routes where."""
    import dataclasses
    import math

    from reference.autograd.tour_model import TOUR_MODEL, TOUR_TRAIN
    from reference.config import require

    from .. import tour
    from ..report import render
    from ..tracks import fastest
    from . import _show

    require(seconds is None or (math.isfinite(seconds) and seconds > 0), f"--seconds is {seconds}; it must be finite and above 0")
    check_writable(out, "--out")
    size = tour.SMOKE if smoke else tour.FULL
    size = size if seconds is None else dataclasses.replace(size, train_seconds=seconds)
    began, shown = time.perf_counter(), _show.console()

    shown.rule("[bold]1 · the text", align="left")
    corpus, missing = tour.open_corpus()
    _show_corpus(shown, corpus, missing)

    shown.rule("[bold]2 · training", align="left")
    experts = TOUR_MODEL.moe.experts
    shown.print(
        f"{TOUR_MODEL.name}: {TOUR_MODEL.layers} layers, width {TOUR_MODEL.d_model}, {experts.count} experts of width {experts.width}, "
        f"{TOUR_MODEL.moe.gating.top_k} chosen, {experts.shared} shared; about {size.train_seconds:g} s of training."
    )
    track = fastest(TOUR_MODEL.moe, TOUR_TRAIN.dtype)
    shown.print(f"Its MoE layers are those of {track.name}, the fastest track here.", style="dim")
    model, log, steps, planned, taken = tour.train_live(TOUR_MODEL, TOUR_TRAIN, corpus, size, moe_class=track.module())
    details = dict(length=TOUR_TRAIN.length, batch=TOUR_TRAIN.batch)
    live = tour.examine(model, log, corpus, size, seconds=taken, steps=steps, planned=planned, **details)
    committed, note = _committed(corpus, size, track, details)
    models = {"this run": live} | ({"committed": committed} if committed else {})
    shown.print(_show.bits_table({f"{name}, {m.steps} steps": m.bits for name, m in models.items()}, corpus.domains))
    shown.print(note, style="dim")

    shown.rule("[bold]3 · are the tracks equal?", align="left")
    with shown.status("forward and backward through every layer in every track"):
        layers = tour.layer_inputs(model, corpus, size)
        rows = tour.parity_of_layers(layers)
    shown.print(_show.parity_table(tour.worst_of_layers(rows), shown.width))
    tokens = len(next(iter(layers.values()))[0].x)
    shown.print(f"{tokens} held-out bytes through {len(layers)} trained layers; each line shows the worst of them.", style="dim")
    shown.print(
        "Errors relative to the RMS of NumPy in float64; flips: choices between near-equal scores that rounding decided.", style="dim"
    )
    for line in _show.absences(rows):
        shown.print(line, style="dim", markup=False)
    for line in _show.failures(rows):
        shown.print(line, style="red", markup=False)

    shown.rule("[bold]4 · how fast are they?", align="left")
    with shown.status("timing"):
        timings = tour.speed_of_layer(layers, size.timing_seconds)
    shown.print(_show.speed_table(timings))
    shown.print("One layer, forward and backward, one thread, processor time, median of interleaved rounds.", style="dim")

    shown.rule("[bold]5 · who routes where", align="left")
    subject = committed or live
    shown.print(_show.heat_table(subject.routing, corpus.domains, shown.width))
    shown.print(_show.information_table(subject.routing))
    whose = "The committed model" if committed else "This run"
    shown.print(f"{whose}. A bar: an expert's share of the domain's tokens.", style="dim")
    shown.print("By chance: what the expert tells after the domains were dealt out anew, in 95 % of all cases.", style="dim")

    shown.rule("[bold]6 · what it writes", align="left")
    samples = tour.continue_text(subject.model, corpus, size.sample_bytes)
    _show_samples(shown, samples)

    data = {
        "corpus": {"domains": tour.corpus_facts(corpus), "missing": missing, "fingerprint": corpus.fingerprint()},
        "model_config": TOUR_MODEL.to_dict(),
        "models": {name: _facts(m) for name, m in models.items()},
        "note": note, "parity": rows, "parity_worst": tour.worst_of_layers(rows), "speed": timings, "samples": samples,
        "seconds": time.perf_counter() - began, "report": str(out.resolve()), "smoke": smoke,
    }  # fmt: skip
    out.write_text(render(data), encoding="utf-8")
    shown.rule(style="dim")
    shown.print(f"report: {out.resolve()}   ({data['seconds']:.0f} s)", soft_wrap=True, markup=False)
    return Result(data, not any(row.broken for row in rows))


def _facts(trained: Trained) -> dict[str, Any]:
    """A trained model without the model itself."""
    return {
        "steps": trained.steps, "planned": trained.planned, "seconds": trained.seconds, "heldout": trained.bits, "log": trained.log,
        "routing": trained.routing,
    }  # fmt: skip


def _show_corpus(shown: Console, corpus: Corpus, missing: dict[str, str]) -> None:
    from ..tour import corpus_facts
    from ._show import table

    made = table("domain", "training bytes", "held out", "documents", left=("domain",))
    for fact in corpus_facts(corpus):
        made.add_row(fact["domain"], f"{fact['train_bytes']:,}", f"{fact['heldout_bytes']:,}", f"{fact['documents']:,}")
    shown.print(made)
    shown.print(
        f"From this Python's own files and generated sums; nothing is downloaded. Fingerprint {corpus.fingerprint()[:16]}.", style="dim"
    )
    for why in missing.values():
        shown.print(f"without {why}", style="yellow", markup=False)


def _committed(corpus: Corpus, size: Any, track: Track, details: dict[str, int]) -> tuple[Trained | None, str]:
    """(the committed model on the same held-out text, what to say about it)."""
    from .. import tour

    found = tour.read_committed(track.module())
    if found is None:
        return None, f"There is no committed model ({tour.COMMITTED.name}); `moebius model` makes it. The tour goes on without."
    model, record = found
    steps, seconds = record["step"], record.get("seconds")
    trained = tour.examine(model, record["log"], corpus, size, seconds=seconds or 0.0, steps=steps, planned=steps, **details)
    taken = f" in {seconds / 60:.0f} minutes" if seconds else ""
    other = (
        ""
        if record["fingerprint"] == corpus.fingerprint()
        else " It was trained on another Python's text, so part of this held-out text may not be new to it."
    )
    return trained, f"The committed model has the same configuration, trained for {steps:,} steps{taken}.{other}"


def _show_samples(shown: Console, samples: list[dict[str, str]]) -> None:
    for one in samples:
        shown.print(f"{one['domain']}", style="bold")
        shown.print(one["prompt"], style="dim", end="", markup=False)
        shown.print(one["text"], markup=False)
        shown.print()
