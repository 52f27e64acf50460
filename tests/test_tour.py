"""The tour: its measurements, its report, and the whole of it from end to end at a tiny size."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from optimized import cli, comparison, report, tour, tracks, yardstick
from reference import parameter_shapes, presets, text
from reference.autograd import MoE
from reference.autograd.checkpoints import export
from reference.autograd.training import TrainConfig
from reference.autograd.transformer import LanguageModel
from reference.proof.cases import CASES
from reference.proof.equal import rms
from reference.proof.parity import layer_truth

TINY = presets.model("deepseek-v3", tiny=True)
TRAIN = TrainConfig(steps=12, batch=2, length=32, warmup=2, log_every=4)
SIZE = tour.Size(0.5, heldout=2, parity_windows=1, parity_length=24, timing_seconds=0.05, permutations=20, sample_bytes=12)


@pytest.fixture(autouse=True)
def _without_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tests interpret the Triton kernels, that track takes minutes; it has tests of its own."""
    monkeypatch.delitem(tracks.TRACKS, "optimized triton", raising=False)


@pytest.fixture
def tiny_tour(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """`moebius tour` at a tiny size and without a committed model, in an empty directory."""
    monkeypatch.setattr("reference.autograd.tour_model.TOUR_MODEL", TINY)
    monkeypatch.setattr("reference.autograd.tour_model.TOUR_TRAIN", TRAIN)
    monkeypatch.setattr("reference.autograd.tour_model.MODEL_TRAIN", TRAIN)
    monkeypatch.setattr(tour, "COMMITTED", tmp_path / "committed" / "model.safetensors")
    monkeypatch.setattr(tour, "SMOKE", SIZE)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def untrained() -> LanguageModel:
    """A model whose routing is that of its initial weights."""
    torch.manual_seed(0)
    return LanguageModel(TINY).eval()


def export_with_log(path: Path, model: LanguageModel) -> None:
    """A model and a log where the tour looks for the committed ones."""
    row = {"step": 40, "loss": 2.0, "ce": 2.0, "max_vio": {"1": 0.5}}
    log = [dict(row, step=20, ce=None), row]
    export(path, model, record={"step": 40, "fingerprint": "of another machine", "log": log, "seconds": 120.0})


# The yardstick


@pytest.mark.parametrize("name", ["deepseek-v3", "switch-base-128", "gshard-600b"])
def test_renumbering_the_width_changes_nothing_but_rounding(name: str) -> None:
    """In float64 every order gives the truth, noise and losses included; a parameter on the wrong axis would be far away."""
    inputs, conditions = comparison.preset_inputs(name)
    recorded = comparison.moe_forward(
        inputs.x, inputs.params, inputs.config, training=True, group_ids=conditions.group_ids, rng=np.random.default_rng(0)
    )[0]
    conditions = conditions._replace(replay=recorded.routing)
    truth = layer_truth(inputs, **conditions._asdict())
    worst = yardstick.eager_outputs(inputs, truth, "float64", conditions)
    assert worst.keys() == truth.keys()
    for key, expected in truth.items():
        assert np.max(np.abs(worst[key] - expected), initial=0.0) <= 1e-11 * max(rms(expected), 1e-3), key


def test_the_yardstick_knows_every_parameter_and_is_no_nearer_than_one_run() -> None:
    names = {name for case in CASES for name in parameter_shapes(case.config())}
    names |= {name for preset in presets.names() for name in parameter_shapes(presets.tiny(preset))}
    assert {name.rpartition(".")[2] for name in names} <= yardstick.D_AXIS.keys()
    inputs, conditions = comparison.case_inputs(next(case for case in CASES if case.name == "one-token"))
    inputs = comparison.rounded_to(inputs, "float32")
    truth = layer_truth(inputs, **conditions._asdict())
    one = tracks.TRACKS[tracks.YARDSTICK].run(inputs, "float32", conditions).outputs
    worst = yardstick.eager_outputs(inputs, truth, "float32", conditions)
    assert all(np.all(np.abs(worst[key] - truth[key]) >= np.abs(one[key] - truth[key])) for key in truth)
    assert any(np.any(np.abs(worst[key] - truth[key]) > np.abs(one[key] - truth[key])) for key in truth)


# The parts


def test_a_missing_domain_is_named_and_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    domains = dict(text.DOMAINS, code=lambda seed: iter([("a", b"x" * 50), ("b", b"y" * 5)]), prose=lambda seed: iter(()))
    monkeypatch.setattr(text, "DOMAINS", domains)
    text._load_corpus.cache_clear()
    try:
        corpus, missing = tour.open_corpus()
    finally:
        text._load_corpus.cache_clear()
    assert corpus.domains == ("code", "arithmetic")
    assert list(missing) == ["prose"] and "prose" in missing["prose"]


@pytest.mark.parametrize("promised, done", [(None, 20), (40, 29)])
def test_training_takes_the_time_it_is_given(monkeypatch: pytest.MonkeyPatch, promised: int | None, done: int) -> None:
    """A step takes 0.3 s of this clock, which moves when it is read. Where the probe promised more steps, 1.4 × the time ends it."""
    ticks = itertools.count()
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks) / 10)
    if promised:
        monkeypatch.setattr(tour, "steps_in", lambda *_, **__: promised)
    corpus, _ = tour.open_corpus()
    size = dataclasses.replace(SIZE, train_seconds=6.01)
    model, log, steps, planned, seconds = tour.train_live(TINY, TRAIN, corpus, size, progress=False)
    assert (steps, planned) == (done, promised or done) and log[-1]["step"] == steps and not model.training
    assert done * 0.3 < seconds < done * 0.3 + 1
    assert log[-1]["ce"] < log[0]["ce"]


