"""The ladder: every rung keeps its contract (`test_contracts.py` tries it on every case), refuses what it has not, and is counted right."""

from __future__ import annotations

import dataclasses
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
        assert (counter.launches, counter.bytes) == (1, 2 * 4 * 32)
        b @ a
        assert (counter.launches, counter.bytes) == (2, 2 * 4 * 32 + 4 * (8 + 32 + 16))


@pytest.mark.skipif(not INTERPRETED, reason="counts the committed result again, which was made in the interpreter")
@pytest.mark.parametrize(
    "rung", [pytest.param(rung, id=rung.name, marks=[pytest.mark.slow] if rung.backend == "triton" else []) for rung in COUNTED]
)
def test_the_committed_counts_are_these(rung, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # filling fresh memory with NaN would be counted
    committed = json.loads(count.RESULTS.read_text(encoding="utf-8"))
    assert committed["shape"] == {letter: getattr(count.CASE, letter) for letter in "TDFEK"}
    assert count.count(rung, DEVICE) == next(row for row in committed["rungs"] if row["name"] == rung.name)


def test_each_rung_does_without_something() -> None:
    rows = {row["name"]: row for row in json.loads(count.RESULTS.read_text(encoding="utf-8"))["rungs"]}
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
