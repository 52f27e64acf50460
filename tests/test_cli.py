"""The command line: what it answers to bad input, its exit codes, its JSON, and that a broken track is found."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import REPOSITORY

from optimized import cli, comparison, tracks
from optimized.commands import COMMANDS
from optimized.contracts import CONTRACTS
from optimized.torch_backend import apply_experts as torch_apply_experts
from reference import presets
from reference.autograd import MoE
from reference.autograd.checkpoints import export
from reference.autograd.transformer import LanguageModel
from reference.proof.cases import CASES


@pytest.fixture(autouse=True)
def _without_an_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tests interpret the Triton kernels, that track takes minutes; it has tests of its own."""
    monkeypatch.delitem(tracks.TRACKS, "optimized triton", raising=False)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """An exported byte model that nobody trained."""
    return export(tmp_path / "model.safetensors", LanguageModel(presets.model("mixtral-8x7b", tiny=True)))


def read_json(path: Path) -> dict[str, Any]:
    """The file, which may hold no NaN and no infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)


@pytest.mark.parametrize(
    "arguments, named",
    [
        ("nonsense", "nonsense"),
        ("parity --nonsense", "--nonsense"),
        ("parity --preset gpt", "'gpt'"),
        ("parity --case nope", "'nope'"),
        ("parity --tracks fastest", "'fastest'"),
        ("parity --tracks ,", "','"),
        ("parity --tracks reference --case one-token", "reference"),
        ("parity --dtypes float12", "'float12'"),
        ("parity --preset dense --case tile", "dense"),
        ("parity --preset=", "''"),
        ("parity --case=", "''"),
        ("kernels --against {broken}", "broken.json"),
        ("parity --case tile --json {directory}", "{directory}"),
        ("train --preset gpt", "'gpt'"),
        ("train --steps many", "many"),
        ("train --steps 0", "steps is 0"),
        ("train --lr nan", "nan"),
        ("train --track reference --steps 1", "reference"),
        ("train --config {directory}/none.json", "none.json"),
        ("train --config {broken}", "broken.json"),
        ("train --config {unknown}", "'optimiser'"),
        ("train --config {field}", "'heads'"),
        ("train --config {deep}", "deep.json"),
        ("train --config {pairs}", "domain_weights is [5]"),
        ("train --config {flag}", "activation_checkpointing is 'no'"),
        ("train --config {listed}", "dtype is ['x']"),
        ("train --preset mixtral-8x7b --steps 1 --out {broken}", "broken.json"),
        ("sample --checkpoint {directory}/none.safetensors", "none.safetensors"),
        ("sample --checkpoint {broken}", "broken.json"),
        ("sample --checkpoint {model} --temperature -1", "-1"),
        ("sample --checkpoint {model} --count -5", "-5"),
        ("sample --checkpoint {model} --seed -1", "seed is -1"),
        ("sample --checkpoint {model} --seed 99999999999999999999", "seed is 99999999999999999999"),
        ("sample --checkpoint {model} --top-p 2", "2"),
        ("inspect --checkpoint {directory}/none.safetensors", "none.safetensors"),
        ("inspect --checkpoint {directory}", "{directory} holds no checkpoint"),
        ("inspect --checkpoint {model} --windows 0", "--windows is 0"),
        ("plan --preset gpt", "'gpt'"),
        ("plan --config {broken}", "broken.json"),
        ("plan --tokens 1,many", "--tokens is '1,many'"),
        ("plan --ranks 8,0", "--ranks is '8,0'"),
        ("plan --context 0", "context is 0"),
        ("plan --dtype int3", "'int3'"),
        ("conformance --backend gpu", "'gpu'"),
        ("conformance --backend native --dtypes float64", "'native' promises nothing in float64"),
        ("conformance --dtypes float12", "'float12'"),
        ("conformance --cases tile,nope", "'nope'"),
        ("conformance --device abacus", "'abacus'"),
        ("tour --seconds -3", "-3"),
        ("tour --out {directory}", "{directory}"),
        ("status --docs {directory}/nowhere", "nowhere"),
        ("status --docs {directory}", "{directory}, which has no results/"),
        ("tour --out {broken}/report.html", "{broken}"),
        ("model --out {directory}", "{directory}"),
        ("model --out {broken}/model.safetensors", "{broken}"),
        ("lab collapse --seeds=", "--seeds is ''"),
        ("bench --work {directory}", "--work is {directory}"),
        ("bench --quick --work {broken}", "{broken} is no benchmark's record"),
    ],
)
def test_bad_input_is_one_line_that_names_the_value(
    arguments: str, named: str, tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    contents = {
        "broken": "{",
        "unknown": '{"model": {}, "optimiser": {}}',
        "field": '{"model": {"name": "x", "heads": 3}}',
        "deep": "[" * 100_000,
    }
    tiny, trains = presets.model("mixtral-8x7b", tiny=True).to_dict(), {}
    trains |= {"pairs": {"domain_weights": [5]}, "flag": {"activation_checkpointing": "no"}, "listed": {"dtype": ["x"]}}
    contents |= {name: json.dumps({"model": tiny, "train": train}) for name, train in trains.items()}
    paths = {name: tmp_path / f"{name}.json" for name in contents} | {"directory": tmp_path, "model": model}
    for name, content in contents.items():
        paths[name].write_text(content, encoding="utf-8")
    assert cli.run([word.format(**paths) for word in arguments.split()]) == cli.BAD_INPUT
    printed = capsys.readouterr()
    assert printed.err.startswith("moebius: error: ") and printed.err.count("\n") == 1, printed.err
    assert named.format(**paths) in printed.err
    assert not printed.out.strip(), "the error came after results"


def test_a_run_that_diverges_is_measured_and_not_good(trained: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert trained("--steps", "30", "--lr", "1e30") == cli.NOT_GOOD
    assert "NaN or infinite gradients" in capsys.readouterr().out
    assert "NaN or infinite gradients" in read_json(Path("train.json"))["error"]


def test_a_run_shorter_than_its_patience_that_only_diverges_is_not_good(trained: Callable[..., int]) -> None:
    assert trained("--steps", "3", "--lr", "1e30") == cli.NOT_GOOD


def test_bad_input_leaves_no_empty_result_and_an_earlier_one_alone(tmp_path: Path) -> None:
    new, old = tmp_path / "new.json", tmp_path / "old.json"
    old.write_text("{}", encoding="utf-8")
    for path in (new, old):
        assert cli.run(["parity", "--preset", "gpt", "--json", str(path)]) == cli.BAD_INPUT
    assert not new.exists() and old.read_text(encoding="utf-8") == "{}"


def test_a_terminal_without_the_signs_gets_the_result_all_the_same(model: Path) -> None:
    words = [sys.executable, "-m", "optimized.cli", "sample", "--checkpoint", str(model), "--count", "1", "--prompt", "é ×"]
    done = subprocess.run(words, cwd=REPOSITORY, capture_output=True, text=True, env=os.environ | {"PYTHONIOENCODING": "ascii"})
    assert done.returncode == cli.GOOD, done.stderr
    assert done.stdout.startswith("? ?")


def test_debug_shows_where_an_error_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOEBIUS_DEBUG", "1")
    with pytest.raises(ValueError, match="gpt"):
        cli.run(["parity", "--preset", "gpt"])


def test_a_mistake_of_ours_is_not_called_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise TypeError("ours")

    monkeypatch.setattr(comparison, "compare_tracks", broken)
    with pytest.raises(TypeError, match="ours"):
        cli.run(["parity", "--case", "one-token"])


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help_and_json(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run([name, "--help"]) == cli.GOOD
    assert "--json" in capsys.readouterr().out


def test_help_comes_without_torch() -> None:
    code = "import sys; from optimized import cli; code = cli.run([]); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(name in done.stdout for name in COMMANDS)


def test_parity_is_good_and_writes_what_it_found(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "parity.json"
    assert cli.run(["parity", "--preset", "deepseek-v3", "--json", str(path)]) == cli.GOOD
    data = read_json(path)
    assert data["inputs"] == ["preset deepseek-v3"] and data["broken"] == 0
    found = {(row["track"], row["dtype"]): row for row in data["rows"]}
    assert found["reference.autograd", "float64"]["verdict"] == "equal"
    assert 0 < found["reference.autograd", "float64"]["rms_error"] < comparison.FLOAT64_LIMIT
    assert found["reference.autograd", "float32"]["verdict"] == "yardstick"
    assert {track for track, _ in found} == set(tracks.TRACKS) - {tracks.TRUTH}


def test_parity_of_a_case_tries_its_own_verdict(tmp_path: Path) -> None:
    path = tmp_path / "parity.json"
    assert cli.run(["parity", "--case", "drops", "--dtypes", "float32,bfloat16", "--json", str(path)]) == cli.GOOD
    bites = read_json(path)["teeth"]
    assert bites["tried"] >= 20 and bites["accepted"] == []


class TwoPercentMore(MoE):
    def forward(self, x, **arguments):
        y, aux = super().forward(x, **arguments)
        return 1.04 * y, aux


class NoRouterGradient(MoE):
    def apply_experts(self, x_TD, routing):
        return super().apply_experts(x_TD, routing._replace(gate=routing.gate.detach()))


class SecondBest(MoE):
    """Right arithmetic for a given routing, and a router of its own that swaps the slots of the first token."""

    def route_tokens(self, x_TD, tokens, replay=None):
        routing, losses = super().route_tokens(x_TD, tokens, replay)
        if replay is None and len(x_TD):
            routing = routing._replace(expert=torch.cat([routing.expert[:1].flip(1), routing.expert[1:]]))
        return routing, losses


class Crashes(MoE):
    def forward(self, x, **arguments):
        raise RuntimeError("no such kernel")


class NotANumber(MoE):
    def forward(self, x, **arguments):
        y, aux = super().forward(x, **arguments)
        return y * float("nan"), aux


@pytest.mark.parametrize(
    "layer, told",
    [(TwoPercentMore, "y:"), (NoRouterGradient, "router.weight"), (SecondBest, "choice: token 0"), (Crashes, "no such kernel"),
     (NotANumber, "nan")],
)  # fmt: skip
def test_a_broken_track_is_found(
    layer: type[MoE], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(tracks.TRACKS, "planted", tracks.module_track("planted", layer))
    path = tmp_path / "parity.json"
    assert cli.run(["parity", "--preset", "mixtral-8x7b", "--tracks", "planted", "--json", str(path)]) == cli.NOT_GOOD
    rows = read_json(path)["rows"]
    assert {row["verdict"] for row in rows} == {"broken"} and len(rows) == 2
    assert all(any(told in why for why in row["why"]) for row in rows), rows
    assert "planted, float32" in capsys.readouterr().out


def test_a_track_that_cannot_run_here_breaks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    track = tracks.module_track("elsewhere", Crashes, unavailable=lambda config, dtype: "needs another machine")
    monkeypatch.setitem(tracks.TRACKS, "elsewhere", track)
    path = tmp_path / "parity.json"
    assert cli.run(["parity", "--case", "tile", "--tracks", "elsewhere", "--json", str(path)]) == cli.GOOD
    assert [(row["verdict"], row["why"]) for row in read_json(path)["rows"]] == [("cannot", ["needs another machine"])] * 2


def test_a_name_is_one_track() -> None:
    with pytest.raises(ValueError, match=r"already called 'reference\.autograd'"):
        tracks.register(tracks.TRACKS[tracks.YARDSTICK])


def test_the_truth_is_the_truth() -> None:
    """The NumPy row itself, asked for the same outputs in the same names as every other row."""
    inputs, conditions = comparison.case_inputs(next(case for case in CASES if case.name == "drops"))
    ours, theirs = (tracks.TRACKS[name].run(inputs, "float64", conditions) for name in (tracks.TRUTH, tracks.YARDSTICK))
    assert ours.outputs.keys() == theirs.outputs.keys()
    with pytest.raises(ValueError, match=r"float32.*computes in float64"):
        tracks.TRACKS[tracks.TRUTH].run(inputs, "float32")


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`moebius train` of a tiny model, small enough for a second."""
    monkeypatch.chdir(tmp_path)

    def train(*more: str) -> int:
        sizes = ["train", "--preset", "mixtral-8x7b", "--batch", "2", "--length", "16", "--out", "run", "--json", "train.json"]
        return cli.run([*sizes, *more])

    return train