def test_the_layers_reached_by_text_are_equal_in_every_track(untrained: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(MoE):
        def apply_experts(self, x_TD, routing):
            return super().apply_experts(x_TD, routing).roll(1, 0)

    corpus, _ = tour.open_corpus()
    layers = tour.layer_inputs(untrained, corpus, SIZE)
    assert list(layers) == sorted(untrained.moe_layers())
    rows = tour.parity_of_layers(layers)
    assert not [row for row in rows if row.broken]
    assert {row.track for row in rows} == set(tracks.TRACKS) - {tracks.TRUTH}
    monkeypatch.setitem(tracks.TRACKS, "planted", tracks.module_track("planted", Wrong))
    worst = {(row.track, row.dtype): row for row in tour.worst_of_layers(tour.parity_of_layers(layers))}
    assert {key for key, row in worst.items() if row.broken} == {("planted", "float32"), ("planted", "bfloat16")}


def test_who_routes_where_sees_an_expert_that_reads_one_domain(untrained: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, _ = tour.open_corpus()
    size = dataclasses.replace(SIZE, heldout=8)
    found = tour.who_routes_where(*tour.heldout_routings(untrained, corpus, size), corpus, size)
    assert list(found) == sorted(untrained.moe_layers())
    for layer in found.values():
        assert np.allclose(np.sum(layer.share, axis=1), 1) and np.shape(layer.share) == (3, TINY.moe.experts.count)

    def by_domain(routing: Any) -> Any:
        tokens = len(routing.expert) // 3
        array = comparison.np.repeat(np.arange(3), tokens)[:, None].repeat(routing.expert.shape[1], 1)
        return dataclasses.replace(real(routing), expert=array, keep=np.ones_like(array, bool))

    real = tour.routing_to_numpy
    monkeypatch.setattr(tour, "routing_to_numpy", by_domain)
    for layer in tour.who_routes_where(*tour.heldout_routings(untrained, corpus, size), corpus, size).values():
        assert math.isclose(layer.information["information"], math.log2(3))
        assert layer.information["excess"] > 5 * (layer.information["null_high"] - layer.information["null_mean"])


def test_timing_sees_a_track_that_does_its_work_three_times(untrained: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    class Thrice(MoE):
        def apply_experts(self, x_TD, routing):
            return (super().apply_experts(x_TD, routing) + super().apply_experts(x_TD, routing) + super().apply_experts(x_TD, routing)) / 3

    corpus, _ = tour.open_corpus()
    monkeypatch.setitem(tracks.TRACKS, "thrice", tracks.module_track("thrice", Thrice))
    monkeypatch.setitem(tracks.TRACKS, "never", tracks.module_track("never", MoE, unavailable=lambda config, dtype: "not here"))
    timings = {t.track: t for t in tour.speed_of_layer(tour.layer_inputs(untrained, corpus, SIZE), 0.3)}
    assert timings["reference.autograd"].ratio == 1.0
    assert timings["thrice"].ratio is not None and timings["thrice"].ratio > 1.2
    assert timings["never"].milliseconds is None and timings["never"].why == "not here"


def test_what_a_terminal_would_obey_is_not_printed() -> None:
    assert tour.printable("a\x1b[31m\x07b\n\tü\ufffd") == "a·[31m·b\n ü·"


# The report


class Outside(HTMLParser):
    """What a page would fetch, and what its elements are."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, name: str, attributes: list[tuple[str, str | None]]) -> None:
        fetching = {"src", "href", "data", "srcset", "action", "xlink:href"}
        self.fetched += [f"{name} {key}={value}" for key, value in attributes if key in fetching] + [name] * (name in ("link", "script"))
        if name not in ("meta", "line", "circle", "polyline"):
            self.open.append(name)

    def handle_endtag(self, name: str) -> None:
        if self.open and name == self.open[-1]:
            self.open.pop()


def assert_self_contained(page: str) -> None:
    parsed = Outside(page)
    assert not parsed.fetched and not parsed.open, (parsed.fetched, parsed.open)
    assert not re.search(r"https?:|@import|url\(", page)
    assert "prefers-color-scheme: dark" in page


def test_the_check_of_the_report_sees_what_it_should() -> None:
    for bad in ('<img src="a.png">', '<link rel="stylesheet" href="b.css">', "<script>1</script>", "<style>@import 'x';</style>", "<p>"):
        with pytest.raises(AssertionError):
            assert_self_contained(f"<html>{bad}prefers-color-scheme: dark</html>")


def test_report_escapes_what_models_write_and_survives_an_empty_log() -> None:
    information = dict.fromkeys(("information", "null_low", "null_high", "excess", "p_value"), 0.1)
    routing = {1: tour.LayerRouting([[0.5, 0.5], [1.0, 0.0]], information)}
    model = {"steps": 3, "heldout": {"code": 1.0, "a<b": 2.0}, "log": [], "routing": routing}
    domains = [{"domain": name, "train_bytes": 10, "heldout_bytes": 1, "documents": 2} for name in ("code", "a<b")]
    data = {
        "corpus": {"domains": domains, "missing": {}, "fingerprint": "0" * 64},
        "model_config": {"name": "<i>"},
        "models": {"this run": model},
        "note": "<script>",
        "parity": [],
        "parity_worst": [comparison.Row("layer 1", "t", "float32", "broken", math.inf, math.nan, why=("x < y",))],
        "speed": [comparison.Timing("t", "float32", None, None, "no <b>")],
        "samples": [{"domain": "code", "prompt": "</pre>", "text": "<script>alert(1)</script>"}],
        "seconds": 1.0,
    }
    page = report.render(data)
    assert_self_contained(page)
    assert "&lt;script&gt;alert(1)" in page and "x &lt; y" in page


# All of it


def lines(capsys: pytest.CaptureFixture[str]) -> Iterator[str]:
    yield from capsys.readouterr().out.splitlines()


@pytest.mark.slow
def test_tour_from_end_to_end_without_a_committed_model(tiny_tour: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["tour", "--smoke", "--json", "tour.json"]) == cli.GOOD
    printed = list(lines(capsys))
    assert max(len(line) for line in printed if "report.html" not in line) <= 80
    assert any("no committed model" in line for line in printed)
    data = json.loads((tiny_tour / "tour.json").read_text())
    assert list(data["models"]) == ["this run"]
    assert {row["verdict"] for row in data["parity"]} <= {"equal", "yardstick", "cannot"}
    assert str(tiny_tour / "runs/tour/report.html") == data["report"] and any(data["report"] in line for line in printed)
    page = Path(data["report"]).read_text(encoding="utf-8")
    assert_self_contained(page)
    assert page.count("<svg") >= 3 and all(title in page for title in report.SECTIONS)


@pytest.mark.slow
def test_tour_shows_the_committed_model_and_a_broken_track(
    tiny_tour: Path, untrained: LanguageModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Wrong(MoE):
        def forward(self, x, **arguments):
            y, aux = super().forward(x, **arguments)
            return -y, aux

    export_with_log(tour.COMMITTED, untrained)
    monkeypatch.setitem(tracks.TRACKS, "planted", tracks.module_track("planted", Wrong))
    assert cli.run(["tour", "--smoke", "--json", "tour.json"]) == cli.NOT_GOOD
    printed = " ".join(lines(capsys))
    assert "planted, float32" in printed and "broken" in printed and "another Python" in printed
    data = json.loads((tiny_tour / "tour.json").read_text())
    assert list(data["models"]) == ["this run", "committed"] and data["models"]["committed"]["steps"] == 40
    assert_self_contained(Path(data["report"]).read_text(encoding="utf-8"))


def test_a_truncated_committed_model_is_named(tiny_tour: Path, untrained: LanguageModel, capsys: pytest.CaptureFixture[str]) -> None:
    export_with_log(tour.COMMITTED, untrained)
    tour.COMMITTED.write_bytes(tour.COMMITTED.read_bytes()[:-100])
    assert cli.run(["sample"]) == cli.BAD_INPUT
    assert "model.safetensors is truncated" in capsys.readouterr().err


def test_without_a_committed_model_there_is_nothing_to_sample(tiny_tour: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tour.read_committed() is None
    assert cli.run(["sample"]) == cli.BAD_INPUT
    assert "moebius model" in capsys.readouterr().err


def test_model_writes_what_the_tour_reads(tiny_tour: Path) -> None:
    path = tiny_tour / "new" / "model.safetensors"
    words = ["model", "--out", str(path), "--work", "work", "--steps", "4", "--json", "model.json"]
    assert cli.run(words) == cli.GOOD
    tour.COMMITTED = path  # undone with the fixture's own setting
    found = tour.read_committed()
    assert found is not None
    model, record = found
    assert model.config == TINY and next(model.parameters()).dtype == torch.float32
    assert record["step"] == 4 and record["log"] and record["seconds"] > 0
    assert {"python", "torch", "numpy"} <= record["versions"].keys()
    assert record["fingerprint"] == tour.open_corpus()[0].fingerprint()
    assert json.loads((tiny_tour / "model.json").read_text())["bytes"] == path.stat().st_size
