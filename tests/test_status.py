"""The committed status table is in step with the presets, with its numbers and with its bounds, and a row can be measured again."""

from __future__ import annotations

import copy
import json

import pytest
from conftest import REPOSITORY, needs_tool

from optimized import oracles, status
from reference import cost, presets

RESULTS = json.loads((REPOSITORY / "docs/results/status.json").read_text(encoding="utf-8"))


def test_page_is_printed_from_the_numbers(tmp_path):
    page, numbers = status.write(RESULTS, tmp_path)
    for path in (page, numbers):
        assert path.read_text(encoding="utf-8") == (REPOSITORY / "docs" / path.relative_to(tmp_path)).read_text(encoding="utf-8"), (
            "make status"
        )


def test_table_has_every_preset_and_its_size():
    assert tuple(entry["preset"] for entry in RESULTS["rows"]) == presets.names()
    for entry in RESULTS["rows"]:
        counted = cost.sum_parameters(cost.model_parameters(presets.model(entry["preset"])))
        assert entry["parameters"] == counted._asdict(), f"{entry['preset']}: make status"
        assert (entry["transformers"] is not None) == (entry["preset"] in oracles.ORACLES)


def test_table_is_within_the_bounds():
    assert RESULTS["bounds"] == status.BOUNDS
    assert status.broken(RESULTS) == []


@pytest.mark.parametrize("error", [1e-3, float("nan"), float("inf")])
def test_broken_parity_is_named(error):
    results = copy.deepcopy(RESULTS)
    entry = next(entry for entry in results["rows"] if entry["preset"] == "mixtral-8x7b")
    entry["autograd"]["gradient"]["max"] = error
    assert status.broken(results) == [f"mixtral-8x7b: layer and autograd differ in gradient by {error:.1e}, bound 1e-11"]


def test_row_is_measured_again():
    needs_tool("transformers")
    name = "deepseek-v3"
    measured = status.row(name)
    assert status.broken({"bounds": status.BOUNDS, "rows": [measured]}) == []
    committed = next(entry for entry in RESULTS["rows"] if entry["preset"] == name)
    assert measured.keys() == committed.keys() and measured["parameters"] == committed["parameters"]
