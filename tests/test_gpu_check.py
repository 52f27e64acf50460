"""The check for a machine with a GPU, on one without: every line that does not need the device itself, on tiny sizes or with a stand-in."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from conftest import REPOSITORY
from kernel_checks import INTERPRETED

from optimized.benchmarks.shapes import MODES, Shape
from optimized.gpu_check import __main__ as command
from optimized.gpu_check import behaviour, parts, peers, problems, racing, tuning
from optimized.gpu_check.device import CLOCKS, Cpu, Cuda, read_clocks
from optimized.gpu_check.parts import PARTS, Check
from optimized.gpu_check.results import CUT, DONE, FAILED, Results, failures, work_off
from optimized.kernels.blocks import Blocks, blocks_of

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="what a GPU shows is `make gpu-check` itself")
TINY = problems.TINY[0]


def given(shape: Shape = TINY, tokens: int = 8, dtype: torch.dtype = torch.bfloat16) -> Any:
    return problems.problem("cpu", shape, tokens, dtype)


def test_results_are_written_one_by_one_and_taken_up_again(tmp_path: Path) -> None:
    path, done = tmp_path / "deep" / "results.json", []

    def step(name: str) -> Callable[[], Any]:
        def run() -> dict[str, Any]:
            if name == "c" and not done.count("c"):
                done.append(name)
                raise RuntimeError("no such kernel")
            done.append(name)
            return {"good": name != "d", "on_disk": json.loads(path.read_text())["parts"]["p"]["results"] if path.exists() else None}

        return run

    lines: list[str] = []
    results = Results(path)
    assert work_off(results, "p", [(name, step(name)) for name in "ab"], 60, lines.append) == DONE
    assert work_off(Results(path), "p", [(name, step(name)) for name in "abcd"], 60, lines.append) == DONE
    assert done == ["a", "b", "c", "d"] and len(lines) == 4
    again = Results(path)
    assert again.part("p")["results"]["b"]["on_disk"].keys() == {"a"}, "a result is on disk before the next step begins"
    assert [line for line in failures(again) if "no such kernel" in line or "p: d" in line] == failures(again) and len(failures(again)) == 2
    assert list(path.parent.iterdir()) == [path]


def test_a_part_is_cut_when_its_time_is_over(tmp_path: Path) -> None:
    results = Results(tmp_path / "r.json")
    assert work_off(results, "p", [("a", lambda: 1)], -1) == CUT
    assert results.part("p")["results"] == {} and results.state("p") == CUT and results.state("q") is None
    assert work_off(results, "p", [("a", lambda: 1)], 60) == DONE


@pytest.mark.parametrize("text", ["[]", "{", '{"schema": 7}'])
def test_a_foreign_file_is_refused_and_kept(tmp_path: Path, text: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"mine\.json is no result"):
        Results(path)
    assert command.main(["--device", "cpu", "--out", str(path)]) == 2 and path.read_text() == text


def test_what_cannot_run_says_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "r.json")]
    assert command.main([*out, "--device", "cpu", "--parts", "environment,everything"]) == 2
    assert "'everything'; known: environment, parity" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert command.main(out) == 2 and "finds no GPU" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "unset it" in str(command._why_not("cuda"))
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert command._why_not("cuda") is None and "TRITON_INTERPRET=1" in str(command._why_not("cpu"))
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "triton" else object())
    assert "there is no triton" in str(command._why_not("cuda"))


def check(tmp_path: Path, **changed: Any) -> Check:
    small = {"shapes": (TINY,), "tokens": (8,), "seconds": 0.01, "cases": ("one-token",)}
    return Check(Cpu(), Results(tmp_path / "r.json"), **{**small, **changed})


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("behaviour", "autotune", "benchmark")]


@pytest.mark.parametrize("name", ["environment", *SLOW])
def test_a_part_runs_on_the_processor(name: str, tmp_path: Path) -> None:
    one = check(tmp_path)
    assert work_off(one.results, name, PARTS[name](one), 300) == DONE
    assert failures(one.results) == [] and one.results.part(name)["results"]


@pytest.mark.slow
def test_parity_runs_every_dtype_of_both_promises(tmp_path: Path) -> None:
    one = check(tmp_path)
    assert work_off(one.results, "parity", PARTS["parity"](one), 300) == DONE
    found = one.results.part("parity")["results"]
    assert {key.rpartition(",")[0] for key in found} == {
        *(f"apply_experts, {dtype}" for dtype in ("float32", "tf32", "bfloat16", "float16")),
        *(f"route, {dtype}" for dtype in ("float32", "bfloat16", "float16")),
    }
    assert failures(one.results) == [] and all(result["rms_error"] >= 0 for result in found.values())


def test_a_broken_promise_is_a_result_that_is_not_good() -> None:
    def wrong(*_: Any) -> list[Any]:
        raise AssertionError("y: RMS error 3 > 1")

    assert parts._proven(wrong, wrong, None, "float32", "cpu") == {"good": False, "why": "y: RMS error 3 > 1"}


@pytest.mark.slow
def test_the_tests_of_the_kernels_are_found_and_their_failures_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(check(tmp_path).tests) >= 4 and all(Path(path).exists() for path in check(tmp_path).tests)
    good, bad, slow = (tmp_path / f"test_{name}.py" for name in ("good", "bad", "slow"))
    good.write_text("def test_a(): pass\n")
    bad.write_text("def test_b(): assert 0\n")
    slow.write_text("import time\ndef test_c(): time.sleep(60)\n")
    one = check(tmp_path, tests=(str(good), str(bad)))
    assert work_off(one.results, "tests", PARTS["tests"](one), 300) == DONE
    found = one.results.part("tests")["results"]
    assert found["test_good.py"]["good"] and not found["test_bad.py"]["good"] and "test_b" in found["test_bad.py"]["failed"][0]
    monkeypatch.setattr(parts, "TEST_SECONDS", 2)
    assert parts._pytest(str(slow)) == {"good": False, "last": "not done after 2 s"}
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert parts._pytest(str(good)) == {"left out": "pytest is not installed"}


def test_other_blocks_hold_in_the_backward_too() -> None:
    seen: list[Blocks] = []
    tuning.with_blocks(lambda: seen.append(blocks_of("weight", torch.bfloat16, "ieee")), weight=Blocks(16, 16, 16))()
    assert seen == [Blocks(16, 16, 16)] and blocks_of("weight", torch.bfloat16, "ieee") != seen[0]


def test_tuning_keeps_the_fastest_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "interleave", lambda candidates, **_: {name: [9.0 - i] for i, name in enumerate(candidates)})
    found = tuning.tune(Cpu(), given(), 0.01)
    assert tuning.best(json.loads(json.dumps(found))) == {kernel: Blocks(16, 16, 16) for kernel in tuning.KERNELS}
    assert all(len(entry["milliseconds"]) == 2 for entry in found.values())
    assert tuning.best(None) == {} and tuning.best({"left out": "it does not fit into memory"}) == {}


def test_what_does_not_fit_is_left_out() -> None:
    class Small(Cpu):
        def free_bytes(self) -> int:
            return 0

    for found in (tuning._tuned(Small(), TINY, 8, 0.01), racing._raced(Small(), TINY, 8, MODES[0], 0.01, lambda key: None)):
        assert found == {"left out": "it does not fit into memory"}
    assert problems.needed_bytes(problems.SHAPES[0], 32768) > 2**33


@pytest.mark.slow
def test_a_race_has_ratios_and_names_who_is_left_out() -> None:
    tuned = {"up": Blocks(16, 16, 16)}
    found = racing.race(Cpu(), given(), MODES[1], tuned, 0.01)
    assert found["good"] and {peers.OURS, peers.TUNED} <= found["candidates"].keys()
    assert found["candidates"][peers.OURS]["times_ours"]["median"] == 1.0 and found["dense"]["flops"] > 0
    assert {"ScatterMoE", "MegaBlocks", "SonicMoE"} - found["candidates"].keys() <= found["left_out"].keys()


def test_who_computes_something_else_or_raises_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(problem: Any) -> Any:
        right = peers.ours(problem)
        return right._replace(call=lambda: right.call() * 1.5)

    def raises(problem: Any) -> Any:
        raise TypeError("an argument of another version")

    monkeypatch.setattr(
        racing, "builders", lambda problem, mode: {"a": lambda: wrong(problem), "b": lambda: raises(problem), "c": "absent"}
    )
    ready, out = racing.admitted(given(), MODES[0])
    assert not ready and "relative error" in out["a"] and out["b"].startswith("TypeError: an argument") and out["c"] == "absent"
    assert racing.race(Cpu(), given(), MODES[0], {}, 0.01)["good"] is False


def experts_of(up: torch.Tensor, down: torch.Tensor, x: torch.Tensor, expert: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """(combine) as a loop; up has its gate rows first."""
    out = torch.zeros_like(x)
    for slot in range(expert.shape[1]):
        for token in range(len(x)):
            a, u = (up[expert[token, slot]] @ x[token]).chunk(2)
            row = down[expert[token, slot]] @ (torch.nn.functional.silu(a) * u)
            out[token] = out[token] + gate[token, slot] * row
    return out


class FakeGLU(torch.nn.Module):
    """Stands in for ScatterMoE's layer: the halves of its first matrix in its own order."""

    def __init__(self, *, input_size: int, hidden_size: int, num_experts: int, top_k: int, activation: Any) -> None:
        super().__init__()
        self.experts, self.output_experts = torch.nn.Module(), torch.nn.Module()
        assert isinstance(activation, torch.nn.SiLU) and top_k > 0

    def forward(self, x: torch.Tensor, expert_p: torch.Tensor, expert_idxs: torch.Tensor) -> torch.Tensor:
        up_rows, gate_rows = self.experts.weight.chunk(2, dim=1)
        return experts_of(torch.cat([gate_rows, up_rows], 1), self.output_experts.weight, x, expert_idxs, expert_p)


