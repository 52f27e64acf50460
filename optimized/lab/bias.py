"""The bias as a controller: steps too small, right and too large, and data that change half way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from reference.autograd.training import heldout_bits
from reference.config import BalanceConfig, GatingConfig, ScoresConfig
from reference.text import Corpus, load_corpus

from .common import Weights, balance_of, claim, framed, fresh, lab_model, lab_training, spread, steps_of, told

RATES = (0.0, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
BEFORE: Weights = (("arithmetic", 0.8), ("prose", 0.2))
AFTER: Weights = (("code", 1.0),)
SCORES = ScoresConfig("sigmoid")
WINDOW = 20
"""Steps over which a row averages: a single batch is too small to tell imbalance from luck."""


class Size(NamedTuple):
    """Steps, the data changing after half of them, and how many held-out windows of each domain."""

    steps: int
    heldout: int


FULL, SMOKE = Size(600, 12), Size(8, 1)


def settings(rate: float) -> tuple[GatingConfig, BalanceConfig]:
    """DeepSeek-V3's gates over the two best of all experts, with the sign rule; rate 0 is the control without it."""
    gating = GatingConfig(top_k=2, correction_bias=True, normalize="sum", eps=1e-20)
    return gating, BalanceConfig(bias_rule="sign", bias_rate=rate)


def one_run(rate: float, seed: int, size: Size, corpus: Corpus) -> dict[str, Any]:
    """A training run: MaxVio in windows of steps, the spread of the biases, and the choices that one more update would change."""
    train_config, half = lab_training(size.steps, seed=seed, schedule="constant"), size.steps // 2
    run = fresh(lab_model(SCORES, *settings(rate)), train_config, corpus)
    window = min(WINDOW, max(size.steps // 8, 1))
    rows, recent = [], []
    for step, result in steps_of(run, lambda step: BEFORE if step < half else AFTER):
        recent.append(balance_of(result)["max_vio"])
        if step % window == 0:
            biases = [moe.get_buffer("router.correction_bias") for moe in run.model.moe_layers().values()]  # type: ignore[attr-defined]
            rows.append({
                "step": step,
                "max_vio": float(np.mean(recent)),
                "bias_range": [float(bias.max() - bias.min()) for bias in biases],
            })  # fmt: skip
            recent = []
    bits = heldout_bits(run.model, corpus, train_config.length, size.heldout, train_config.batch)
    means = {
        "before": _mean(rows, 0.25 * size.steps, half),
        "shift": _mean(rows, half, 0.625 * size.steps),
        "after": _mean(rows, 0.75 * size.steps, size.steps),
    }
    return {"seed": seed, "rows": rows, "end": {**means, "bits": bits["code"]}}


def _mean(rows: list[dict[str, Any]], first: float, last: float) -> float:
    """Mean MaxVio of the windows that end in (first, last]."""
    return float(np.mean([row["max_vio"] for row in rows if first < row["step"] <= last]))


def judged(ends: dict[float, list[dict[str, float]]]) -> list[dict[str, Any]]:
    """What Wang et al. report of the step, and what a controller is for."""
    after = {rate: spread([end["after"] for end in runs]) for rate, runs in ends.items()}
    best = min((rate for rate in RATES if rate), key=lambda rate: after[rate]["mean"])
    shares = [end["shift"] for end in ends[best]], [end["after"] for end in ends[best]]
    return [
        claim(
            "a step of 0.001 balances better than 0.0001 and than 0.01",
            "Wang et al. 2024",
            all(
                middle["after"] < min(small["after"], large["after"])
                for small, middle, large in zip(ends[1e-4], ends[1e-3], ends[1e-2], strict=True)
            ),
            "; ".join(f"{rate:g}: {told(after[rate])}" for rate in (1e-4, 1e-3, 1e-2)),
            "in every seed a lower MaxVio at the end",
        ),
        claim(
            "there is a step that is too small and one that is too large",
            "Wang et al. 2024",
            RATES[1] < best < RATES[-1] and all(
                run["after"] < min(small["after"], large["after"])
                for small, run, large in zip(ends[RATES[1]], ends[best], ends[RATES[-1]], strict=True)
            ),
            f"best {best:g}: {told(after[best])}; {RATES[1]:g}: {told(after[RATES[1]])}; {RATES[-1]:g}: {told(after[RATES[-1]])}",
            "the best of the steps is neither the smallest nor the largest, and in every seed both of these are worse",
        ),
        claim(
            "after a change of the data the load is uneven until the bias has followed",
            "a controller without foresight",
            all(first > later for first, later in zip(*shares, strict=True)),
            f"step {best:g}: {told(spread(shares[0]))} just after, {told(spread(shares[1]))} at the end",
            "in every seed a higher MaxVio just after the change than at the end",
        ),
    ]  # fmt: skip


def run(seeds: Sequence[int], smoke: bool) -> dict[str, Any]:
    """Every step size with as many seeds; the learning rate is constant, so that the second half is not easier than the first."""
    size, corpus = SMOKE if smoke else FULL, load_corpus()

    def measure() -> dict[str, Any]:
        arms = {rate: [one_run(rate, seed, size, corpus) for seed in seeds] for rate in RATES}
        ends = {rate: [one["end"] for one in runs] for rate, runs in arms.items()}
        summary = {rate: {key: spread([end[key] for end in runs]) for key in runs[0]} for rate, runs in ends.items()}
        rows = [[f"{rate:g}", *(f"{one[key]['mean']:.2f}" for key in one)] for rate, one in summary.items()]
        columns = ["step", "MaxVio before", "after change", "at the end", "bits, code"]
        return {
            "arms": {f"{rate:g}": runs for rate, runs in arms.items()},
            "summary": {f"{rate:g}": one for rate, one in summary.items()},
            "claims": judged(ends),
            "table": {"columns": columns, "rows": rows},
            "domain_weights": {"before": dict(BEFORE), "after": dict(AFTER)},
            "shift": size.steps // 2,
            "model_config": lab_model(SCORES, *settings(0.0)).to_dict(),
            "train_config": lab_training(size.steps, schedule="constant").to_dict(),
        }

    return framed("bias", seeds, smoke, corpus, measure)
