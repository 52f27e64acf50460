"""Notebook 01: which assignments find a place."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reference.capacity import choice_major, keep_within_capacity, token_major
from reference.proof.museum_capacity import second_choices_from_zero
from reference.tokens import Draws, token_info

from . import Case, Exercise, Mistake


def _kept(queue: Callable, expert_TK: np.ndarray, capacity: int) -> np.ndarray:
    order_N = queue(np.zeros(expert_TK.shape), Draws(None))
    return keep_within_capacity(expert_TK, np.ones(expert_TK.shape, bool), np.array([capacity]), order_N, token_info(len(expert_TK)))


def _whole_tokens(expert_TK: np.ndarray, experts: int, capacity: int) -> np.ndarray:
    keep_TK = _kept(choice_major, expert_TK, capacity)
    return keep_TK & keep_TK.all(1, keepdims=True)


def _cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(1)
    crowd_TK = np.stack([rng.permutation(5)[:3] for _ in range(12)])
    return (
        Case("an expert that is wanted twice first and twice second, capacity 3", (np.array([[1, 0], [0, 1], [0, 2], [2, 0]]), 3, 3)),
        Case("an expert that is exactly full", (np.array([[0, 1], [0, 2], [1, 0]]), 3, 3)),
        Case("12 tokens, 5 experts, K = 3, capacity 6", (crowd_TK, 5, 6)),
        Case("one slot for each expert", (crowd_TK, 5, 1)),
        Case("no token", (np.zeros((0, 2), np.int64), 4, 2)),
    )


EXERCISE = Exercise(
    {"keep": ("token", "choice")}, lambda expert_TK, experts, capacity: _kept(choice_major, expert_TK, capacity), _cases(),
    (
        Mistake(lambda expert_TK, experts, capacity: _kept(token_major, expert_TK, capacity),
                "This serves token after token. All first choices come first: the loop over slots is the outer one."),
        Mistake(lambda expert_TK, experts, capacity: _kept(choice_major, expert_TK, capacity + 1),
                "Each expert accepts one assignment too many: capacity C means that C were accepted before the first refusal."),
        Mistake(lambda expert_TK, experts, capacity: _kept(choice_major, expert_TK, max(capacity - 1, 0)),
                "Each expert accepts one assignment too few: its last slot stays free."),
        Mistake(lambda expert_TK, experts, capacity: second_choices_from_zero(expert_TK, capacity),
                "The count starts again at 0 for the second choices. An expert has C slots for all of its assignments together."),
        Mistake(_whole_tokens,
                "A token that is refused once loses its other choices, too. What is kept or dropped is an assignment, not a token."),
    ),
    chapter="docs/chapters/capacity.md#the-order-of-the-queue",
)  # fmt: skip
