"""The benchmark's own honesty: planted times come out as planted ratios, and nothing that is wrong gets a number."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import needs_tool
from torch.utils.flop_counter import FlopCounterMode

from optimized import cli, contracts
from optimized.benchmarks import gate, journal, limits, machine, measure, memory, shapes, verdicts
from optimized.benchmarks.peers import OURS, RIVAL, Peer, Runnable, everybody
from optimized.benchmarks.shapes import LIMIT, MODES, PEER, Shape, problem, weights
from optimized.benchmarks.timing import PATIENCE, Candidate, Spread, interleave, ratio, steadiest
from optimized.environment import DEFAULTS
from optimized.torch_backend import apply_experts as torch_apply_experts
from reference.autograd import routing_to_numpy
from reference.layer import apply_experts_backward, apply_experts_forward

TINY = Shape("tiny", 24, 16, 6, 2)


class Clock:
    """A clock that only planted work moves; the machine gets slower from step to step."""

    def __init__(self) -> None:
        self.now, self.speed, self.order = 0.0, 1.0, []

    def work(self, name: str, seconds: float) -> Candidate:
        def step() -> None:
            self.order.append(name)
            self.now += seconds * self.speed

        return Candidate(step, lambda: setattr(self, "now", self.now + 100.0))  # preparing is not timed

    def __call__(self) -> float:
        return self.now


def test_planted_times_come_out() -> None:
    clock = Clock()
    times = interleave({"a": clock.work("a", 0.25), "b": clock.work("b", 0.5)}, seconds=1e-9, clock=clock, least=9)
    assert times == {"a": pytest.approx([0.25] * 9), "b": pytest.approx([0.5] * 9)}
    assert ratio(times["b"], times["a"]) == pytest.approx((2, 2, 2))


def test_ratios_do_not_feel_a_machine_that_slows_down() -> None:
    clock = Clock()
    candidates = {"a": clock.work("a", 0.01), "b": clock.work("b", 0.03)}
    slower = Candidate(lambda: setattr(clock, "speed", clock.speed * 1.5))
    times = interleave({**candidates, "weather": slower}, seconds=1e-9, clock=clock, least=12)
    assert max(times["a"]) > 10 * min(times["a"])
    assert ratio(times["b"], times["a"]).median == pytest.approx(3, rel=0.51)  # one change may fall between the two
    assert Spread.of(times["b"]).median / times["a"][0] > 10


def test_every_candidate_follows_every_other_one_and_goes_first() -> None:
    clock = Clock()
    interleave({name: clock.work(name, 0.1) for name in "abc"}, seconds=1e-9, clock=clock, least=40)
    rounds = ["".join(clock.order[3 + 3 * n : 6 + 3 * n]) for n in range(40)]
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    for pair in ("ab", "ba", "ac", "ca", "bc", "cb"):
        assert sum(pair in one for one in rounds) >= 5
    assert min(sum(one[0] == name for one in rounds) for name in "abc") >= 5


def test_a_slow_candidate_is_timed_a_few_times_only() -> None:
    clock = Clock()
    times = interleave({"quick": clock.work("quick", 0.1), "slow": clock.work("slow", 2.0)}, seconds=1e-9, clock=clock, least=8)
    assert (len(times["quick"]), len(times["slow"])) == (8, 2)
    assert ratio(times["slow"], times["quick"]).median == pytest.approx(20)


def test_a_disturbed_measurement_is_taken_again_and_the_steadiest_counts() -> None:
    steady, disturbed, worse = {"ours": [1.0, 1.1, 1.2]}, {"ours": [1.0, 2.0, 3.0]}, {"ours": [0.1, 2.0, 3.0]}
    for planned, lasting, found in (
        ([steady, worse], 0.0, (steady, 1)),
        ([worse, steady, worse], 0.0, (steady, 2)),
        ([worse, disturbed, worse, steady], 0.0, (disturbed, 3)),
        ([worse, disturbed, steady], PATIENCE / 2, (disturbed, 2)),
        ([worse, steady], PATIENCE, (worse, 1)),
    ):
        clock = Clock()
        takes = ((clock.work("take", lasting).step(), times)[1] for times in planned)
        assert steadiest(lambda takes=takes: next(takes), lambda times: [[1.0], times["ours"]], clock) == found


def test_a_first_step_that_prepares_the_others_is_not_slowness() -> None:
    clock = Clock()
    costs = iter([2.0] + [0.1] * 20)

    def step() -> None:
        clock.now += next(costs)

    times = interleave({"quick": clock.work("quick", 0.1), "prepares": Candidate(step)}, seconds=1e-9, clock=clock, least=8)
    assert times["prepares"] == pytest.approx([0.1] * 8)


def test_spread() -> None:
    assert Spread.of([3.0]) == (3, 3, 3)
    assert Spread.of([1.0, 2.0, 3.0, 4.0, 100.0]) == (3, 2, 4)


def tiny(tokens: int = 40, dtype: torch.dtype = torch.float32, load: str = "uniform") -> shapes.Problem:
    return problem(TINY, tokens, weights(TINY, dtype), load)


@pytest.mark.skipif(not memory.RESET.exists(), reason="only Linux counts the pages that a process has fetched")
def test_the_limit_does_not_pay_for_fresh_pages() -> None:
    program = """