class FakeDropless(torch.nn.Module):
    """Stands in for MegaBlocks' experts: three matrices of [E·F, D], tokens in the middle of three axes."""

    def __init__(self, arguments: Any) -> None:
        super().__init__()
        self.arguments, self.mlp = arguments, torch.nn.Module()

    def forward(self, x: torch.Tensor, scores: torch.Tensor, expert_weights: torch.Tensor, top_experts: torch.Tensor) -> Any:
        known = self.arguments
        shape = known.moe_num_experts, known.ffn_hidden_size, known.hidden_size
        w1, v1, w2 = (weight.view(shape) for weight in (self.mlp.w1, self.mlp.v1, self.mlp.w2))
        assert x.shape[1] == 1 and scores.shape[1] == known.moe_num_experts and known.bf16
        return experts_of(torch.cat([w1, v1], 1), w2.mT, x[:, 0], top_experts, expert_weights)[:, None], None


def fake_sonic(*arguments: Any) -> Any:
    """Stands in for SonicMoE: interleaved rows, experts last, flat sorted assignments."""
    x, scores, token, expert, w1, b1, w2, b2, count, stream, kind, inference = arguments
    assert b1 is None and b2 is None and kind == "swiglu" and isinstance(stream, int) and w1.shape[-1] == count == w2.shape[-1]
    assert bool((token[1:] >= token[:-1]).all()) and scores.dtype == torch.float32 and token.dtype == expert.dtype == torch.int32
    assert inference == (not torch.is_grad_enabled())
    up, slots = w1.permute(2, 0, 1), len(token) // len(x)
    rows = torch.cat([up[:, 0::2], up[:, 1::2]], 1)
    out = experts_of(rows, w2.permute(2, 0, 1), x, expert.long().view(-1, slots), scores.view(-1, slots).to(x.dtype))
    return out, None


