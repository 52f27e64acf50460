"""The figures of the site compute in JavaScript what Python computes: every state of `docs/tools/figures.py` under node."""

from __future__ import annotations

import os
import subprocess

from conftest import REPOSITORY, needs_tool
from site_tools import figures


def test_figures_equal_python(tmp_path):
    node = needs_tool("node")
    golden = tmp_path / "golden.json"
    golden.write_text(figures.to_json({name: figures.golden(name) for name in figures.FIGURES}), encoding="utf-8")
    command = [node, "--test", str(REPOSITORY / "tests/docs/figures.test.mjs")]
    done = subprocess.run(command, env=os.environ | {"GOLDEN": str(golden)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"pass {3 * len(figures.FIGURES)}" in done.stdout, done.stdout


def test_figures_are_drawn_before_scripts_run():
    drawn = figures.draw(needs_tool("node"), list(figures.FIGURES))
    for name, html in drawn.items():
        assert 'role="status"' in html and f'id="figure-{name}"' in html
    assert "dropped" in drawn["route"]


def test_a_tolerance_that_fits_one_size_of_outputs_fits_no_other():
    """As the chapter on equality says, with the relative tolerance that the figure opens with."""
    passed = {size: figures.shown("lamp", logSize=size, logAtol=-5, rtol=0.02) for size in (-6, -5, -3, -1)}
    told = {size: [name for name, one in found.items() if one["allclose"]] for size, found in passed.items()}
    assert told[-3] == ["honest"] and "honest" not in told[-1] and "scaled" in told[-5] and "zero" in told[-6]


def test_tolerance_that_is_too_tight_rejects_an_honest_answer():
    """As the chapter on equality says, with the relative tolerance that the figure opens with."""
    data = figures.lamp_data()
    for state in ({"logSize": -3, "logAtol": -6}, {"logSize": 1, "logAtol": -2}):
        found = figures.lamp_case(state | {"rtol": 0.02}, data)["honest"]
        assert found["policy"] and not found["allclose"]
