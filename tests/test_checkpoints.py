"""Checkpoints: a run killed anywhere and resumed is the undisturbed run, bit for bit; of a bad file nothing is used."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from language_models import NOISY, RUN, model_config, random_bytes, random_model, tiny_corpus
from safetensors import safe_open
from safetensors.torch import save_file

from reference import moe_forward
from reference.autograd import MoE, checkpoints
from reference.autograd.checkpoints import Checkpoint, checkpoint_files, export, load, load_model, moe_parameters, save
from reference.autograd.training import TrainConfig, TrainResult, train

CORPUS = tiny_corpus()
BIASED = model_config("biases")


def run(out: Path | None, model=NOISY, config: TrainConfig = RUN, **options: object) -> TrainResult:
    return train(model, config, CORPUS, out=out, progress=False, **options)


def timeless(log: list[dict[str, object]]) -> list[dict[str, object]]:
    return [{**row, "tokens_per_second": 0} for row in log]


def assert_same(a: Checkpoint, b: Checkpoint) -> None:
    """Everything but the measured speeds, to the last bit."""
    assert (a.step, a.model_config, a.train_config, a.fingerprint) == (b.step, b.model_config, b.train_config, b.fingerprint)
    assert timeless(a.log) == timeless(b.log)
    for left, right in ((a.model, b.model), (a.optimizer, b.optimizer)):
        assert left.keys() == right.keys() and len(left) > 10
        assert all(left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run of NOISY that nobody touched; its two last checkpoints are steps 10 and 12."""
    directory = tmp_path_factory.mktemp("undisturbed")
    run(directory)
    return directory


class StopError(Exception):
    pass


def stop_at(step: int) -> Callable[..., None]:
    def callback(row, model) -> None:
        if row["step"] == step:
            raise StopError

    return callback


@pytest.mark.parametrize("stops", [(1,), (5,), (3, 4, 11)])
def test_resumed_run_is_the_undisturbed_one(undisturbed: Path, tmp_path: Path, stops: tuple[int, ...]) -> None:
    for step in stops:
        with pytest.raises(StopError):
            run(tmp_path, callback=stop_at(step))
    result = run(tmp_path)
    assert_same(load(tmp_path), load(undisturbed))
    assert timeless(result.log) == timeless(load(undisturbed).log)


def test_resumed_run_keeps_bias_and_parameters_in_place(tmp_path: Path) -> None:
    config = replace(RUN, accumulation=2, activation_checkpointing=True)
    with pytest.raises(StopError):
        run(tmp_path, model_config(), config, callback=stop_at(7))
    resumed, whole = run(tmp_path, model_config(), config), run(None, model_config(), config)
    assert all(torch.equal(a, whole.model.state_dict()[name]) for name, a in resumed.model.state_dict().items())
    assert any(moe.get_buffer("router.correction_bias").abs().sum() > 0 for moe in whole.model.moe_layers().values())


def test_finished_run_is_only_read(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert timeless(run(tmp_path).log) == timeless(load(undisturbed).log)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_equal_checkpoints_are_equal_files(undisturbed: Path, tmp_path: Path) -> None:
    path = save(tmp_path, load(undisturbed))
    assert path.read_bytes() == checkpoint_files(undisturbed)[-1].read_bytes()


KILLED = replace(RUN, steps=40, checkpoint_every=1, evaluate_every=0)


def train_until_killed(directory: str, started) -> None:
    torch.set_num_threads(1)
    started.set()
    run(Path(directory), config=KILLED)


def test_killed_run_resumes_bit_equal(tmp_path: Path) -> None:
    """SIGKILL at random moments, until a run comes through."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["reference.autograd.training", "test_checkpoints"])
    chance, kills, deadline = random.Random(time.time_ns()), 0, time.monotonic() + 60
    while time.monotonic() < deadline:
        started = context.Event()
        process = context.Process(target=train_until_killed, args=(str(tmp_path), started))
        process.start()
        assert started.wait(30)
        process.join(chance.uniform(0, 0.3) if kills < 3 else 30)
        if process.exitcode is not None:
            break
        process.kill()
        process.join()
        kills += 1
    assert process.exitcode == 0 and kills >= 1
    whole = run(None, config=KILLED)
    resumed = load(tmp_path)
    assert resumed.step == KILLED.steps and timeless(resumed.log) == timeless(whole.log)
    assert all(torch.equal(tensor, resumed.model[name]) for name, tensor in whole.model.state_dict().items())


OPERATIONS = ("open", "write", "fsync", "replace", "unlink")


class FileSystem:
    """Stands before each file operation of `save`: `before(name)` is called, then half of a write is done, then the whole operation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, before: Callable[[str], None]) -> None:
        self.before = before
        really_open = open

        def watched_open(path, mode="r", **options):
            self.before("open")
            file = really_open(path, mode, **options)
            return Watched(file, self) if "w" in mode else file

        monkeypatch.setattr(checkpoints, "open", watched_open, raising=False)
        for owner, name in ((os, "fsync"), (os, "replace"), (Path, "unlink")):
            monkeypatch.setattr(owner, name, self.watch(name, getattr(owner, name)))

    def watch(self, name: str, function: Callable[..., object]) -> Callable[..., object]:
        def watched(*args, **kwargs):
            self.before(name)
            return function(*args, **kwargs)

        return watched