def install(monkeypatch: pytest.MonkeyPatch, **modules: Any) -> None:
    """Fake packages: dots as double underscores."""
    for name, content in modules.items():
        module = types.ModuleType(name.replace("__", "."))
        module.__spec__ = types.SimpleNamespace(name=module.__name__, loader=None)  # type: ignore[assignment]
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, module.__name__, module)


@pytest.mark.parametrize("where", ["sonicmoe", "sonicmoe__functional"])
def test_the_peers_of_gpus_get_their_weights_as_they_want_them(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, scattermoe={}, scattermoe__mlp={"GLUMLP": FakeGLU}, megablocks={}, megablocks__layers={})
    install(monkeypatch, megablocks__layers__arguments={"Arguments": lambda **fields: types.SimpleNamespace(**fields)})
    install(monkeypatch, megablocks__layers__dmoe={"ParallelDroplessMLP": FakeDropless}, sonicmoe={}, sonicmoe__functional={})
    install(monkeypatch, sonicmoe__enums={"ActivationType": types.SimpleNamespace(SWIGLU="swiglu")})
    install(monkeypatch, **{where: {"moe_general_routing_inputs": fake_sonic}})
    monkeypatch.setattr(racing, "builders", lambda problem, mode: {p.name: (lambda p=p: p.build(problem)) for p in peers.GPU_PEERS})
    assert all(peers.missing(peer) is None for peer in peers.GPU_PEERS)
    for mode in MODES:
        ready, out = racing.admitted(given(Shape("odd", 16, 24, 4, 2)), mode)
        assert out == {} and set(ready) == {"ScatterMoE", "MegaBlocks", "SonicMoE"}


