"""Notebook 08: the kept assignments in expert order."""

from __future__ import annotations

import numpy as np

from reference.dispatch import dispatch_forward

from . import Case, Exercise, Mistake

Order = tuple[np.ndarray, np.ndarray, np.ndarray]


def _order(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> Order:
    _, where = dispatch_forward(np.zeros((len(expert_TK), 1)), expert_TK, keep_TK, experts)
    return where.token_N, where.slot_N, where.bounds_P


def _dropped_too(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> Order:
    return _order(expert_TK, np.ones_like(keep_TK), experts)


def _backwards(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> Order:
    token_N, slot_N, bounds_P = _order(expert_TK, keep_TK, experts)
    order_N = np.concatenate([np.arange(bounds_P[e], bounds_P[e + 1])[::-1] for e in range(experts)])
    return token_N[order_N], slot_N[order_N], bounds_P


def _slot_after_slot(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> Order:
    slot_N, token_N = np.nonzero(keep_TK.T)
    order_N = np.argsort(expert_TK[token_N, slot_N], kind="stable")
    return token_N[order_N], slot_N[order_N], _order(expert_TK, keep_TK, experts)[2]


def _ends_only(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> Order:
    token_N, slot_N, bounds_P = _order(expert_TK, keep_TK, experts)
    return token_N, slot_N, bounds_P[1:]


def _counts(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> Order:
    token_N, slot_N, bounds_P = _order(expert_TK, keep_TK, experts)
    return token_N, slot_N, np.diff(bounds_P)


def _without_idle_experts(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> Order:
    token_N, slot_N, bounds_P = _order(expert_TK, keep_TK, experts)
    return token_N, slot_N, np.concatenate([bounds_P[:1], bounds_P[1:][np.diff(bounds_P) > 0]])


def _divided_by_experts(expert_TK: np.ndarray, keep_TK: np.ndarray, experts: int) -> Order:
    token_N, slot_N, bounds_P = _order(expert_TK, keep_TK, experts)
    assignment_N = token_N * expert_TK.shape[1] + slot_N
    return assignment_N // experts, assignment_N % experts, bounds_P


def _cases() -> tuple[Case, ...]:
    rng = np.random.default_rng(8)
    crowd_TK = np.stack([rng.permutation(5)[:3] for _ in range(9)])
    return (
        Case("9 tokens, 5 experts, K = 3, nothing dropped", (crowd_TK, np.ones(crowd_TK.shape, bool), 5)),
        Case("some assignments dropped", (crowd_TK, rng.random(crowd_TK.shape) < 0.6, 5)),
        Case("first, middle and last experts that nobody chose", (np.array([[1, 3], [3, 1], [1, 3]]), np.ones((3, 2), bool), 6)),
        Case("nothing kept", (crowd_TK, np.zeros(crowd_TK.shape, bool), 5)),
    )


EXERCISE = Exercise(
    {"token": ("row",), "slot": ("row",), "bounds": ("bound",)}, _order, _cases(),
    (
        Mistake(_dropped_too, "Dropped assignments are among the rows. Only what is kept becomes a row."),
        Mistake(_backwards, "Inside an expert the tokens come in reverse. The sort must be stable, and upwards."),
        Mistake(_slot_after_slot, "Inside an expert, first choices come before second ones. Rows keep the order of the tokens: list the "
                "assignments token by token before sorting."),
        Mistake(_ends_only, "The bounds are the ends of the experts alone. There are E + 1 of them: the first one is 0."),
        Mistake(_counts, "These are the numbers of rows. Bounds are their running sum, with a 0 in front."),
        Mistake(_without_idle_experts,
                "An expert that nobody chose has bounds, too: it begins and ends at the same row. Count with minlength=experts."),
        Mistake(_divided_by_experts, "Assignment t · K + k belongs to token t: divide by K, the choices of a token, not by E."),
    ),
    chapter="docs/chapters/dispatch.md#by-hand",
)  # fmt: skip