def test_train_resume_and_sample(trained: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trained("--steps", "3") == cli.GOOD
    data = read_json(tmp_path / "train.json")
    assert data["step"] == 3 and set(data["heldout"]) == {"code", "prose", "arithmetic"}
    capsys.readouterr()
    assert trained("--steps", "3") == cli.BAD_INPUT, "the checkpoints of a run would have been overwritten"
    assert "resume" in capsys.readouterr().err
    assert trained("--steps", "3", "--resume") == cli.GOOD
    assert read_json(tmp_path / "train.json")["heldout"] == data["heldout"]
    texts = []
    for seed in ("1", "1", "2"):
        words = f"sample --checkpoint run/model.safetensors --count 20 --seed {seed} --json s{seed}.json".split()
        assert cli.run([*words, "--prompt", "1 + 1 = "]) == cli.GOOD
        texts.append(read_json(tmp_path / f"s{seed}.json")["text"])
    assert texts[0] == texts[1] != texts[2]


def test_train_from_a_file_on_another_track(trained: Callable[..., int], tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    model = presets.model("switch-base-128", tiny=True)
    config.write_text(json.dumps({"model": model.to_dict(), "train": {"steps": 2, "lr": 0.001}}), encoding="utf-8")
    assert trained("--config", str(config), "--track", "optimized torch") == cli.GOOD
    data = read_json(tmp_path / "train.json")
    assert data["model_config"]["name"] == model.name
    assert data["train_config"]["lr"] == 0.001 and data["train_config"]["batch"] == 2


def test_a_narrow_terminal_folds_text_and_cuts_no_number(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    assert cli.run(["parity", "--case", "drops", "--dtypes", "float64,bfloat16"]) == cli.GOOD
    printed = capsys.readouterr().out
    assert "…" not in printed and max(map(len, printed.splitlines())) <= 60
    assert printed.count("bfloat16") > 3 and "yardstick" in printed


def test_plan_of_a_file_is_that_of_its_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, out = tmp_path / "config.json", tmp_path / "plan.json"
    config.write_text(json.dumps({"model": presets.model("mixtral-8x7b").to_dict()}), encoding="utf-8")
    words = ["plan", "--config", str(config), "--tokens", "1,7", "--ranks", "2", "--json", str(out)]
    assert cli.run(words) == cli.GOOD
    data, printed = read_json(out), capsys.readouterr().out
    assert [one["tokens"] for one in data["steps"]] == [1, 7] and [one["ranks"] for one in data["ranks"]] == [2]
    assert data["parameters"]["all"] == {"total": 46_702_792_704, "active": 12_879_925_248}
    assert "46.70 B" in printed and "12.88 B" in printed and "93.41" in printed


def test_plan_of_a_dense_model_has_no_ranks(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["plan", "--preset", "dense"]) == cli.GOOD
    assert "all dense" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["deepseek-v3", "soft-moe-s16-128", "expert-choice-8b-64e", "moe-plus-plus-7b", "dense"])
def test_inspect_takes_every_kind_of_router(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    path, out = export(tmp_path / "model.safetensors", LanguageModel(presets.model(name, tiny=True))), tmp_path / "found.json"
    assert cli.run(["inspect", "--checkpoint", str(path), "--windows", "1", "--json", str(out)]) == cli.GOOD
    data, printed = read_json(out), capsys.readouterr().out
    model = presets.model(name, tiny=True)
    layers = [str(layer) for layer in range(model.layers) if model.is_moe(layer)]
    assert list(data["layers"]) == list(data["routing"]) == layers
    assert all(7 < bits < 10 for bits in data["heldout"].values()), "a model that nobody trained knows nothing about a byte"
    assert ("MaxVio" in printed) == bool(layers)


def test_conformance_finds_a_broken_promise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def scaled(x_TD, routing, params, config):
        return torch_apply_experts(x_TD, routing, params, config) * 1.02

    promise = CONTRACTS["optimized.torch_backend.apply_experts"]
    planted = replace(promise, name="optimized.planted.apply_experts", function=scaled)
    monkeypatch.setitem(CONTRACTS, planted.name, planted)
    out = tmp_path / "found.json"
    words = ["conformance", "--backend", "torch", "--dtypes", "float64,float32", "--cases", "drops", "--json", str(out)]
    assert cli.run(words) == cli.NOT_GOOD
    verdicts = {(row["function"], row["dtype"]): row["verdict"] for row in read_json(out)["rows"]}
    assert verdicts[planted.name, "float64"] == verdicts[planted.name, "float32"] == "broken"
    assert verdicts[promise.name, "float64"] == verdicts[promise.name, "float32"] == "equal"
    assert re.search(r"planted.apply_experts: float64, case drops: y", " ".join(capsys.readouterr().out.split()))
