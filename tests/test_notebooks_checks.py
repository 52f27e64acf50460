"""What the notebooks' checker says about an answer that is no usual mistake: where it differs, how, and where the idea is explained."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
from conftest import REPOSITORY

pytest.importorskip("nbclient")

from notebook_answers import WRONG, of_source
from notebook_own_answers import OWN

from notebooks import checks, differs, exercises, plots
from notebooks.differs import Pair


@pytest.mark.parametrize("name, answer, words", OWN, ids=lambda value: getattr(value, "__name__", ""))
def test_own_wrong_answer_is_told_how_it_differs(name: str, answer: Callable, words: str) -> None:
    finding = checks.examine(name, answer)
    assert not finding.passed and words in finding.message
    assert finding.message.splitlines()[-1] == f"→ the idea: {exercises.get(name).chapter}"
    assert finding.message.count("→") == 1, "no usual mistake is claimed"


def test_every_exercise_has_two_own_wrong_answers() -> None:
    assert all(sum(name == exercise for name, _, _ in OWN) >= 2 for exercise in exercises.NAMES)


@pytest.mark.parametrize("name", exercises.NAMES)
def test_idea_is_a_section_of_a_chapter(name: str) -> None:
    page, _, anchor = exercises.get(name).chapter.partition("#")
    titles = re.findall(r"^#+ (.+)$", (REPOSITORY / page).read_text(encoding="utf-8"), re.MULTILINE)
    assert anchor in {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name, answer, _", WRONG, ids=lambda value: getattr(value, "__name__", ""))
def test_a_recognised_mistake_is_pointed_to_the_idea_too(name: str, answer: Callable, _: str) -> None:
    *_, hint, idea = checks.examine(name, answer).message.splitlines()
    assert hint.startswith("→ ") and idea == f"→ the idea: {exercises.get(name).chapter}"


RNG = np.random.default_rng(0)
TRUTH_TD, OTHER_TD = RNG.standard_normal((2, 6, 4))
HALVES = np.array([[0.5], [0.5], [0.5], [0.25], [0.25], [0.25]])


def pairs_of(answer: Callable[[np.ndarray], np.ndarray], *truths: np.ndarray) -> list[Pair]:
    """Pairs of an answer and the truth, with the truth itself as argument x_TD."""
    return [Pair(np.asarray(answer(truth)), truth, np.asarray(answer(truth) != truth), {"x_TD": truth, "rate": 3.0}) for truth in truths]


@pytest.mark.parametrize(
    "answer, said",
    [
        (lambda x_TD: -x_TD, "the sign is turned"),
        (lambda x_TD: 2.5 * x_TD, "yours is always 2.5 times the reference's"),
        (lambda x_TD: x_TD / len(x_TD), "yours is the reference's divided by T (6, 5 on the inputs that differ)"),
        (lambda x_TD: x_TD + 0.25, "yours minus the reference's is always 0.25"),
        (lambda x_TD: np.where(np.arange(4) == 2, x_TD + 1, x_TD), "at the wrong places, yours minus the reference's is always 1"),
        (lambda x_TD: x_TD * np.arange(1, len(x_TD) + 1)[:, None], "each row is the reference's times a constant of its own: 1, 2, 3, …"),
        (lambda x_TD: x_TD * np.arange(1, 5), "each column is the reference's times a constant of its own: 1, 2, 3, …"),
        (lambda x_TD: x_TD[::-1], "it is the reference's, from the last to the first"),
        (lambda x_TD: x_TD[:, ::-1], "it is the reference's, every row from right to left"),
        (lambda x_TD: np.concatenate([[[0] * 4], x_TD[:-1]]), "it is the reference's, moved down by one place"),
        (lambda x_TD: np.roll(x_TD, -1, axis=0), "it is the reference's, moved up by one place"),
        (lambda x_TD: np.roll(x_TD, 1, axis=1), "it is the reference's, moved to the right by one place"),
        (lambda x_TD: x_TD[:, [1, 0, 3, 2]], "each row has the right numbers, in another order"),
        (lambda x_TD: x_TD[[1, 0, *range(2, len(x_TD))]], "the rows are right, in another order"),
        (lambda x_TD: np.full_like(x_TD, 0.5), "yours is 0.5 everywhere, whatever the input"),
        (lambda x_TD: np.full_like(x_TD, np.nan), "at the wrong places, yours is always NaN: 0 / 0, 0 · log 0, or never written"),
        (lambda x_TD: np.where(x_TD > 0, x_TD, np.nan), "at the wrong places, yours is always NaN: 0 / 0, 0 · log 0, or never written"),
        (lambda x_TD: np.maximum(x_TD, 0), "at the wrong places, yours is always 0"),
        (lambda x_TD: x_TD + np.abs(x_TD) ** 3 + 1e-3, "at the wrong places, yours is always too large"),
    ],
)
def test_relation_is_read_off_the_numbers(answer: Callable[[np.ndarray], np.ndarray], said: str) -> None:
    assert differs.relation(pairs_of(answer, TRUTH_TD, OTHER_TD[:5])) == said


def test_argument_that_is_missing_or_too_much_is_named_and_nothing_else_is() -> None:
    other_TD = RNG.standard_normal(TRUTH_TD.shape)
    pairs = [Pair(TRUTH_TD - other_TD, TRUTH_TD, np.ones((6, 4), bool), {"bias_TD": other_TD})]
    assert differs.relation(pairs) == "what yours has too little is exactly bias_TD"
    assert differs.relation([pairs[0]._replace(found=TRUTH_TD + other_TD)]) == "what yours has too much is exactly bias_TD"
    assert differs.relation([Pair(TRUTH_TD + other_TD**3, TRUTH_TD, np.ones((6, 4), bool), {"bias_TD": other_TD})]) is None


def test_relation_that_holds_on_one_input_only_is_not_named() -> None:
    once = pairs_of(lambda x_TD: -x_TD, TRUTH_TD) + pairs_of(lambda x_TD: x_TD + RNG.standard_normal(x_TD.shape), OTHER_TD)
    assert differs.relation(once) is None
    assert differs.relation([]) is None


def test_two_places_are_too_few_for_a_constant() -> None:
    truth_E = np.array([1.0, 2.0, 3.0, 4.0])
    two_E, three_E = (np.where(np.arange(4) < count, 2 * truth_E, truth_E) for count in (2, 3))
    assert differs.relation([Pair(two_E, truth_E, two_E != truth_E)]) is None
    assert differs.relation([Pair(three_E, truth_E, three_E != truth_E)]) == "at the wrong places, yours is always 2 times the reference's"


def test_numbers_of_a_vector_that_differ_are_listed() -> None:
    truth_E, found_E = np.array([0.25, 0.5, 0.75, 1.0]), np.array([0.25, 0.5000001, 0.75, -0.0])
    lines = differs.places(("expert",), Pair(found_E, truth_E, found_E != truth_E))
    assert lines == ["  expert 1: yours 0.5000001   reference 0.5", "  expert 3: yours 0.0   reference 1.0"]
    assert differs.where(("expert",), found_E != truth_E) == "2 of 4 differ (experts 1, 3)"


def test_rounding_of_a_right_number_is_not_among_the_places() -> None:
    solution = of_source("09", "SOLUTION")

    def one_row_wrong(rows_ND: np.ndarray, weight_EDF: np.ndarray, bounds_P: np.ndarray) -> np.ndarray:
        out_NF = solution(rows_ND, weight_EDF, bounds_P)
        out_NF[2] += 1
        return out_NF

    assert "out: 16 of 256 differ (row 2; every column)" in checks.examine("grouped_product", one_row_wrong).message


def test_picture_shows_a_small_difference_and_its_sign() -> None:
    plots.plt.close("all")
    wrong = np.zeros(TRUTH_TD.shape, bool)
    wrong[3, 1] = True
    plots.difference("y", ("token", "width"), TRUTH_TD - 1e-3 * wrong, TRUTH_TD, wrong)
    drawn = plots.plt.gcf().axes
    assert [own.get_xlabel() for own in drawn[:3]] == ["width"] * 3 and drawn[0].get_ylabel() == "token"
    shown = np.asarray(drawn[2].images[0].get_array())
    assert np.flatnonzero(shown).tolist() == [3 * 4 + 1] and np.isclose(shown[3, 1], drawn[2].images[0].norm.vmin)
    colours = drawn[2].images[0].to_rgba(shown)
    assert colours[3, 1].tolist() == [*plots.ORANGE, 1] and colours[0, 0, 3] == 0


def test_palest_cell_is_seen_on_black_and_on_white() -> None:
    def luminance(colour: np.ndarray) -> float:
        linear = np.where(colour <= 0.04045, colour / 12.92, ((colour + 0.055) / 1.055) ** 2.4)
        return float(linear @ [0.2126, 0.7152, 0.0722])

    plots.plt.close("all")
    (drawn,) = plots.axes(3, 3, "cells")
    image = plots.cells(drawn, np.array([[0.0, 1e-6, 1.0]]), plots.SHADES, 0, 1)
    nothing, palest, _ = image.to_rgba(image.get_array())[0]
    assert nothing[3] == 0
    for page in (np.array([0.118, 0.129, 0.161]), np.ones(3)):
        mixed = palest[3] * palest[:3] + (1 - palest[3]) * page
        lighter, darker = sorted((luminance(mixed), luminance(page)), reverse=True)
        assert (lighter + 0.05) / (darker + 0.05) > 1.35


def test_rows_too_long_for_a_line_stand_below_one_another() -> None:
    pair = differs.Pair(np.full((2, 10), 1.25), np.full((2, 10), -12.125), np.ones((2, 10), bool))
    lines = [line for place in differs.places(("row", "column"), pair) for line in place.splitlines()]
    assert len(lines) == 4 and max(map(len, lines)) <= differs.WIDEST
    assert lines[1].index("[") == lines[0].index("[")
