"""Notebook 05: the place of every assignment in its expert's queue."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from reference.capacity import choice_major, position_in_expert, token_major
from reference.proof.museum_capacity import reference_positions
from reference.tokens import Draws

from . import Case, Exercise, Mistake


def _positions(expert_TK: np.ndarray, real_T: np.ndarray, queue: Callable = choice_major) -> np.ndarray:
    wanted_TK = np.repeat(real_T[:, None], expert_TK.shape[1], axis=1)
    order_N = queue(np.zeros(expert_TK.shape), Draws(None))
    return position_in_expert(expert_TK, wanted_TK, np.zeros(len(expert_TK), np.int64), order_N)


def _padding_queues(expert_TK: np.ndarray, real_T: np.ndarray) -> np.ndarray:
    return _positions(expert_TK, np.ones_like(real_T)) * real_T[:, None]


def _from_zero_in_each_slot(expert_TK: np.ndarray, real_T: np.ndarray) -> np.ndarray:
    return np.concatenate([_positions(column[:, None], real_T) for column in expert_TK.T], axis=1)


def _counting_oneself(expert_TK: np.ndarray, real_T: np.ndarray) -> np.ndarray:
    return (_positions(expert_TK, real_T) + 1) * real_T[:, None]


def _over_the_experts(expert_TK: np.ndarray, real_T: np.ndarray) -> np.ndarray:
    queue_N, real_N = expert_TK.T.ravel(), np.tile(real_T, expert_TK.shape[1])
    own_NE = np.eye(expert_TK.max(initial=0) + 1, dtype=np.int64)[queue_N] * real_N[:, None]
    return ((np.cumsum(own_NE, axis=1) * own_NE).sum(1) - real_N).reshape(expert_TK.shape[::-1]).T


def _cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(5)
    crowd_TK = np.stack([rng.permutation(4)[:2] for _ in range(10)])
    everyone = np.ones(10, bool)
    return (
        Case("10 tokens, 4 experts, K = 2, no padding", (crowd_TK, everyone)),
        Case("padding in front and in the middle", (crowd_TK, np.arange(10) % 4 != 0)),
        Case("one expert for all", (np.full((6, 1), 3), np.ones(6, bool))),
        Case("nothing but padding", (crowd_TK, ~everyone)),
    )


EXERCISE = Exercise(
    {"position": ("token", "choice")}, _positions, _cases(),
    (
        Mistake(_padding_queues, "Padding stands in the queue. It was masked afterwards, but the words behind it have already moved back."),
        Mistake(lambda expert_TK, real_T: reference_positions(expert_TK),
                "Padding stands in the queue like any word. Take it out before counting."),
        Mistake(_from_zero_in_each_slot, "The second choices are numbered from 0 again. They stand behind all first choices."),
        Mistake(lambda expert_TK, real_T: _positions(expert_TK, real_T, token_major),
                "This queues token after token. All first choices stand before all second ones: which array must be flattened?"),
        Mistake(_counting_oneself, "Each position is one too large: a cumulative sum counts the assignment itself, too."),
        Mistake(_over_the_experts, "The cumulative sum runs along the experts. It must run along the queue: everybody is first here."),
    ),
    chapter="docs/chapters/capacity.md#places-and-who-keeps-one",
)  # fmt: skip