import resource
from optimized.benchmarks import limits, shapes
shape = shapes.SHAPES["fine"]
products = limits.candidates(shapes.problem(shape, 1024, shapes.weights(shape, shapes.DTYPES["float32"]))).values()
def fetched():
    for product in products:
        product.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
before = [fetched() for _ in range(3)][-1]
print(fetched() - before)
"""
    environment = os.environ | DEFAULTS
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment)
    assert int(done.stdout) < 50, "a result of 2 MiB has 512 pages"


@pytest.mark.parametrize("mode, passes", [(MODES[0], 1), (MODES[1], 3)])
def test_the_limit_is_the_later_of_product_and_stream(mode: str, passes: int) -> None:
    given = tiny()
    touched_bytes = passes * given.touched * 3 * 24 * 16 * 4
    assert limits.active_flops(given, mode) == passes * 2 * 3 * 40 * 2 * 24 * 16
    assert limits.streamed_bytes(given, mode) == touched_bytes
    mm, packed = limits.PRODUCTS.values()
    times = {mm: [2.0, 2.0], packed: [1.0, 1.2], limits.STREAM: [1.0, 1.0]}
    assert limits.limit(given, mode, times) == (packed, [passes * 1.0, passes * 1.2])
    slow = {**times, limits.STREAM: [1e6, 2e6]}
    bound, seconds = limits.limit(given, mode, slow)
    assert "stream" in bound and seconds == pytest.approx([1e6 * touched_bytes / 2**27, 2e6 * touched_bytes / 2**27])


def test_what_the_limit_times_has_the_flops_it_claims() -> None:
    for tokens in (3, 7, 8):  # one block that is not full, whole ones, and a rest
        given = tiny(tokens)
        with FlopCounterMode(display=False) as counter:
            limits.candidates(given, 7)[limits.PRODUCTS["torch.mm"]].step()
        assert 3 * counter.get_total_flops() == 3 * limits.active_flops(given, MODES[0]) == limits.active_flops(given, MODES[1])


def test_loads() -> None:
    counts = {load: torch.bincount(tiny(500, load=load).expert.flatten(), minlength=6) for load in shapes.LOADS}
    assert counts["one takes all"].tolist() == [500, 500, 0, 0, 0, 0]
    assert counts["zipf"][0] > 3 * counts["zipf"][-1] and counts["uniform"].max() < 1.5 * counts["uniform"].min()
    with pytest.raises(ValueError, match="load is 'odd'"):
        tiny(load="odd")


def test_goals() -> None:
    by_measure = {goal.measure: goal for goal in shapes.goals("fine", 1024, MODES[0], "float32")}
    assert (by_measure[LIMIT].must, by_measure[LIMIT].goal, by_measure[PEER].must, by_measure[PEER].goal) == (0.8, 0.9, 2.0, None)
    assert shapes.goals("fine", 4096, MODES[0], "bfloat16")[0].must == 0.7
    assert shapes.goals("deepseek-mini", 128, MODES[1], "float32") == [shapes.Goal(MODES[1], PEER, 1.2, None)]
    assert shapes.goals("mixtral-mini", 1, MODES[1], "float32") == shapes.goals("tiny", 1, MODES[0], "float32") == []


@pytest.mark.parametrize("load", shapes.LOADS)
def test_the_truth_is_the_reference(load: str) -> None:
    given = tiny(load=load)
    params = {"experts.gate_up_proj": given.up, "experts.down_proj": given.down}
    empty = torch.zeros(0)
    routing = routing_to_numpy(given.routing._replace(load=empty, importance=empty, logits=empty, scores=empty, gate=given.gate.double()))
    arrays = {name: tensor.detach().double().numpy() for name, tensor in params.items()}
    y, cache = apply_experts_forward(given.x.detach().double().numpy(), routing, arrays, TINY.config)
    dx, dgate, dparams = apply_experts_backward(given.dy.double().numpy(), cache)
    exact = gate.truth(given)
    expected = {"y": y, "dx": dx, "dgate": dgate, "dup": dparams["experts.gate_up_proj"], "ddown": dparams["experts.down_proj"]}
    for name, array in expected.items():
        np.testing.assert_allclose(exact[name].numpy(), array, rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("dtype", shapes.DTYPES.values(), ids=str)
@pytest.mark.parametrize("mode", MODES)
def test_everybody_computes_the_same(mode: str, dtype: torch.dtype) -> None:
    needs_tool("transformers")
    given = tiny(dtype=dtype)
    ready, out = measure.build(given, mode, gate.truth(given), everybody())
    assert not {name: why for name, why in out.items() if why != f"it is what {OURS} runs"}
    assert {OURS, RIVAL, "GShard einsum", "loop over experts", "reference.autograd"} <= set(ready)


def test_the_gate_sees_what_is_wrong() -> None:
    given = tiny(load="one takes all")
    exact = gate.truth(given)
    assert not gate.differences(exact, exact, torch.float32)
    for name, tensor in exact.items():
        for wrong in (1.001 * tensor, torch.zeros_like(tensor), -tensor, tensor + math.nan, tensor[:-1]):
            assert gate.differences({**exact, name: wrong}, exact, torch.float32), name
    leftover = exact["dup"].clone()
    leftover[-1, 0, 0] = 1e-30
    assert gate.differences({**exact, "dup": leftover}, exact, torch.float32) == ["dup is not 0 for an expert without tokens"]


def test_peers_that_would_take_too_much_say_so() -> None:
    large = problem(shapes.SHAPES["fine"], 2048, weights(shapes.SHAPES["fine"], torch.float32))
    reasons = {peer.name: peer.refuse(large, MODES[1]) for peer in everybody() if peer.refuse(large, MODES[1])}
    assert {"transformers batched_mm", "GShard einsum", "transformers eager", "dense, equal total parameters"} <= set(reasons)
    assert not {OURS, RIVAL, "loop over experts"} & set(reasons)


def test_saved_bytes_counts_storages_once() -> None:
    given = tiny()
    x, width = given.x, 24 * 4 * 40

    def call() -> torch.Tensor:
        once = x * 2.0  # not saved by its own multiplication, which keeps no tensor
        return once.sin() + (once[1:] * once[:-1]).sum()

    assert memory.saved_bytes(given, Runnable(call, (given.up,), (given.down,))) == width
    assert memory.saved_bytes(given, Runnable(lambda: x @ given.up[0].T, (given.up,), (given.down,))) == 0


# ---- the command


SMALL = ["--shape", "tiny", "--dtypes", "float32", "--tokens", "8", "--seconds", "0.02", "--threads", "1", "--quick"]


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)  # the command keeps what is finished in runs/
    monkeypatch.setitem(shapes.SHAPES, "tiny", TINY)
    monkeypatch.setattr(gate, "CASES", ("few-tokens",))


def test_command_writes_what_it_measured(few: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "bench.json"
    assert cli.run(["bench", *SMALL, "--json", str(path)]) == cli.GOOD
    data = json.loads(path.read_text())
    assert data["schema"] == measure.SCHEMA and data["gate"] == {"green": True, "broken": []}
    assert {"processor", "cores", "versions", "environment", "native"} <= set(data["machine"])
    assert data["machine"]["versions"]["torch"] == torch.__version__.partition("+")[0] or data["machine"]["versions"]["torch"]
    assert set(data["load_average"]) == {"before", "after"} and data["plan"]["tokens"] == [8]
    assert [m["mode"] for m in data["measurements"]] == list(MODES)
    for measurement in data["measurements"]:
        assert measurement["limit"]["milliseconds"]["median"] > 0 and "process" in measurement["clock"]
        rows = {row["name"]: row for row in measurement["candidates"]}
        assert rows[OURS]["times_ours"] == {"median": 1.0, "low": 1.0, "high": 1.0}
        for row in rows.values():
            spread = row["milliseconds"]
            assert 0 < spread["low"] <= spread["median"] <= spread["high"] and row["rounds"] >= 2 and row["fraction"]["median"] > 0
        saved = {name: row["saved_bytes"] for name, row in rows.items()}
        assert (saved[OURS] is None) == (measurement["mode"] == MODES[0])
        assert saved[OURS] is None or 0 < saved[OURS] < saved[RIVAL]
    text = capsys.readouterr().out
    assert "best peer" in text and "Load average" in text and "We lose in" in text


def louder(factor: float) -> Any:
    def build(given: shapes.Problem) -> Runnable:
        params = {"experts.gate_up_proj": given.up, "experts.down_proj": given.down}
        return Runnable(
            lambda: factor * torch_apply_experts(given.x, given.routing, params, given.shape.config), (given.up,), (given.down,)
        )

    return build


def test_no_number_where_ours_is_wrong(
    few: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong = [Peer(OURS, louder(1.02), lambda given, mode: None, ours=True)]
    monkeypatch.setattr(measure.run, "__kwdefaults__", {**measure.run.__kwdefaults__, "peers": lambda: wrong})
    path = tmp_path / "bench.json"
    assert cli.run(["bench", *SMALL, "--json", str(path)]) == cli.NOT_GOOD
    data = json.loads(path.read_text())
    assert not data["gate"]["green"] and data["measurements"] == data["sweeps"] == []
    assert "relative error 2.0e-02" in data["gate"]["broken"][0]
    text = capsys.readouterr().out
    assert "The gate is red" in text and "of limit" not in text


def test_no_number_where_a_contract_is_broken(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = contracts.CONTRACTS["optimized.torch_backend.apply_experts"]
    assert gate.broken_contracts(["float32"]) == []

    def shifted(x_TD, routing, params, config):
        return torch_apply_experts(x_TD, routing._replace(gate=routing.gate.roll(1, 1)), params, config)

    monkeypatch.setitem(contracts.CONTRACTS, kept.name, dataclasses.replace(kept, function=shifted))
    assert len(gate.broken_contracts(["float32"])) == 1
    data = measure.run(measure.Plan(shapes=("tiny",), tokens=(8,), dtypes=("float32",)))
    assert not data["gate"]["green"] and data["measurements"] == []


def test_a_peer_that_computes_something_else_is_left_out(few: None) -> None:
    peers = [
        Peer(OURS, louder(1.0), lambda given, mode: None, ours=True),
        Peer("louder", louder(1.02), lambda given, mode: None),
        Peer("absent", louder(1.0), lambda given, mode: "it is not installed"),
    ]
    plan = measure.Plan(shapes=("tiny",), tokens=(8,), dtypes=("float32",), modes=MODES[:1], seconds=0.01, sweeps=False)
    (measurement,) = measure.run(plan, peers=lambda: peers)["measurements"]
    assert [row["name"] for row in measurement["candidates"]] == [OURS]
    assert measurement["left_out"]["absent"] == "it is not installed" and "2.0e-02" in measurement["left_out"]["louder"]


def planted(**numbers: float) -> dict[str, Any]:
    """One measurement of mixtral-mini at T = 1024 with given numbers."""

    def row(name: str, times: float, **more: Any) -> dict[str, Any]:
        spread = {"milliseconds": Spread(times, times, times), "times_ours": Spread(times, times, times), "rounds": 5, "saved_bytes": None}
        return {
            "name": name,
            "ours": False,
            "same_function": True,
            "fraction": Spread(*[numbers["fraction"] / times] * 3),
            **spread,
            **more,
        }

    rows = [row(OURS, 1.0, ours=True), row(RIVAL, numbers["rival"]), row("loop over experts", 9.0), row("dense", 0.1, same_function=False)]
    head = {"shape": "mixtral-mini", "tokens": 1024, "dtype": "float32", "mode": MODES[0], "threads": 1}
    return head | {"candidates": rows}


@pytest.mark.parametrize("fraction, rival, words", [
    (1.01, 1.3, ["beyond", "reached"]), (0.96, 1.1, ["reached", "missed"]), (0.4, 0.5, ["far under", "far under"]),
])  # fmt: skip
def test_verdicts_of_planted_numbers(fraction: float, rival: float, words: list[str]) -> None:
    data = {"measurements": [planted(fraction=fraction, rival=rival)], "sweeps": []}
    found = verdicts.verdicts(data)
    assert [(v.measure, v.value, v.verdict) for v in found] == [(LIMIT, fraction, words[0]), (PEER, rival, words[1])]
    assert found[1].rival == RIVAL
    assert bool(verdicts.losses(data)) == (rival < 1)


def test_verdicts_on_costs() -> None:
    words = [verdicts.Verdict("", "", value, 0.45, None, smaller=True).verdict for value in (0.4, 0.45, 0.5, 0.95)]
    assert words == ["reached", "reached", "missed", "far under"]


def counted(calls: list[int]) -> list[Peer]:
    """Ours, which counts how often it is built, and one peer."""

    def build(given: shapes.Problem) -> Runnable:
        calls.append(given.tokens)
        return louder(1.0)(given)

    return [Peer(OURS, build, lambda given, mode: None, ours=True), Peer(RIVAL, louder(1.0), lambda given, mode: None)]


def test_a_run_that_was_cut_off_goes_on_where_it_was(few: None, tmp_path: Path) -> None:
    plan = measure.Plan(shapes=("tiny",), tokens=(8, 9), dtypes=("float32",), modes=MODES[:1], seconds=0.01, sweeps=False)
    keep, calls = tmp_path / "kept.jsonl", []

    def stop(what: str, done: int | None = None, /) -> None:
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure.run(plan, stop, peers=lambda: counted(calls), keep=keep)
    assert calls == [8]
    keep.write_text(keep.read_text() + '{"key": "tiny; float32; 9')  # a last line that was cut off is not believed
    found = measure.run(plan, peers=lambda: counted(calls), keep=keep, resume=True)["measurements"]
    assert calls == [8, 9] and [m["tokens"] for m in found] == [8, 9]
    assert all(isinstance(row["milliseconds"], Spread) for m in found for row in m["candidates"])
    again = measure.run(plan, peers=lambda: counted(calls), keep=keep, resume=True)["measurements"]
    assert calls == [8, 9] and again == found
    other = dataclasses.replace(plan, seconds=0.02)
    measure.run(other, peers=lambda: counted(calls), keep=keep, resume=True)
    assert calls == [8, 9, 8, 9]
    measure.run(other, peers=lambda: counted(calls), keep=keep)
    assert calls == [8, 9, 8, 9, 8, 9]


def test_numbers_of_other_code_are_not_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(journal, "ROOT", tmp_path)
    source = tmp_path / "optimized" / "native" / "moe.c"
    source.parent.mkdir(parents=True)
    source.write_text("one")
    first = journal.fingerprint()
    assert journal.fingerprint() == first
    source.write_text("two")
    assert journal.fingerprint() != first


def peers_of_which_one_is_slow() -> list[Peer]:
    def waiting(given: shapes.Problem) -> Runnable:
        inner = louder(1.0)(given)
        return inner._replace(call=lambda: [inner.call() for _ in range(30)].pop())

    never = lambda given, mode: None  # noqa: E731
    return [Peer(OURS, louder(1.0), never, ours=True), Peer(RIVAL, louder(1.0), never), Peer("slow", waiting, never)]


@pytest.mark.parametrize("more, where", [({"tokens": (8, 9)}, "at T = 8"), ({"tokens": (8,), "threads": (1, 2)}, "on one thread")])
def test_a_peer_that_was_far_behind_is_left_out_later(
    few: None, monkeypatch: pytest.MonkeyPatch, more: dict[str, tuple[int, ...]], where: str
) -> None:
    monkeypatch.setattr(measure, "MANY_TOKENS", 9)
    plan = measure.Plan(shapes=("tiny",), dtypes=("float32",), modes=MODES[:1], seconds=0.05, sweeps=False, **more)
    first, then = measure.run(plan, peers=peers_of_which_one_is_slow)["measurements"]
    assert not first["left_out"] and f"the time of the best peer {where}" in then["left_out"]["slow"]
    assert [row["name"] for row in then["candidates"]] == [OURS, RIVAL]


def test_the_sweeps_say_what_they_vary(few: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "EXPERT_COUNTS", {f"{count} experts": Shape("", 8, 8, count, 2) for count in (4, 8)})
    monkeypatch.setitem(shapes.SHAPES, "deepseek-mini", TINY)
    monkeypatch.setattr(measure, "BATCHES", (1, 2, 16))
    plan = measure.Plan(shapes=("tiny",), tokens=(8,), dtypes=("float32",), modes=MODES[:1], seconds=0.01)
    sweeps = {sweep["sweep"]: sweep["rows"] for sweep in measure.run(plan)["sweeps"]}
    assert set(sweeps) == {"experts", "load", "batch"} == {name for name, _ in plan.swept}
    own = {name: [row for row in rows if row["name"] == OURS] for name, rows in sweeps.items()}
    assert [row["at"] for row in own["experts"]] == ["4 experts", "8 experts"] and own["experts"][0]["times_first"].median == 1
    assert [row["at"] for row in own["load"]] == list(shapes.LOADS)
    batch = own["batch"]
    assert [row["tokens"] for row in batch] == [1, 2, 16] and batch[0]["touched_experts"] == 2 and batch[-1]["touched_experts"] == 6
    assert all(row["touched_bytes"] == row["touched_experts"] * TINY.expert_elements * 4 for row in batch)


@pytest.mark.skipif(not memory.RESET.exists(), reason="only Linux says how much a process has grown")
def test_the_peak_of_a_step_is_what_it_had_at_once() -> None:
    size = 64 << 20

    def step() -> None:
        for _ in range(3):  # one after the other: they are never there together
            torch.ones(size // 4)

    peak = memory.peak_bytes(step)
    assert peak is not None and 0.95 * size <= peak < 1.5 * size  # a few pages were there already
    assert (memory.peak_bytes(lambda: None) or 0) < size // 4


@pytest.mark.parametrize("arguments, rival, code", [([], 1.1, cli.GOOD), (["--strict"], 1.1, cli.NOT_GOOD), ([], 0.5, cli.NOT_GOOD)])
def test_exit_code_of_planted_numbers(monkeypatch: pytest.MonkeyPatch, arguments: list[str], rival: float, code: int) -> None:
    data = {"gate": {"green": True, "broken": []}, "measurements": [planted(fraction=0.96, rival=rival)], "sweeps": [], "seconds": 1.0}
    data |= {"load_average": {"before": [0.1], "after": [0.1]}, "machine": {"processor": "a processor"}}
    monkeypatch.setattr(measure, "run", lambda plan, tell, **options: data)
    assert cli.run(["bench", "--quick", *arguments]) == code


@pytest.mark.parametrize("arguments, message", [
    (["--shape", "huge"], "shapes names 'huge'"), (["--tokens", "1,x"], "--tokens is '1,x'"), (["--tokens", "0"], "tokens is 0"),
    (["--threads", "9999"], "threads is 9999"), (["--threads", "-2"], "threads is -2"), (["--dtypes", "float16"], "dtypes names 'float16'"),
    (["--seconds", "0"], "seconds is 0"), (["--shape", ","], "shapes is empty"),
])  # fmt: skip
def test_bad_options_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", *arguments]) == cli.BAD_INPUT
    assert message in capsys.readouterr().err


def test_a_processor_is_named_with_its_generation(tmp_path: Path) -> None:
    described = tmp_path / "cpuinfo"
    assert machine._processor(described) == platform.processor()
    described.write_text("cpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\nmodel\t\t: 18\n", encoding="utf-8")
    assert machine._processor(described) == "AMD EPYC (family 25, model 17)"
    described.write_text("model name\t: Cortex\nCPU part\t: 0xd0c\n", encoding="utf-8")
    assert machine._processor(described) == "Cortex"
