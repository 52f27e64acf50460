"""Committed results on the pages: pictures that both schemes can read, tables that say no more than the files."""

from __future__ import annotations

import re

import numpy as np
import pytest
from site_tools import layout, measured, plots, readme, render, tables

from optimized import tracks
from reference import presets
from reference.proof import cases


@pytest.mark.parametrize("name", plots.PLOTS)
def test_plot_takes_its_colours_from_the_page(name: str) -> None:
    drawn = plots.get(name)
    assert drawn.count("<svg") == drawn.count("</svg>") >= 1 and "currentColor" in drawn and "var(--moe-0)" in drawn
    assert not re.search(r"#0102|<style|<metadata|<!--|NaN|\n", drawn)
    ids = re.findall(r' id="([^"]+)"', drawn)
    assert len(ids) == len(set(ids)) and set(re.findall(r"url\(#([^)]+)\)", drawn)) <= set(ids)
    assert re.search(r'role="img" aria-label="[^"]{60,}"', drawn)
    assert drawn == plots.get(name)


def test_numbers_and_spreads() -> None:
    assert layout.digits(-0.004, 2) == "0.00" and layout.digits(-1.5, 1) == "−1.5" and layout.digits(12345.678, 1) == "12,345.7"
    told = [measured.spread([0.1, 0.2, 0.3]), measured.spread([0.5, 0.5]), measured.spread({"mean": -1.0, "low": -2.0, "high": 0.0}, 0)]
    assert told == ["0.20 (0.10\xa0…\xa00.30)", "0.50", "−1 (−2\xa0…\xa00)"]


def test_tables_hold_the_committed_numbers() -> None:
    collapse = measured.result("collapse")["summary"]["nothing"]["max_vio"]
    assert layout.digits(collapse["mean"], 2) in tables.get("collapse")
    said = tables.get("specialization-claims")
    found = measured.result("specialization")["claims"]
    assert said.count("**Held:**") == sum(one["held"] for one in found) and said.count("\n") + 1 == len(found)
    assert "moebius lab bias" in measured.made_by("bias-control")


@pytest.mark.parametrize("line", ["{{ plot nothing }}", "{{= made_by('nothing') }}"])
def test_what_does_not_exist_is_refused(line: str) -> None:
    with pytest.raises(ValueError, match=r"page\.md"):
        render.Page("page.md").render(line)


def test_scrubber_knows_every_checkpoint_of_the_run() -> None:
    data = measured.scrubber_data()
    assert len(measured.scrubber_states(data)) == sum(len(one["layers"]) for run in data["runs"] for one in run["checkpoints"])
    committed = measured.result("specialization")["runs"][1]["checkpoints"][3]["layers"]["1"]
    np.testing.assert_allclose(data["runs"][1]["checkpoints"][3]["layers"][1]["share"], committed["share"], atol=5.1e-4)


def test_readme_shows_the_committed_results() -> None:
    text = readme.README.read_text(encoding="utf-8")
    assert readme.filled(text) == text, "`make readme` writes it again"
    for table in readme.BLOCKS.values():
        assert table() in text and readme.filled(text.replace(table(), "another run's numbers")) == text


def test_the_committed_parity_is_of_every_track_and_input() -> None:
    found = measured.result("parity")
    assert found["broken"] == 0 and found["teeth"]["tried"] > 0 and not found["teeth"]["accepted"]
    assert found["inputs"] == [*(f"case {case.name}" for case in cases.CASES), *(f"preset {name}" for name in presets.names())]
    ran = {row["track"] for row in found["rows"] if row["verdict"] != "cannot"}
    assert ran == {track.name for track in tracks.TRACKS.values()} - {tracks.TRUTH}
    with pytest.raises(ValueError, match="0 places"):
        readme.filled("no such place")