def test_clocks_are_what_the_tool_says(tmp_path: Path) -> None:
    tool = tmp_path / "nvidia-smi"
    for body, expected in (
        (f"echo {', '.join(str(i) for i in range(len(CLOCKS)))}", dict(zip(CLOCKS, map(str, range(len(CLOCKS))), strict=True))),
        ("exit 9", {}),
        ("true", {}),
    ):
        tool.write_text(f"#!/bin/sh\n{body}\n")
        tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
        assert read_clocks(str(tool)) == expected
    assert read_clocks(None) == {} and read_clocks(str(tmp_path / "absent")) == {}


class FakeGraph:
    """A recording that replays nothing."""

    replays = 0

    def replay(self) -> None:
        FakeGraph.replays += 1


class Scope:
    """A stream, or the inside of a `with`."""

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> Scope:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def wait_stream(self, other: Any) -> None:
        assert isinstance(other, Scope)


def test_the_calls_of_a_gpu_are_those_that_torch_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found = types.SimpleNamespace(name="G", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)
    stand_ins = {
        "get_device_properties": lambda _: found, "mem_get_info": lambda: (7, 8), "synchronize": lambda: None,
        "reset_peak_memory_stats": lambda: None, "memory_allocated": lambda: 10, "max_memory_allocated": lambda: 15,
        "Stream": Scope, "current_stream": Scope, "stream": Scope, "CUDAGraph": FakeGraph, "graph": Scope,
    }  # fmt: skip
    for name, stand_in in stand_ins.items():
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, stand_in)
    gpu, calls = Cuda(), []
    assert gpu.facts()["architecture"] == "9.0" and gpu.free_bytes() == 7 and gpu.clock() <= gpu.clock()
    assert gpu.peak_bytes(lambda: calls.append(1)) == 5 and isinstance(gpu.clocks(), dict)
    replay = gpu.replayed(lambda: calls.append(2) or "kept")
    assert replay() == "kept" and FakeGraph.replays == 1 and calls == [1, 2, 2]


def test_a_graph_that_forgets_its_inputs_is_noticed() -> None:
    class Frozen(Cpu):
        def replayed(self, call: Callable[[], Any]) -> Callable[[], Any]:
            kept = [tensor.clone() for tensor in call()]
            return lambda: kept

    assert behaviour.recorded(Cpu(), given()) and not behaviour.recorded(Frozen(), given())


def ending(code: int | None) -> Callable[..., int | None]:
    """Stands in for the process of a part that ends with this code, or never (None)."""
    return lambda *_: code


