"""The experiments of `moebius lab` at smoke size: what must hold whatever the runs find, and what is committed of the full ones."""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator
from typing import Any, get_args

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

from optimized.cli import run as command_line
from optimized.commands import lab as command
from optimized.lab import EXPERIMENTS, common, runner
from optimized.lab.masked import MaskedMoE
from reference.autograd.layer import MoE
from reference.config import BalanceConfig, GatingConfig, MoEConfig, ScoresConfig
from reference.redundancy import disable_top

FRAME = {"experiment", "question", "command", "smoke", "seeds", "versions", "corpus", "seconds"}


@pytest.fixture(scope="module")
def results() -> dict[str, dict[str, Any]]:
    """Every experiment once, with one seed."""
    return {name: runner(name)([0], True) for name in EXPERIMENTS}


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, float):
        yield value


def test_the_help_names_every_experiment() -> None:
    described = get_args(inspect.get_annotations(command.run, eval_str=True)["name"])[1].help
    assert described == f"Which experiment: {', '.join(EXPERIMENTS)}, or all."


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_frame(results: dict[str, dict[str, Any]], name: str) -> None:
    result = results[name]
    assert set(result) >= FRAME
    assert (result["experiment"], result["seeds"], result["smoke"]) == (name, [0], True)
    assert result["command"] == f"moebius lab {name} --seeds 0 --smoke --json docs/results/{EXPERIMENTS[name].result}.json"
    assert result == json.loads(json.dumps(result)) and all(map(math.isfinite, numbers(result)))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_claims_and_table(results: dict[str, dict[str, Any]], name: str) -> None:
    result = results[name]
    assert all(set(one) == {"claim", "source", "held", "seen", "rule"} and isinstance(one["held"], bool) for one in result["claims"])
    assert all(len(row) == len(result["table"]["columns"]) for row in result["table"]["rows"])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_committed_claims_and_their_rules_are_those_of_the_code(name: str) -> None:
    source = (REPOSITORY / f"optimized/lab/{name}.py").read_text(encoding="utf-8")
    claims = json.loads((REPOSITORY / f"docs/results/{EXPERIMENTS[name].result}.json").read_text(encoding="utf-8"))["claims"]
    assert claims and all(f'"{one[key]}"' in source for one in claims for key in ("claim", "rule"))


@pytest.mark.slow
def test_arms_of_collapse_start_alike_and_part(results: dict[str, dict[str, Any]]) -> None:
    first = {name: runs[0]["rows"][0] for name, runs in results["collapse"]["arms"].items()}
    assert first["nothing"] == first["auxiliary loss"] == first["bias"]
    ends = [runs[0]["end"]["bits"] for runs in results["collapse"]["arms"].values()]
    assert len(set(ends)) == 3
    for (run,) in results["collapse"]["arms"].values():
        assert all(0 <= vio <= 15 and 0 <= dead < 16 for row in run["rows"] for vio, dead in zip(row["max_vio"], row["dead"], strict=True))


@pytest.mark.slow
def test_bias_moves_by_its_step_and_not_without_one(results: dict[str, dict[str, Any]]) -> None:
    for rate, (run,) in results["bias"]["arms"].items():
        for row in run["rows"]:
            assert all(spread <= 2 * float(rate) * row["step"] * (1 + 1e-4) for spread in row["bias_range"])
        assert (max(run["rows"][-1]["bias_range"]) > 0) == (float(rate) > 0)


@pytest.mark.slow
def test_specialization_is_measured_at_every_checkpoint(results: dict[str, dict[str, Any]]) -> None:
    result = results["specialization"]
    (run,) = result["runs"]
    assert [one["step"] for one in run["checkpoints"]] == result["size"]["checkpoints"]
    for checkpoint in run["checkpoints"]:
        assert [one["disabled"] for one in checkpoint["masked"]] == [1, 2, 4]
        for layer in checkpoint["layers"].values():
            np.testing.assert_allclose(np.sum(layer["share"], axis=1), 1, atol=1e-4)
            for found in layer["information"].values():
                assert 0 <= found["information"] <= min(found["expert_entropy"], found["label_entropy"]) + 1e-4
    last = run["checkpoints"][-1]["layers"].values()
    assert all(layer["agreement"]["last"]["churn"] == 0 and layer["agreement"]["last"]["corrected"] == 1 for layer in last)
    assert run["checkpoints"][0]["bits"] != run["checkpoints"][-1]["bits"]


@pytest.mark.slow
def test_beginnings_trust_one_of_four_experts_at_every_point(results: dict[str, dict[str, Any]]) -> None:
    (run,) = results["beginnings"]["runs"]
    for way in run["ways"].values():
        assert len(way["trusted"]) == len(way["decided"]) == len(run["points"])
        assert set(way["trusted"]) <= set(range(4)) and way["sure"] == pytest.approx(np.mean(way["decided"]), rel=1e-4)
    best = int(np.argmax([curve[-1] for curve in run["em"]["likelihood"]]))
    assert run["ways"]["em"]["blend"] == run["em"]["blend"][best]


@pytest.mark.slow
@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_seed_decides_everything_but_the_time(results: dict[str, dict[str, Any]], name: str) -> None:
    again = runner(name)([0], True)
    assert {**again, "seconds": 0} == {**results[name], "seconds": 0}


def test_masked_layer_takes_the_next_experts_and_nothing_else_changes() -> None:
    gating = GatingConfig(top_k=2, correction_bias=True, normalize="sum", eps=1e-20)
    config = MoEConfig(8, ScoresConfig("sigmoid"), gating, balance=BalanceConfig(bias_rule="sign", bias_rate=0.1))
    torch.manual_seed(0)
    plain, masked = MoE(config).eval(), MaskedMoE(config).eval()
    plain.get_buffer("router.correction_bias").normal_()
    masked.load_state_dict(plain.state_dict())
    x = torch.randn(2, 9, 8)
    (y, aux), (same, _) = plain(x), masked(x)
    assert torch.equal(y, same)
    masked.rule = disable_top(1)
    changed, moved = masked(x)
    assert not torch.equal(y, changed)
    assert torch.equal(moved.routing.expert[:, 0], aux.routing.expert[:, 1])
    assert not (moved.routing.expert == aux.routing.expert[:, :1]).any()
    np.testing.assert_allclose(moved.routing.gate.sum(1).detach(), 1, rtol=1e-5)
    assert int(moved.routing.load.sum()) == 36


def test_threads_are_put_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(RuntimeError), common.one_thread():
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == before


def test_rounded_keeps_five_digits() -> None:
    assert common.rounded({"a": [1.23456789, 7, "x", None, True], "b": 1e-9}) == {"a": [1.2346, 7, "x", None, True], "b": 1e-9}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing", "--smoke"], "no experiment 'nothing'; known: collapse"),
        (["collapse", "--seeds", "0,a"], "--seeds is '0,a'"),
        (["collapse", "--seeds", "1,1"], "names a seed twice"),
    ],
)
def test_bad_input(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line(["lab", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_committed_is_a_full_run(name: str) -> None:
    result = json.loads((REPOSITORY / f"docs/results/{EXPERIMENTS[name].result}.json").read_text(encoding="utf-8"))
    assert len(result["seeds"]) >= 3 and not result["smoke"] and result["experiment"] == name
    assert result["versions"].keys() >= {"python", "numpy", "torch"}
    assert result["command"].startswith(f"moebius lab {name} ")
