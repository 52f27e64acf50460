"""The notebooks: in step with their sources, run as printed, and exercises whose checkers accept the solution and nothing else."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY

pytest.importorskip("nbclient")

from notebooks import build, checks
from reference.proof.museum_capacity import second_choices_from_zero
from reference.proof.museum_gates import unstable_top_k

SOURCES = {source.name[:2]: source for source in build.sources()}
BUILT = [(number, variant) for number in SOURCES for variant in build.VARIANTS]
EXERCISE_OF = {"01": ("keep", "keep"), "02": ("gates", "gates_of_v3"), "03": ("router_backward", "router_backward")}
"""Notebook → the exercise and the name of the learner's function."""


def of_source(number: str, tag: str) -> Callable:
    """The function in a source's cell of this tag, defined as the notebook would define it."""
    cells = build.parse(SOURCES[number].read_text(encoding="utf-8"))
    imports = next(cell.text for cell in cells if cell.tag == "")
    names: dict = {}
    exec("\n".join(line for line in imports.splitlines() if line.startswith(("import ", "from "))), names)
    exec(next(cell.text for cell in cells if cell.tag == tag), names)
    return names[EXERCISE_OF[number][1]]


def token_after_token(expert_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    keep_TK, accepted = np.zeros(expert_TK.shape, bool), [0] * experts
    for token, slot in np.ndindex(expert_TK.shape):
        keep_TK[token, slot] = accepted[expert_TK[token, slot]] < capacity
        accepted[expert_TK[token, slot]] += 1
    return keep_TK


def one_too_many(expert_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    keep_TK, accepted = np.zeros(expert_TK.shape, bool), [0] * experts
    for slot, token in np.ndindex(expert_TK.T.shape):
        keep_TK[token, slot] = accepted[expert_TK[token, slot]] <= capacity
        accepted[expert_TK[token, slot]] += 1
    return keep_TK


def each_choice_by_itself(expert_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    return second_choices_from_zero(expert_TK, capacity)


def weighed_by_biased_scores(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    biased_TE = scores_TE + bias_E
    expert_TK = np.argsort(-biased_TE, axis=1, kind="stable")[:, :count]
    chosen_TK = np.take_along_axis(biased_TE, expert_TK, axis=1)
    return expert_TK, scale * chosen_TK / chosen_TK.sum(1, keepdims=True)


def scaled_before_the_sum(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    expert_TK = np.argsort(-(scores_TE + bias_E), axis=1, kind="stable")[:, :count]
    chosen_TK = scale * np.take_along_axis(scores_TE, expert_TK, axis=1)
    return expert_TK, chosen_TK / chosen_TK.sum(1, keepdims=True)


def reversed_sort(scores_TE: np.ndarray, bias_E: np.ndarray, count: int, scale: float) -> tuple[np.ndarray, np.ndarray]:
    expert_TK = unstable_top_k(scores_TE + bias_E, count)
    chosen_TK = np.take_along_axis(scores_TE, expert_TK, axis=1)
    return expert_TK, scale * chosen_TK / chosen_TK.sum(1, keepdims=True)


def softmax_of(logits_TE: np.ndarray) -> np.ndarray:
    exp_TE = np.exp(logits_TE)
    return exp_TE / exp_TE.sum(1, keepdims=True)


def dscores_of(dgate_TK: np.ndarray, scores_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    chosen_TK = np.take_along_axis(scores_TE, expert_TK, axis=1)
    total = chosen_TK.sum(1, keepdims=True)
    dscores_TE = np.zeros_like(scores_TE)
    np.put_along_axis(dscores_TE, expert_TK, (dgate_TK - (dgate_TK * chosen_TK / total).sum(1, keepdims=True)) / total, axis=1)
    return dscores_TE


def sum_is_a_constant(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    scores_TE = softmax_of(logits_TE)
    total = np.take_along_axis(scores_TE, expert_TK, axis=1).sum(1, keepdims=True)
    dscores_TE = np.zeros_like(scores_TE)
    np.put_along_axis(dscores_TE, expert_TK, dgate_TK / total, axis=1)
    return scores_TE * (dscores_TE - (dscores_TE * scores_TE).sum(1, keepdims=True))


def stops_at_the_scores(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    return dscores_of(dgate_TK, softmax_of(logits_TE), expert_TK)


def diagonal_only(dgate_TK: np.ndarray, logits_TE: np.ndarray, expert_TK: np.ndarray) -> np.ndarray:
    scores_TE = softmax_of(logits_TE)
    return dscores_of(dgate_TK, scores_TE, expert_TK) * scores_TE * (1 - scores_TE)


WRONG = [
    ("keep", token_after_token, "first choices come first"),
    ("keep", one_too_many, "one assignment too many"),
    ("keep", each_choice_by_itself, "starts again at 0"),
    ("gates", weighed_by_biased_scores, "made of the biased scores"),
    ("gates", scaled_before_the_sum, "scale has no effect"),
    ("gates", reversed_sort, "Ties go to the highest id"),
    ("router_backward", sum_is_a_constant, "taken for a constant"),
    ("router_backward", stops_at_the_scores, "back through the softmax"),
    ("router_backward", diagonal_only, "only the diagonal"),
]


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


def test_every_notebook_has_one_exercise_and_every_exercise_a_notebook() -> None:
    assert list(EXERCISE_OF) == list(SOURCES)
    assert {name for name, _ in EXERCISE_OF.values()} == set(checks.EXERCISES)


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
    assert all(sum(name == exercise for name, _, _ in WRONG) >= 3 for exercise in checks.EXERCISES)


@pytest.mark.parametrize("name", checks.EXERCISES)
def test_every_known_mistake_is_wrong_and_recognised(name: str) -> None:
    for mistake in checks.EXERCISES[name].mistakes:
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
        (lambda expert_TK, experts, capacity: np.ones(expert_TK.shape, bool), "row 3"),
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
    with pytest.raises(ValueError, match=r"no exercise 'kepe'; known: keep"):
        checks.examine("kepe", print)
    with pytest.raises(ValueError, match="takes the function itself"):
        checks.examine("keep", np.zeros(3))


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
    altered.cells.pop()
    assert build.differences(committed, altered)


def test_first_cell_needs_a_clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first_cell = (REPOSITORY / "notebooks" / "first_cell.py").read_text(encoding="utf-8")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no clone of Moebius in, above or directly below"):
        exec(first_cell, {})
    (tmp_path / "moebius").symlink_to(REPOSITORY)
    exec(first_cell, {})
    assert sys.path[0] == str(tmp_path / "moebius")
