"""Training on several processes: the run of one process, its checkpoints on any number of them, and what a lost process does to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from distributed_worker import ep_mesh
from language_models import RUN, model_config, tiny_corpus
from test_expert_parallel import assert_good

from optimized import MoE, cli
from optimized.expert_parallel.checkpoints import full_state_dict
from optimized.expert_parallel.ranks import run_ranks
from optimized.expert_parallel.training import Processes, check_run
from reference import presets
from reference.autograd.checkpoints import checkpoint_files
from reference.autograd.training import TrainConfig, train
from reference.proof.equal import Tolerance

MODEL = model_config()
MEASURED = ("tokens_per_second", "rank_load", "bytes_sent")


def rows_of(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A log without what is measured."""
    return [{key: value for key, value in row.items() if key != "tokens_per_second"} for row in log]


def differences(found: Any, expected: Any, limit: float, where: str = "") -> list[str]:
    """Where two logs differ by more than `limit`, relative to the larger of 1 and the value."""
    if isinstance(expected, dict):
        missing = [f"{where}: {sorted(found)} instead of {sorted(expected)}"] * (not expected.keys() - set(MEASURED) <= found.keys())
        same = (differences(found[k], expected[k], limit, f"{where}.{k}") for k in expected if k in found and k not in MEASURED)
        return [*missing, *chain.from_iterable(same)]
    if isinstance(expected, list):
        pairs = enumerate(zip(found, expected, strict=True))
        return [line for i, (a, b) in pairs for line in differences(a, b, limit, f"{where}[{i}]")]
    if isinstance(expected, str) or expected is None:
        return [] if found == expected else [f"{where}: {found}"]
    return [] if abs(found - expected) <= limit * max(1, abs(expected)) else [f"{where}: {found} instead of {expected}"]


def training_checks(folder: str, sizes: tuple[int, ...]) -> list[str]:
    """In one of four ranks: runs on some numbers of processes are the run of one, and go on from each other's checkpoints."""
    corpus, failures = tiny_corpus(), []
    config = replace(RUN, dtype="float64", steps=6, batch=8, accumulation=2, evaluate_every=3, checkpoint_every=3, clip=0.5)
    alone = train(MODEL, config, corpus, progress=False)
    for ranks in sizes:
        processes, out = Processes(ep_mesh(ranks)), Path(folder, f"{ranks}-{torch.distributed.get_rank() // ranks}")
        spread = train(MODEL, config, corpus, moe_class=MoE, progress=False, out=out, processes=processes)
        failures += [f"{ranks} ranks: {line}" for line in differences(spread.log, alone.log, 1e-8)]
        for name, tensor in full_state_dict(spread.model).items():
            error = (tensor - alone.model.state_dict()[name]).abs().max().item()
            failures += [f"{ranks} ranks: {name}: {error:.2g}"] * (error > 1e-8)
        first = checkpoint_files(out)[0]
        torch.distributed.barrier()
        failures += [f"{ranks} ranks: {line}" for line in account(processes, spread.log)]
        # The checkpoint of step 3 alone, resumed by as many processes (to the bit), and by one.
        for other in (Processes(ep_mesh(ranks)), Processes(ep_mesh(1))):
            where = Path(folder, f"{out.name}-{other.count}-{torch.distributed.get_rank() // other.count}")
            if other.leader:
                where.mkdir()
                shutil.copy(first, where)
            torch.distributed.barrier()
            resumed = train(MODEL, config, corpus, moe_class=MoE, progress=False, out=where, processes=other)
            limit = 0 if other.count == ranks else 1e-8
            what = f"{ranks} ranks, resumed by {other.count}: "
            failures += [what + line for line in differences(resumed.log, spread.log, limit)]
            if limit == 0 and rows_of(resumed.log) != rows_of(spread.log):
                failures.append(what + "another load or traffic")
    return failures


def account(processes: Processes, log: list[dict[str, Any]]) -> list[str]:
    """What the processes did and sent adds up, over ranks and over steps."""
    summary, layers = processes.summary(), len(presets_moe_layers())
    tokens = 8 * RUN.length * 6 * MODEL.moe.gating.top_k * layers
    wrong = ["assignments do not add up"] * (sum(row["assignments"] for row in summary) != tokens)
    wrong += ["bytes do not add up"] * (sum(row["bytes_sent"] for row in summary) != sum(row["bytes_sent"] for row in log))
    wrong += ["a load of ranks is no distribution"] * any(abs(sum(row["rank_load"]) - 1) > 1e-3 for row in log)
    wrong += ["experts are missing"] * ([e for row in summary for e in row["experts"]] != list(range(MODEL.moe.experts.count)))
    return wrong + ["nothing was sent"] * (processes.count > 1 and summary[0]["bytes_sent"] == 0)


