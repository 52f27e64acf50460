"""The notebooks: in step with their sources, run as printed, and exercises whose checkers accept the solution and nothing else."""

from __future__ import annotations

import asyncio
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

pytest.importorskip("nbclient")

from notebook_answers import (
    EXERCISE_OF,
    SOURCES,
    WRONG,
    forgets_idle_experts,
    of_source,
    raises_the_busy,
    token_after_token,
    without_the_zero,
)

from notebooks import build, checks, exercises, plots, prints

BUILT = [(number, variant) for number in SOURCES for variant in build.VARIANTS]


@pytest.mark.parametrize("number, variant", BUILT)
def test_notebook_is_in_step_with_its_source(number: str, variant: str) -> None:
    committed, composed = build.read(build.target(SOURCES[number], variant)), build.compose(SOURCES[number], variant)
    assert build.code(committed) == build.code(composed), "run `make notebooks`"
    assert build.prose(committed, lines=False) == build.prose(composed, lines=False), "run `make notebooks`"
    assert [cell.id for cell in committed.cells] == [cell.id for cell in composed.cells]


@pytest.mark.parametrize("number, variant", BUILT)
def test_links_lead_to_files(number: str, variant: str) -> None:
    path = build.target(SOURCES[number], variant)
    links = [target for text in build.prose(build.read(path)) for target in re.findall(r"\]\(([^)#]+)", text)]
    assert links
    missing = [target for target in links if not (path.parent / target).is_file()]
    assert not missing


@pytest.mark.parametrize("number, variant", BUILT)
def test_committed_notebook_was_executed_without_error(number: str, variant: str) -> None:
    cells = [cell for cell in build.read(build.target(SOURCES[number], variant)).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]
    verdicts = [text[0] for text in build.text_outputs(build.read(build.target(SOURCES[number], variant))) if text[:1] in ("✓", "✗")]
    assert verdicts == ["✗" if variant == "exercise" else "✓"]


def execute_again(built: list[tuple[str, str]]) -> list[str]:
    """What a second execution of these notebooks changes."""

    async def all_of_them() -> list[str]:
        at_once = asyncio.Semaphore(build.AT_ONCE)
        found = await asyncio.gather(*(build.build(SOURCES[number], variant, check=True, at_once=at_once) for number, variant in built))
        return [line for lines in found for line in lines]

    return asyncio.run(all_of_them())


def test_first_notebooks_print_what_is_committed() -> None:
    moved_links = re.compile(r"\.ipynb: prose ")  # `test_notebook_is_in_step_with_its_source` reads the rest of the prose
    assert not [line for line in execute_again([("01", "exercise"), ("02", "exercise")]) if not moved_links.search(line)]


@pytest.mark.slow
def test_every_notebook_prints_what_is_committed() -> None:
    assert not execute_again(BUILT)


OLDER_PROCESSOR = {"OPENBLAS_CORETYPE": "Prescott", "NPY_DISABLE_CPU_FEATURES": "X86_V3 X86_V4", "ATEN_CPU_CAPABILITY": "default"}
"""NumPy's BLAS, NumPy's own loops and PyTorch's as on a processor without AVX: other orders of summation, other last bits."""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the variables name instruction sets of x86-64")
def test_notebooks_print_the_same_without_vector_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in OLDER_PROCESSOR.items():
        monkeypatch.setitem(build.KERNEL_ENVIRONMENT, name, value)
    assert not execute_again([(number, "exercise") for number in SOURCES])


def test_every_notebook_has_one_exercise_and_every_exercise_a_notebook() -> None:
    assert list(EXERCISE_OF) == list(SOURCES)
    assert {name for name, _ in EXERCISE_OF.values()} == set(exercises.NAMES)


@pytest.mark.parametrize("number", SOURCES)
def test_unfilled_exercise_fails_and_solution_passes(number: str) -> None:
    name = EXERCISE_OF[number][0]
    unfilled = checks.examine(name, of_source(number, "EXERCISE"))
    assert not unfilled.passed and "not written yet" in unfilled.message
    solved = checks.examine(name, of_source(number, "SOLUTION"))
    assert solved.passed, solved.message