class Watched:
    def __init__(self, file, system: FileSystem) -> None:
        self.file, self.system = file, system

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *reason: object) -> None:
        self.file.close()

    def write(self, content: bytes) -> None:
        self.system.before("write")
        half = len(content) // 2
        self.file.write(content[:half])
        self.file.flush()
        self.system.before("write")
        self.file.write(content[half:])

    def __getattr__(self, name: str):
        return getattr(self.file, name)


def two_saves(undisturbed: Path, directory: Path) -> tuple[Checkpoint, Checkpoint]:
    """An old checkpoint, saved in `directory`, and a newer one that is not."""
    new = load(undisturbed)
    old = replace(new, step=10, log=new.log[:10], model={name: tensor + 1 for name, tensor in new.model.items()})
    save(directory, old, keep=1)
    return old, new


def test_killed_between_any_two_file_operations(undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies on the disk before each operation is what a kill there would leave: it loads, and the next save cleans up."""
    out = tmp_path / "out"
    old, new = two_saves(undisturbed, out)
    seen: list[str] = []

    def snapshot(name: str) -> None:
        if not monkeypatched:
            return
        monkeypatched.clear()  # copying uses the watched functions
        shutil.copytree(out, tmp_path / str(len(seen)))
        seen.append(name)
        monkeypatched.append(True)

    monkeypatched: list[bool] = [True]
    with monkeypatch.context() as patched:
        FileSystem(patched, snapshot)
        save(out, new, keep=1)
    assert seen == ["open", "write", "write", "fsync", "replace", "fsync", "unlink"]
    assert [path.name for path in out.iterdir()] == ["step-00000012.safetensors"]
    for number, name in enumerate(seen):
        left = tmp_path / str(number)
        assert_same(load(left), new if number > seen.index("replace") else old)
        assert len(list(left.iterdir())) == (1 if number == 0 else 2), name
        save(left, new, keep=1)
        assert [path.name for path in left.iterdir()] == ["step-00000012.safetensors"]


@pytest.mark.parametrize("failing", range(7))
def test_failed_save_leaves_the_earlier_checkpoint(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    """Each file operation in turn fails, as on a full or broken disk: the error comes out, and the older checkpoint is all that stays."""
    old, new = two_saves(undisturbed, tmp_path)
    count = 0

    def fail(name: str) -> None:
        nonlocal count
        count += 1
        if count == failing + 1:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        FileSystem(patched, fail)
        with pytest.raises(OSError, match="No space left"):
            save(tmp_path, new, keep=1)
    replaced = failing >= 5
    assert_same(load(tmp_path), new if replaced else old)
    assert len(list(tmp_path.iterdir())) == (2 if replaced else 1)


def test_only_the_newest_stay(undisturbed: Path, tmp_path: Path) -> None:
    checkpoint = load(undisturbed)
    for step in (8, 9, 10, 99_999_999, 100_000_000):
        save(tmp_path, replace(checkpoint, step=step), keep=3)
    assert [path.name for path in checkpoint_files(tmp_path)] == [f"step-{step:08d}.safetensors" for step in (10, 99_999_999, 100_000_000)]
    assert load(tmp_path).step == 100_000_000
    with pytest.raises(ValueError, match="keep is 0"):
        save(tmp_path, checkpoint, keep=0)
    with pytest.raises(ValueError, match="not JSON compliant"):
        save(tmp_path, replace(checkpoint, log=[{"loss": float("nan")}]))


def read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, object]]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, json.loads(file.metadata()["moebius"])  # noqa: SIM118


Change = Callable[[dict[str, torch.Tensor], dict[str, object]], object]
CHANGES: dict[str, Change] = {
    "lacks the tensor 'layers.1.mlp.router.weight'": lambda t, m: t.pop("model.layers.1.mlp.router.weight"),
    "lacks the tensor 'exp_avg_sq.norm.weight'": lambda t, m: t.pop("optimizer.exp_avg_sq.norm.weight"),
    r"has 'norm.weight' of shape \(5,\); its config needs \(6,\)": lambda t, m: t.update({"model.norm.weight": torch.ones(5)}),
    "has 'step.norm.weight' of dtype torch.int64": lambda t, m: t.update({"optimizer.step.norm.weight": torch.tensor(1)}),
    "has the unknown tensor 'extra'": lambda t, m: t.update({"model.extra": torch.ones(1)}),
    "has the unknown tensor 'foreign'": lambda t, m: t.update({"foreign": torch.ones(1)}),
    "lacks the field 'log'": lambda t, m: m.pop("log"),
    "has the unknown field 'author'": lambda t, m: m.update(author="x"),
    "has version 2; this code reads version 1": lambda t, m: m.update(version=2),
    "is of kind 'picture'; known: training, model": lambda t, m: m.update(kind="picture"),
    r"is of kind \[\]; known: training, model": lambda t, m: m.update(kind=[]),
    "'norm.weight' of dtype torch.int32; parameters must be floating": lambda t, m: t.update(
        {"model.norm.weight": torch.ones(6, dtype=torch.int32)}
    ),
    "has step -1": lambda t, m: m.update(step=-1),
    "has a log that is no list of rows": lambda t, m: m.update(log={"loss": 1}),
    "ModelConfig has no field 'depth'": lambda t, m: m["model_config"].update(depth=3),
    "gating.top_k is 9 but experts.count is 4": lambda t, m: m["model_config"]["moe"]["gating"].update(top_k=9, second_choice="always"),
    "model_config that cannot be read": lambda t, m: m["model_config"].pop("moe"),
}


@pytest.mark.parametrize("message", CHANGES)
def test_changed_checkpoint_is_refused(undisturbed: Path, tmp_path: Path, message: str) -> None:
    source = checkpoint_files(undisturbed)[-1]
    tensors, metadata = read(source)
    CHANGES[message](tensors, metadata)
    path = tmp_path / source.name
    save_file(tensors, path, {"moebius": json.dumps(metadata)})
    for use in (load, load_model, run):
        with pytest.raises(ValueError, match=message) as error:
            use(path if use is not run else tmp_path)
        assert source.name in str(error.value)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.2, 0.7, 0.999])
def test_truncated_checkpoint_is_refused(undisturbed: Path, tmp_path: Path, kept: float) -> None:
    source = checkpoint_files(undisturbed)[-1]
    content = source.read_bytes()
    (tmp_path / source.name).write_bytes(content[: int(kept * len(content))])
    for use in (load, load_model):
        with pytest.raises(ValueError, match="is truncated or no safetensors file"):
            use(tmp_path)


FOREIGN: dict[str, Callable[[Path], object]] = {
    "is truncated or no safetensors file": lambda path: torch.save({"a": torch.ones(3)}, path),
    "without 'moebius' metadata": lambda path: save_file({"a": torch.ones(3)}, path),
    "metadata that is no JSON": lambda path: save_file({"a": torch.ones(3)}, path, {"moebius": "{"}),
    "metadata that is no mapping": lambda path: save_file({"a": torch.ones(3)}, path, {"moebius": "[1]"}),
    "does not exist": lambda path: None,
}


@pytest.mark.parametrize("message", FOREIGN)
def test_foreign_file_is_refused(tmp_path: Path, message: str) -> None:
    path = tmp_path / "step-00000001.safetensors"
    FOREIGN[message](path)
    for use in (load, load_model):
        with pytest.raises(ValueError, match=message):
            use(path)


def test_no_checkpoint_and_no_optimizer(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no checkpoint"):
        load(tmp_path)
    path = export(tmp_path / "model.safetensors", random_model(BIASED))
    with pytest.raises(ValueError, match="no optimizer state to go on from"):
        load(path)


OTHER_RUNS = {
    "lr = 0.02, but this run has 0.5": dict(config=replace(RUN, lr=0.5)),
    "steps = 12, but this run has 20": dict(config=replace(RUN, steps=20)),
    "moe = .* but this run has": dict(model=model_config("switch")),
    "corpus = ": dict(corpus=tiny_corpus(1)),
}


@pytest.mark.parametrize("message", OTHER_RUNS)
def test_checkpoint_of_another_run_is_not_resumed(undisturbed: Path, tmp_path: Path, message: str) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    options = {"model": NOISY, "config": RUN, "corpus": CORPUS} | OTHER_RUNS[message]
    with pytest.raises(ValueError, match=message):
        train(options["model"], options["config"], options["corpus"], out=tmp_path, progress=False)


def test_starting_anew_over_checkpoints_is_refused(undisturbed: Path, tmp_path: Path) -> None:
    shutil.copytree(undisturbed, tmp_path, dirs_exist_ok=True)
    with pytest.raises(ValueError, match="resume is False"):
        run(tmp_path, resume=False)
    run(tmp_path, config=replace(RUN, keep=5, checkpoint_every=0))  # these two change nothing that is computed
    assert len(checkpoint_files(tmp_path)) == 2


def test_export_rounds_parameters_and_keeps_biases(tmp_path: Path) -> None:
    class Other(MoE):
        pass

    model = random_model(BIASED, torch.float32).eval()
    path = export(
        tmp_path / "deep" / "model.safetensors", model, record={"step": 3, "train_config": RUN.to_dict(), "log": [{"step": 3}, {"step": 4}]}
    )
    stored, metadata = read(path)
    assert metadata["kind"] == "model" and set(stored) == set(model.state_dict())
    for name, tensor in model.state_dict().items():
        is_bias = name.endswith("router.correction_bias")
        assert torch.equal(stored[name], tensor if is_bias else tensor.bfloat16())
    record = json.loads(path.with_suffix(".json").read_text())
    assert record == {"step": 3, "train_config": RUN.to_dict(), "log": [{"step": 3}, {"step": 4}]}
    loaded = load_model(path, moe_class=Other, dtype=torch.float32)
    assert loaded.config == BIASED and not loaded.training and type(loaded.layers[1].mlp) is Other
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    assert {p.dtype for p in load_model(path).parameters()} == {torch.bfloat16}
    tokens = random_bytes(2, 9)
    assert (loaded(tokens)[0] - model(tokens)[0]).abs().max() < 0.2
    exact = load_model(export(tmp_path / "exact.safetensors", model, dtype=torch.float32))
    assert torch.equal(exact(tokens)[0], model(tokens)[0])
    assert not (tmp_path / "exact.json").exists()


def test_checkpoint_is_a_model_too(undisturbed: Path) -> None:
    model, checkpoint = load_model(undisturbed), load(undisturbed)
    assert all(torch.equal(tensor, checkpoint.model[name]) for name, tensor in model.state_dict().items())


def test_trained_layer_goes_to_numpy(tmp_path: Path) -> None:
    model = load_model(export(tmp_path / "model.safetensors", random_model(BIASED)))
    config, params = moe_parameters(model, 2)
    assert params["experts.up_proj"].dtype == np.float32
    x_TD = np.random.default_rng(0).standard_normal((5, config.d_model))
    expected = model.double().layers[2].mlp(torch.from_numpy(x_TD))[0]
    found = moe_forward(x_TD, {name: array.astype(np.float64) for name, array in params.items()}, config)[0].y
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=1e-11, atol=1e-12)
    with pytest.raises(ValueError, match=r"layer 0 has no experts; MoE layers: \[1, 2\]"):
        moe_parameters(model, 0)
