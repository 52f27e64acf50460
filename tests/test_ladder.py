"""The ladder: every rung keeps its contract (`test_contracts.py` tries it on every case), refuses what it has not, and is counted right."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch

pytest.importorskip("triton")

from kernel_checks import DEVICE, INTERPRETED

from optimized import proofs
from optimized.contracts import CONTRACTS, Contract
from optimized.ladder import RUNGS, count
from reference.config import MoEConfig
from reference.proof.cases import CASES, Case, get

KERNEL_RUNGS = [rung for rung in RUNGS if ".ladder." in rung.apply_experts.__module__ and rung.backend == "triton"]
COUNTED = [rung for rung in RUNGS if rung.backend != "native"]


def promise_of(rung) -> Contract:
    return CONTRACTS[f"{rung.apply_experts.__module__}.apply_experts"]


def test_every_rung_has_a_contract() -> None:
    assert [promise_of(rung).function for rung in RUNGS] == [rung.apply_experts for rung in RUNGS]
    assert len({rung.name for rung in RUNGS}) == len(RUNGS) >= 7


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", [case for case in CASES if case.products <= 100_000], ids=lambda case: case.name)
@pytest.mark.parametrize("rung", KERNEL_RUNGS, ids=lambda rung: rung.name)
def test_the_rungs_on_kernels_keep_their_contract_on_every_case(rung, case: Case, dtype: str) -> None:
    assert proofs.prove(promise_of(rung), case, dtype, DEVICE)


def without_the_last_slot(rung):
    def apply_experts(x_TD, routing, params, config):
        keep_TK = routing.keep.clone()
        keep_TK[:, -1] = False
        return rung.apply_experts(x_TD, routing._replace(keep=keep_TK), params, config)

    return apply_experts


@pytest.mark.parametrize("rung", RUNGS[:5], ids=lambda rung: rung.name)
def test_a_rung_that_loses_rows_is_noticed(rung) -> None:
    broken = dataclasses.replace(promise_of(rung), function=without_the_last_slot(rung))
    with pytest.raises(AssertionError, match="y: RMS error"):
        proofs.prove(broken, get("few-tokens"), "float32", DEVICE)


@pytest.mark.parametrize("rung", RUNGS[:5], ids=lambda rung: rung.name)
def test_a_layer_that_the_ladder_has_not_is_refused(rung) -> None:
    config = MoEConfig(8)
    config = dataclasses.replace(config, experts=dataclasses.replace(config.experts, gate_inputs=True))
    with pytest.raises(ValueError, match="gate_inputs is True"):
        rung.apply_experts(torch.zeros(1, 8), None, {}, config)


def test_a_launch_is_what_computes_and_moves_its_tensors_once() -> None:
    a = torch.ones(4, 8)
    with count.counted() as counter:
        torch.empty(3)
        b = a.T[:2]
        assert (counter.launches, counter.bytes) == (0, 0)
        a + a
        assert (counter.launches, counter.bytes, counter.products) == (1, 2 * 4 * 32, 0)
        b @ a
        assert (counter.launches, counter.bytes) == (2, 2 * 4 * 32 + 4 * (8 + 32 + 16))
    assert (counter.products, counter.flops, counter.operations) == (1, 2 * 2 * 4 * 8, {"add": 1, "mm": 1})


def committed() -> dict:
    return json.loads(count.RESULTS.read_text(encoding="utf-8"))


def test_the_committed_layers_are_these() -> None:
    for layer, case in zip(committed()["layers"], count.LAYERS, strict=True):
        assert {key: layer[key] for key in ("shape", "load", "rows")} == count.describe(case)
    for told, rung in zip(committed()["rungs"], RUNGS, strict=True):
        assert (told["name"], told["saves"], told["backend"]) == (rung.name, rung.saves, rung.backend)


@pytest.mark.skipif(not INTERPRETED, reason="counts the committed result again, which was made in the interpreter")
@pytest.mark.parametrize("rung", COUNTED, ids=lambda rung: rung.name)
def test_the_committed_counts_are_these(rung, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # filling fresh memory with NaN would be counted
    for case, layer in zip(count.LAYERS, committed()["layers"], strict=True):
        assert count.count(rung, DEVICE, case) == layer["counts"][RUNGS.index(rung)]


@pytest.mark.parametrize("rung", [rung for rung in RUNGS if rung.backend == "triton"], ids=lambda rung: rung.name)
def test_no_count_hangs_on_what_kernels_compute(rung, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    case = Case("small", "kernels run in a moment", T=9, D=16, F=8, E=8, K=2, load="few")
    found = count.count(rung, DEVICE, case)
    names = {name for part in ("forward", "backward") for name in found[part]["operations"]}
    monkeypatch.setattr(count, "RUN", names)
    assert count.count(rung, DEVICE, case) == found


def changes(layer: dict, part: str) -> list[list[int]]:
    """For each step up, of launches, FLOPs, bytes moved and bytes saved: whether it falls (−1), stays (0) or rises (1)."""
    rows = [[*(row[part][key] for key in ("launches", "flops", "bytes")), row["saved_bytes"]] for row in layer["counts"][: len(COUNTED)]]
    return [[(b > a) - (b < a) for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(rows)]


def test_what_the_chapter_says_of_the_steps_holds_on_every_layer() -> None:
    """With one exception, which it names: an even load and the most experts."""
    first, *others = committed()["layers"]
    steps = [[-1, 1, 1, 1], [1, -1, -1, -1], [-1, 0, -1, -1], [-1, 0, -1, -1], [-1, 0, -1, -1]]
    assert changes(first, "forward") == steps
    most = max(layer["shape"]["E"] for layer in others)
    for layer in others:
        padded = [-1, 1, -1, 1] if (layer["load"], layer["shape"]["E"]) == ("even", most) else steps[0]
        assert changes(layer, "forward") == [padded, *steps[1:]]


@pytest.mark.parametrize("load", ["even", "skewed", "one_takes_all"])
@pytest.mark.parametrize("rung", COUNTED, ids=lambda rung: rung.name)
def test_more_experts_are_more_bytes_and_more_launches_where_a_loop_runs_over_them(rung, load: str) -> None:
    layers = sorted((layer for layer in committed()["layers"] if layer["load"] == load), key=lambda layer: layer["shape"]["E"])
    launches, moved = ([layer["counts"][RUNGS.index(rung)]["forward"][key] for layer in layers] for key in ("launches", "bytes"))
    assert len(layers) == 3 and moved == sorted(set(moved))
    assert launches == sorted(set(launches)) if rung.name in ("loop", "sorted") else len(set(launches)) == 1


@pytest.mark.parametrize("rung", COUNTED, ids=lambda rung: rung.name)
def test_the_load_changes_the_padded_batch_alone(rung) -> None:
    for experts in {layer["shape"]["E"] for layer in committed()["layers"]}:
        found = [layer["counts"][RUNGS.index(rung)] for layer in committed()["layers"] if layer["shape"]["E"] == experts]
        assert len(found) == 3 and all(counts == found[0] for counts in found) == (rung.name != "padded batch")


def test_every_rung_multiplies_what_was_asked_for_and_the_padded_one_zeros_too() -> None:
    """2 · rows · (2F · D + D · F) forward, the gates' product of SwiGLU among them, and twice that backward."""
    for layer in committed()["layers"]:
        shape, rows = layer["shape"], layer["rows"]
        assert sum(rows) == shape["T"] * shape["K"]
        for rung, counted in zip(COUNTED, layer["counts"], strict=False):
            multiplied = len(rows) * max(rows) if rung.name == "padded batch" else sum(rows)
            flops = 2 * multiplied * 3 * shape["D"] * shape["F"]
            assert (counted["forward"]["flops"], counted["backward"]["flops"]) == (flops, 2 * flops)
            assert all(sum(counted[part]["operations"].values()) == counted[part]["launches"] for part in ("forward", "backward"))


def test_each_rung_does_without_something() -> None:
    rows = {told["name"]: row for told, row in zip(committed()["rungs"], committed()["layers"][0]["counts"], strict=True)}
    launches, moved, saved = (
        {name: value(row) for name, row in rows.items()}
        for value in (lambda row: row["forward"]["launches"], lambda row: row["forward"]["bytes"], lambda row: row["saved_bytes"])
    )
    assert launches["padded batch"] < launches["loop"] / 4
    assert moved["sorted"] < moved["padded batch"] / 2 and saved["sorted"] < saved["padded batch"] / 2
    assert launches["grouped product"] < launches["sorted"] / 4
    assert moved["fused gather"] < moved["grouped product"] and saved["fused gather"] < saved["grouped product"]
    assert (launches["fused activation"], rows["fused activation"]["backward"]["launches"]) == (6, 6)
    assert saved["fused activation"] < saved["fused gather"] / 2
