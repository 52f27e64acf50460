"""Notebook 06: one step of the bias, from the loads that several ranks counted."""

from __future__ import annotations

import numpy as np

from reference.balancing import proportional_bias_update, sign_bias_update
from reference.proof.equal import round_to
from reference.proof.museum_gates import bfloat16_bias

from . import Case, Exercise, Mistake


def _step(bias_E: np.ndarray, load_RE: np.ndarray, rate: float) -> np.ndarray:
    return sign_bias_update(bias_E, load_RE.sum(0), rate)


def _step_of_each_rank(bias_E: np.ndarray, load_RE: np.ndarray, rate: float) -> np.ndarray:
    return bias_E + sum(sign_bias_update(np.zeros_like(bias_E), load_E, rate) for load_E in load_RE)


def _last_rank_only(bias_E: np.ndarray, load_RE: np.ndarray, rate: float) -> np.ndarray:
    return sign_bias_update(bias_E, load_RE[-1], rate)


def _two_sided(bias_E: np.ndarray, load_RE: np.ndarray, rate: float) -> np.ndarray:
    load_E = load_RE.sum(0)
    return bias_E + rate * np.where(load_E < load_E.mean(), 1.0, -1.0)


def _cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(6)
    return (
        Case("one rank, one expert exactly at the mean", (np.array([0.5, 0.0, -0.5]), np.array([[9, 5, 1]]), 0.25)),
        Case("two ranks that disagree: the large one decides", (np.zeros(3), np.array([[10, 0, 2], [1, 4, 3]]), 0.5)),
        Case("an even load", (np.ones(4), np.full((2, 4), 7), 0.25)),
        Case("a bias near 1 and a small rate", (np.array([1.0, -1.0, 1.0, 1.0]), rng.integers(0, 9, (3, 4)), 2.0**-10)),
    )


EXERCISE = Exercise(
    {"bias": ("expert",)}, _step, _cases(),
    (
        Mistake(lambda bias_E, load_RE, rate: 2 * bias_E - _step(bias_E, load_RE, rate),
                "The sign is turned round: busy experts rise, and the load runs away. Who got too little must rise."),
        Mistake(_step_of_each_rank, "Each rank takes its own sign, and the signs are added: a small rank outvotes a large one. "
                "Add the loads first, then take one sign."),
        Mistake(_last_rank_only, "Only the last rank's load was used."),
        Mistake(lambda bias_E, load_RE, rate: bias_E + rate * np.sign(load_RE.mean() - load_RE.sum(0)),
                "The sum of all ranks is compared with the mean of a single rank, so nearly everybody seems too busy."),
        Mistake(lambda bias_E, load_RE, rate: proportional_bias_update(bias_E, load_RE.sum(0), rate),
                "The step is in proportion to the violation. DeepSeek-V3's rule takes only its sign."),
        Mistake(_two_sided, "An expert exactly at the mean must stay where it is: the sign of 0 is 0."),
        Mistake(lambda bias_E, load_RE, rate: np.clip(_step(bias_E, load_RE, rate), -1, 1),
                "The bias is cut off at 1. It may have to grow as large as the differences between the scores."),
        Mistake(lambda bias_E, load_RE, rate: round_to(bfloat16_bias(bias_E, load_RE.sum(0), rate), "bfloat16"),
                "The bias is kept in bfloat16, and near 1 a small step is rounded away."),
    ),
    chapter="docs/chapters/bias.md#by-hand",
)  # fmt: skip