def presets_moe_layers() -> list[int]:
    return [layer for layer in range(MODEL.layers) if MODEL.is_moe(layer)]


def test_a_run_on_2_processes_is_that_of_one(tmp_path: Path) -> None:
    assert_good(run_ranks(2, training_checks, str(tmp_path), (2,), deadline=150))


@pytest.mark.slow
def test_a_run_on_4_processes_and_on_two_pairs_is_that_of_one(tmp_path: Path) -> None:
    assert_good(run_ranks(4, training_checks, str(tmp_path), (4, 2), deadline=300))


@pytest.mark.parametrize("model, batch, accumulation, processes, words", [
    (MODEL, 8, 1, 0, "--nproc is 0; there must be at least 1"),
    (MODEL, 16, 1, 16, "--nproc is 16, but a layer has 8 experts: 8 would have none"),
    (MODEL, 8, 4, 4, "--nproc is 4, which does not divide the 2 sequences of a micro-batch"),
    (replace(presets.model("dense", tiny=True)), 8, 1, 2, "has no MoE layer|but a layer has 1 experts"),
])  # fmt: skip
def test_a_run_that_cannot_be_spread_is_refused(model: Any, batch: int, accumulation: int, processes: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        check_run(model, batch, accumulation, processes)


@pytest.mark.parametrize("arguments, named", [
    ("--nproc 0", "--nproc is 0"),
    ("--nproc 3 --batch 4", "does not divide the 4 sequences"),
    ("--nproc 2 --batch 4 --max-restarts -1", "--max-restarts is -1"),
    ("--max-restarts 2", "without --nproc"),
])  # fmt: skip
def test_bad_numbers_of_processes_are_one_line(
    arguments: str, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(["train", "--preset", "mixtral-8x7b", "--steps", "1", *arguments.split()]) == cli.BAD_INPUT
    printed = capsys.readouterr()
    assert named in printed.err and printed.err.count("\n") == 1 and not printed.out.strip()


def test_a_run_cuts_no_experts() -> None:
    with pytest.raises(ValueError, match=r"mesh has 2 dimensions; a run spreads whole experts over one of them, as in mesh\['ep'\]"):
        Processes(cast(Any, SimpleNamespace(ndim=2)))


def test_what_every_process_would_refuse_is_refused_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    config = replace(RUN, steps=1, batch=2, length=16, evaluate_every=0)
    train(MODEL, config, tiny_corpus(), out=tmp_path / "earlier", progress=False)
    (tmp_path / "run.json").write_text(json.dumps({"model": MODEL.to_dict(), "train": replace(config, steps=2).to_dict()}))
    base = ["train", "--config", "run.json", "--nproc", "2", "--out", "earlier"]
    for more, named in (
        ((), "resume is False"),
        (("--resume",), "written with steps = 1, but this run has 2"),
        (("--length", "9" * 9), "but domain"),
    ):
        assert cli.run([*base, *more]) == cli.BAD_INPUT
        printed = capsys.readouterr()
        assert named in printed.err and printed.err.count("\n") == 1, printed


def start(folder: Path, name: str, *more: str, steps: int = 24, dtype: str = "float64") -> subprocess.Popen[bytes]:
    """`moebius train` as a program, of a tiny model with a checkpoint every four steps."""
    sizes = {"steps": steps, "batch": 4, "length": 64, "heldout": 2, "dtype": dtype}
    train_config = sizes | {"checkpoint_every": 4, "log_every": 1, "keep": 3}
    config = folder / f"{name}.config.json"
    config.write_text(json.dumps({"model": presets.model("deepseek-v3", tiny=True).to_dict(), "train": train_config}))
    command = [sys.executable, "-m", "optimized.cli", "train", "--config", str(config), "--out", str(folder / name)]
    log = (folder / f"{name}.log").open("wb")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPOSITORY)}
    command += ["--json", str(folder / f"{name}.json"), *more]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(folder: Path, name: str, process: subprocess.Popen[bytes], code: int = 0) -> dict[str, Any]:
    """What it reported, once it ended as it should."""
    try:
        assert process.wait(240) == code, (folder / f"{name}.log").read_text()[-3000:]
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait(30)
    return json.loads((folder / f"{name}.json").read_text())