@pytest.mark.parametrize("name, answer, hint", WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_plausible_wrong_answer_is_told_what_is_wrong(name: str, answer: Callable, hint: str) -> None:
    finding = checks.examine(name, answer)
    assert not finding.passed
    assert hint in finding.message


def test_every_exercise_rejects_three_wrong_answers() -> None:
    assert all(sum(name == exercise for name, _, _ in WRONG) >= 3 for exercise in exercises.NAMES)


@pytest.mark.parametrize("name", exercises.NAMES)
def test_every_known_mistake_is_wrong_and_recognised(name: str) -> None:
    for mistake in exercises.get(name).mistakes:
        finding = checks.examine(name, mistake.function)
        assert not finding.passed and mistake.hint in finding.message


def changes_its_argument(expert_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    expert_TK[:] = 0
    return expert_TK == 0


@pytest.mark.parametrize(
    "answer, message",
    [
        (lambda *given: None, "is there a `return`"),
        (lambda *given: 1 / 0, "ZeroDivisionError"),
        (lambda expert_TK, experts, capacity: expert_TK, "int64 instead of bool"),
        (lambda expert_TK, experts, capacity: np.ones(3, bool), "shape (3,) instead of"),
        (lambda expert_TK, experts, capacity: (expert_TK, expert_TK), "returns 2 array(s)"),
        (lambda expert_TK, experts, capacity: np.ones(expert_TK.shape, bool), "  token 3: yours"),
        (changes_its_argument, "changes one of its arguments"),
    ],
)
def test_checker_explains_what_is_no_usual_mistake(answer: Callable, message: str) -> None:
    finding = checks.examine("keep", answer)
    assert not finding.passed and message in finding.message


def test_answer_may_sum_in_its_own_order() -> None:
    solution = of_source("02", "SOLUTION")
    reordered = checks.examine("gates", lambda *given: (solution(*given)[0], solution(*given)[1] * (1 + 1e-12)))
    assert reordered.passed


def test_checker_refuses_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"no exercise 'kepe'; known: balance"):
        checks.examine("kepe", print)
    with pytest.raises(ValueError, match="takes the function itself"):
        checks.examine("keep", np.zeros(3))


@pytest.mark.parametrize("number, variant", BUILT)
def test_pictures_stand_on_the_page_itself(number: str, variant: str) -> None:
    cells = [cell for cell in build.read(build.target(SOURCES[number], variant)).cells if cell.cell_type == "code"]
    pictures = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert not [picture.metadata for picture in pictures if "needs_background" in picture.metadata]


def test_source_with_an_unknown_tag_is_refused() -> None:
    with pytest.raises(ValueError, match=r"line 2: the tag 'SOLVED'"):
        build.parse("# header\n# %% SOLVED\n1")


def test_link_to_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"reference\.gating\.top_kk"):
        build.link("reference.gating.top_kk", "../")


def test_differences_see_code_prose_and_printed_text() -> None:
    committed = build.read(build.target(SOURCES["01"], "exercise"))
    assert build.differences(committed, committed) == []
    for number, change in [(0, "source"), (2, "source"), (2, "outputs")]:
        altered = build.read(build.target(SOURCES["01"], "exercise"))
        altered.cells[number][change] = altered.cells[number][change][:-1]
        assert len(build.differences(committed, altered)) == 1
    altered = build.read(build.target(SOURCES["01"], "exercise"))
    table = altered.cells[6].outputs[0]
    table["text"] = table["text"].replace("1.6", "1.7", 1)
    assert len(build.differences(committed, altered)) == 1, "one digit is a difference, whatever computed it"
    altered.cells.pop()
    assert build.differences(committed, altered)


