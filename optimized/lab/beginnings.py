"""The task of the beginnings: four planes over a square, learned by the three losses of 1991 and by the EM of 1994."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from reference.beginnings import (
    NOISE,
    OBJECTIVES,
    Hierarchy,
    Task,
    answers,
    descend,
    fit_by_em,
    hierarchy,
    local_experts,
    piecewise_task,
    predict,
)
from reference.scores import softmax_forward
from reference.text import load_corpus

from .common import claim, framed, spread, told

EXPERTS, RATE, SURE = 4, 0.3, 0.9


class Size(NamedTuple):
    """Points of the square, steps of descent, rounds of EM, and from how many starts EM sets out."""

    tokens: int
    steps: int
    rounds: int
    starts: int


FULL, SMOKE = Size(200, 1000, 30, 6), Size(40, 20, 3, 2)


class Solved(NamedTuple):
    """share [T, E]: the trust in each expert; out [T, E]: what each says; blend [T]: what they say together."""

    share_TE: np.ndarray
    out_TE: np.ndarray
    blend_T: np.ndarray


def by_descent(task: Task, objective: str, seed: int, size: Size) -> Solved:
    """One of the losses of 1991 by plain gradient descent; every loss starts from the same experts."""
    start = local_experts(EXPERTS, 3, np.random.default_rng([seed, 1]))
    model, _ = descend(start, task, objective, steps=size.steps, rate=RATE)
    share_TE, out_TE = answers(model, task.x_TD)
    return Solved(share_TE, out_TE, (share_TE * out_TE).sum(1))


def leaves(model: Hierarchy, task: Task) -> Solved:
    """A hierarchy seen as experts under one gate: a leaf's trust is the product of both levels."""
    x_TD = task.x_TD
    top_TG = softmax_forward(x_TD @ model.top.T)[0]
    inner = [softmax_forward(x_TD @ gate.T)[0] for gate in model.inner]
    share_TE = np.concatenate([top_TG[:, [g]] * share for g, share in enumerate(inner)], axis=1)
    return Solved(share_TE, x_TD @ model.expert.reshape(EXPERTS, -1).T, predict(model, x_TD))


def facts(solved: Solved, task: Task) -> dict[str, float]:
    """Mean squared errors of the blend and of the most trusted expert alone, and the share of points that have an expert trusted by 0.9."""
    alone_T = np.take_along_axis(solved.out_TE, solved.share_TE.argmax(1)[:, None], 1)[:, 0]
    errors = {name: float(np.square(said_T - task.target_T).mean()) for name, said_T in (("blend", solved.blend_T), ("alone", alone_T))}
    return {**errors, "sure": float((solved.share_TE.max(1) > SURE).mean())}


def one_run(seed: int, size: Size) -> dict[str, Any]:
    """Every way on one draw of the task: the facts, who is trusted at each point, and the log-likelihoods of EM from each start."""
    task = piecewise_task(np.random.default_rng(seed), size.tokens)
    fits = [fit_by_em(hierarchy(2, 2, task, np.random.default_rng([seed, 2, start])), task, size.rounds) for start in range(size.starts)]
    best = max(fits, key=lambda fit: fit[1][-1])
    solved = {name: by_descent(task, name, seed, size) for name in OBJECTIVES} | {"em": leaves(best[0], task)}
    return {
        "seed": seed,
        "points": task.x_TD[:, :2],
        "ways": {
            name: {**facts(one, task), "trusted": one.share_TE.argmax(1), "decided": one.share_TE.max(1) > SURE}
            for name, one in solved.items()
        },
        "em": {
            "likelihood": [curve for _, curve in fits],
            "blend": [facts(leaves(model, task), task)["blend"] for model, _ in fits],
        },
    }


def judged(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the two papers say would happen."""
    facts_of = {way: {key: [run["ways"][way][key] for run in runs] for key in ("blend", "alone")} for way in runs[0]["ways"]}
    alone, blend = ({way: one[key] for way, one in facts_of.items()} for key in ("alone", "blend"))
    errors = np.concatenate([run["em"]["blend"] for run in runs])
    limit = 4 * NOISE**2
    solved = int((errors < limit).sum())
    return [
        claim(
            "experts that compete can stand alone, experts that cooperate cannot",
            "Jacobs et al. 1991",
            all(a < b for a, b in zip(alone["competitive"], alone["cooperative"], strict=True)),
            f"error of the trusted expert alone: competitive {told(spread(alone['competitive']))}, "
            f"cooperative {told(spread(alone['cooperative']))}",
            "in every seed a smaller error of the trusted expert alone",
        ),
        claim(
            "the blend is best where the blend is trained",
            "the cooperative loss itself",
            all(a < b for a, b in zip(blend["cooperative"], blend["competitive"], strict=True)),
            f"error of the blend: cooperative {told(spread(blend['cooperative']))}, competitive {told(spread(blend['competitive']))}",
            "in every seed a smaller error of the blend",
        ),
        claim(
            "EM never descends",
            "Jordan and Jacobs 1994",
            all(np.diff(curve).min() >= -1e-8 * np.abs(curve).max() for run in runs for curve in run["em"]["likelihood"]),
            f"{len(errors)} starts, {len(runs[0]['em']['likelihood'][0]) - 1} rounds each",
            "in every start no round lowers the likelihood by more than rounding",
        ),
        claim(
            "EM finds the four planes from any start",
            "nobody; a tempting reading",
            solved == len(errors),
            f"{solved} of {len(errors)} starts end with an error below {limit:.2f}, the worst with {errors.max():.2f}",
            "every start ends with an error below the bound",
        ),
    ]


def run(seeds: Sequence[int], smoke: bool) -> dict[str, Any]:
    """A draw of the task for each seed. EM's entry is the start of highest likelihood, which is known without looking at the answer."""
    size = SMOKE if smoke else FULL

    def measure() -> dict[str, Any]:
        runs = [one_run(seed, size) for seed in seeds]
        summary = {
            way: {key: spread([one["ways"][way][key] for one in runs]) for key in ("blend", "alone", "sure")} for way in runs[0]["ways"]
        }
        rows = [[way, *(f"{one[key]['mean']:.3f}" for key in one)] for way, one in summary.items()]
        return {
            "runs": runs,
            "summary": summary,
            "claims": judged(runs),
            "table": {"columns": ["trained by", "blend", "trusted expert alone", "decided"], "rows": rows},
            "size": size._asdict(),
        }

    return framed("beginnings", seeds, smoke, load_corpus(), measure)