def children(pid: int) -> list[int]:
    """Processes whose parent is this one."""
    found = []
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            number, _, rest = status.read_text().partition(" (")
        except OSError:
            continue
        if int(rest.rpartition(") ")[2].split()[1]) == pid:
            found.append(int(number))
    return sorted(found)


def kill_one_after(folder: Path, name: str, process: subprocess.Popen[bytes], steps: int) -> None:
    """SIGKILL the last worker once a checkpoint of so many steps is there."""
    end = time.monotonic() + 200
    while not any(int(path.stem.partition("-")[2]) >= steps for path in checkpoint_files(folder / name)):
        assert process.poll() is None and time.monotonic() < end, (folder / f"{name}.log").read_text()[-3000:]
        time.sleep(0.02)
    os.kill(children(process.pid)[-1], signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds workers in /proc")
def test_a_run_that_lost_a_process_goes_on_with_the_losses_of_one_that_did_not(tmp_path: Path) -> None:
    undisturbed = finish(tmp_path, "calm", start(tmp_path, "calm", "--nproc", "2"))
    restarted = start(tmp_path, "restarted", "--nproc", "2", "--max-restarts", "2")
    kill_one_after(tmp_path, "restarted", restarted, 4)
    found = finish(tmp_path, "restarted", restarted)
    assert rows_of(found["log"]) == rows_of(undisturbed["log"]) and found["heldout"] == undisturbed["heldout"]
    # Without a restart: an error that names the rank, no worker left, and the next command goes on, alone or spread.
    lost = start(tmp_path, "lost", "--nproc", "2")
    kill_one_after(tmp_path, "lost", lost, 4)
    workers = children(lost.pid)
    assert "was ended by SIGKILL" in finish(tmp_path, "lost", lost, cli.NOT_GOOD)["error"]
    assert not [pid for pid in workers if Path(f"/proc/{pid}").exists()]
    shutil.copytree(tmp_path / "lost", tmp_path / "alone")
    again = finish(tmp_path, "lost", start(tmp_path, "lost", "--nproc", "2", "--resume"))
    assert rows_of(again["log"]) == rows_of(undisturbed["log"])
    alone = finish(tmp_path, "alone", start(tmp_path, "alone", "--resume"))
    assert not differences(alone["log"], undisturbed["log"], 1e-8)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds workers in /proc")
def test_no_worker_outlives_a_command_that_was_killed(tmp_path: Path) -> None:
    process = start(tmp_path, "orphans", "--nproc", "2", steps=2000)
    end = time.monotonic() + 120
    while not checkpoint_files(tmp_path / "orphans"):
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    workers = children(process.pid)
    assert len(workers) == 2
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while left := [pid for pid in workers if Path(f"/proc/{pid}").exists()]:
        assert time.monotonic() < end, f"still there: {left}"
        time.sleep(0.1)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_losses_in_a_narrow_dtype_are_within_the_policy(dtype: str, tmp_path: Path) -> None:
    runs = {"truth": ((), "float64"), "alone": ((), dtype), "2": (("--nproc", "2"), dtype), "4": (("--nproc", "4"), dtype)}
    logs = {name: finish(tmp_path, name, start(tmp_path, name, *more, steps=3, dtype=kind))["log"] for name, (more, kind) in runs.items()}
    for name in ("2", "4"):
        # Later steps start from parameters that rounding has moved apart, by AdamW up to the learning rate.
        truth, eager, found = (np.float64(logs[which][0]["ce"]) for which in ("truth", "alone", name))
        assert abs(found - truth) <= Tolerance(dtype).max_bound(abs(eager - truth), truth), (name, found, eager, truth)


def test_a_config_of_the_tour_can_be_spread() -> None:
    from reference.autograd.tour_model import TOUR_MODEL, TOUR_TRAIN

    for processes in (1, 2, 4):
        check_run(TOUR_MODEL, TOUR_TRAIN.batch, TOUR_TRAIN.accumulation, processes)
    assert isinstance(TOUR_TRAIN, TrainConfig)