@pytest.mark.parametrize("name, answer, _", WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_wrong_answer_is_drawn_beside_the_reference(name: str, answer: Callable, _: str) -> None:
    difference = checks.examine(name, answer).difference
    assert (difference is None) == (answer in (without_the_zero, forgets_idle_experts))  # the shape is wrong
    if difference is not None:
        found, truth, wrong, _ = difference.pair
        assert found.shape == truth.shape == wrong.shape and wrong.any() and len(difference.axes) == truth.ndim


def test_check_prints_and_draws(capsys: pytest.CaptureFixture[str]) -> None:
    plots.plt.close("all")
    checks.check("keep", token_after_token)
    assert capsys.readouterr().out.startswith("✗ keep: with")
    assert repr(plots.plt.gcf()) == "picture: your keep · reference · where they differ"
    plots.plt.close("all")
    checks.check("bias_step", raises_the_busy)
    assert repr(plots.plt.gcf()) == "picture: your bias beside the reference"
    plots.plt.close("all")
    checks.check("keep", of_source("01", "SOLUTION"))
    assert not plots.plt.get_fignums()


def test_first_cell_gets_what_the_header_asks_for() -> None:
    plain = build.first_cell("# %%\n1\n")
    assert '("numpy", "matplotlib")' in plain and "environ" not in plain
    more = build.first_cell("# needs: torch, rich\n# environment: TRITON_INTERPRET=1\n# %%\n1\n")
    assert '("numpy", "matplotlib", "torch", "rich")' in more
    assert more.endswith('os.environ["TRITON_INTERPRET"] = "1"') and "import os\n" in more


@pytest.mark.parametrize("number", SOURCES)
def test_notebook_asks_for_predictions_and_is_no_longer_than_it_may_be(number: str) -> None:
    notebook = build.read(build.target(SOURCES[number], "exercise"))
    assert len(notebook.cells) <= build.MOST_CELLS
    printing = sum(bool(output) for output in build.text_outputs(notebook))
    predictions = "".join(build.prose(notebook)).count("**Predict.**")
    assert predictions >= 0.6 * printing


WIDEST = 95
"""Characters of code that a page of the site shows between its two lists; what is behind them is cut off."""


@pytest.mark.parametrize("number", SOURCES)
def test_no_line_of_code_is_cut_off(number: str) -> None:
    lines = [
        line for variant in build.VARIANTS for code in build.code(build.compose(SOURCES[number], variant)) for line in code.splitlines()
    ]
    assert [line for line in lines if len(line) > WIDEST] == []


@pytest.mark.parametrize("number", SOURCES)
def test_no_printed_line_is_wider_than_the_code(number: str) -> None:
    printed = build.text_outputs(build.read(build.target(SOURCES[number], "exercise")))
    assert [line for text in printed for line in text.splitlines() if len(line) > WIDEST] == []


def test_numbers_stand_below_their_names_and_zero_has_no_sign(capsys: pytest.CaptureFixture[str]) -> None:
    prints.numbers({"a": [1.26, -0.01], "long": [-3, 10]}, ["left", "right"])
    assert capsys.readouterr().out == "        left   right\n   a     1.3     0.0\nlong    -3.0    10.0\n"


def test_sentence_is_short_lines(capsys: pytest.CaptureFixture[str]) -> None:
    prints.sentence("seen in: here; there, " + 8 * "and in places of many names, ")
    first, second, *rest = capsys.readouterr().out.splitlines()
    assert first == "seen in: here" and second.startswith("  there, and in places") and len(rest) > 3
    assert all(len(line) <= prints.WIDTH and line.startswith("  ") for line in rest)


@pytest.mark.parametrize(
    "title, width, lines",
    [
        ("one line", 20, ["one line"]),
        ("four words on two lines", 22, ["four words", "on two lines"]),
        ("unbreakable", 4, ["unbr", "eaka", "ble"]),
    ],
)
def test_title_leaves_no_word_alone(title: str, width: int, lines: list[str]) -> None:
    assert plots.balanced(title, width).split("\n") == lines


def test_first_cell_needs_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_cell = (REPOSITORY / "notebooks" / "first_cell.py").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no clone of Moebius in, above or directly below"):
        exec(first_cell, {})
    (tmp_path / "moebius").symlink_to(REPOSITORY)
    exec(first_cell, {})
    assert sys.path[0] == str(tmp_path / "moebius")