@pytest.mark.parametrize("code, why", [(None, "did not end within 5 s"), (-11, "ended with -11")])
def test_a_part_that_dies_or_hangs_outside_its_steps_is_failed_and_keeps_what_it_had(
    code: int | None, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = Results(tmp_path / "r.json")
    results.part("environment")["results"]["a"] = 1
    results.write()
    monkeypatch.setattr(command, "_ended", ending(code))
    command._in_a_process("environment", command._arguments(["--out", str(results.path), "--device", "cpu", "--seconds", "5"]))
    entry = Results(results.path).part("environment")
    assert entry["state"] == FAILED and why in entry["why"] and entry["results"] == {"a": 1}
    assert any(why in line for line in failures(Results(results.path)))


@pytest.mark.parametrize("code", [None, -11])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_dies_or_hangs_takes_no_other_with_it(
    code: int | None, first: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What hangs with the whole time of a part before it, or dies, has that as its result; what began late begins again."""
    results = Results(tmp_path / "r.json")
    results.part("tests")["step"] = {"key": "b", "first": first}
    results.write()
    monkeypatch.setattr(command, "_ended", ending(code))
    command._in_a_process("tests", command._arguments(["--out", str(results.path), "--device", "cpu", "--seconds", "5"]))
    entry = Results(results.path).part("tests")
    assert entry["state"] == CUT and "step" not in entry
    assert ("b" in entry["results"]) is (first or code is not None)
    assert len(failures(Results(results.path))) == len(entry["results"])
    steps = [("b", lambda: {"good": True}), ("c", lambda: {"good": True})]
    results = Results(results.path)
    assert work_off(results, "tests", steps, 60) == DONE and set(results.part("tests")["results"]) == {"b", "c"}


def test_the_file_says_which_step_runs(tmp_path: Path) -> None:
    path, seen = tmp_path / "r.json", []

    def look() -> None:
        seen.append(Results(path).part("tests")["step"])

    results = Results(path)
    work_off(results, "tests", [("a", look), ("b", look)], 60)
    assert seen == [{"key": "a", "first": True}, {"key": "b", "first": False}] and "step" not in Results(path).part("tests")


@pytest.mark.parametrize(
    "message, fresh",
    [
        ("CUDA error: an illegal memory access was encountered", True),
        ("Triton Error [CUDA]: an illegal memory access was encountered", True),
        ("Triton Error [HIP]: Code: 700, an illegal memory access was encountered", True),
        ("CUDA out of memory. Tried to allocate 2.00 GiB", False),
        ("out of resource: shared memory, Required: 278528, Hardware limit: 232448", False),
    ],
)
def test_after_an_error_that_spoils_the_device_a_new_process_goes_on(message: str, fresh: bool, tmp_path: Path) -> None:
    done: list[str] = []

    def spoil() -> None:
        raise RuntimeError(message)

    results = Results(tmp_path / "r.json")
    steps = [("a", spoil), ("b", lambda: done.append("b"))]
    assert work_off(results, "parity", steps, 60) == (CUT if fresh else DONE)
    assert bool(done) is not fresh and message in results.part("parity")["results"]["a"]["error"]
    assert work_off(results, "parity", steps, 60) == DONE and done == ["b"]


def test_the_process_of_a_part_is_ended_with_those_that_it_started(tmp_path: Path) -> None:
    """Where only the part's own process ended, its pytest would go on and keep the device."""
    child = f"import pathlib, time; time.sleep(2); pathlib.Path({str(tmp_path / 'alive')!r}).touch()"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert command._ended([sys.executable, "-c", parent], 1) is None
    time.sleep(2.5)
    assert not (tmp_path / "alive").exists()
    assert command._ended([sys.executable, "-c", "raise SystemExit(3)"], 30) == 3


HIDING = """
import importlib.machinery, runpy, sys
find = importlib.machinery.PathFinder.find_spec
class Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hidden = {"typer", "click", "rich", "safetensors", "matplotlib", "transformers", "sklearn", "hypothesis", "pytest"}
        return None if name.partition(".")[0] in hidden else find(name, path, target)
sys.meta_path[:] = [Finder if finder is importlib.machinery.PathFinder else finder for finder in sys.meta_path]
sys.argv[0] = "gpu-check"
runpy.run_module("optimized.gpu_check", run_name="__main__")
"""


@pytest.mark.slow
@pytest.mark.parametrize("part", [name for name in PARTS if name != "tests"])
def test_it_needs_nothing_but_numpy_torch_and_triton(part: str, tmp_path: Path) -> None:
    script, out = tmp_path / "hiding.py", tmp_path / "r.json"
    script.write_text(HIDING)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command_line = [sys.executable, str(script), "--device", "cpu", "--out", str(out), "--inside", part]
    done = subprocess.run(command_line, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert Results(out).state(part) == DONE and failures(Results(out)) == []


@pytest.mark.slow
def test_the_whole_command(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    arguments = ["--device", "cpu", "--out", str(tmp_path / "r.json"), "--parts", "environment,behaviour,autotune,benchmark"]
    for _ in range(2):  # the second call finds everything done
        done = subprocess.run(
            [sys.executable, "-m", "optimized.gpu_check", *arguments],
            capture_output=True,
            text=True,
            env=environment,
            cwd=REPOSITORY,
            timeout=500,
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("\n") == 1 and "0 problems" in done.stdout
