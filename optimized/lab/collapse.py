"""Collapse: softmax scores and one expert a token as in the Switch Transformer, with nothing, a loss or a bias to balance them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from reference.autograd.training import heldout_bits
from reference.config import BalanceConfig, GatingConfig, ScoresConfig
from reference.text import Corpus, load_corpus

from .common import balance_of, claim, framed, fresh, lab_model, lab_training, spread, steps_of, told

ARMS = {
    "nothing": BalanceConfig(),
    "auxiliary loss": BalanceConfig((("first_choice_balance", 0.01),)),
    "bias": BalanceConfig(bias_rule="sign", bias_rate=0.01),
}
"""Switch's weight of the loss; the bias' step is ten times DeepSeek's, for there are a thousand times fewer steps."""


class Size(NamedTuple):
    """Steps, how often a row is kept and how often held-out text is read, and how many windows of each domain."""

    steps: int
    row_every: int
    evaluate_every: int
    heldout: int


FULL, SMOKE = Size(1000, 10, 100, 12), Size(8, 2, 4, 1)


def one_run(balance: BalanceConfig, seed: int, size: Size, corpus: Corpus) -> dict[str, Any]:
    """A training run: rows (step, MaxVio, experts without a token, by layer) and the held-out bits per byte over the steps."""
    gating = GatingConfig(top_k=1, correction_bias=balance.bias_rule != "none")
    train_config = lab_training(size.steps, seed=seed)
    run = fresh(lab_model(ScoresConfig(), gating, balance), train_config, corpus)
    rows, heldout = [], []
    for step, result in steps_of(run):
        if step == 1 or step % size.row_every == 0:
            rows.append({"step": step, **balance_of(result)})
        if step % size.evaluate_every == 0:
            bits = heldout_bits(run.model, corpus, train_config.length, size.heldout, train_config.batch)
            heldout.append({"step": step, "bits": bits})
    late = [row for row in rows if row["step"] > 0.75 * size.steps]
    end = {
        "max_vio": float(np.mean([row["max_vio"] for row in late])),
        "dead": float(np.mean([sum(row["dead"]) for row in late])),
        "bits": float(np.mean(list(heldout[-1]["bits"].values()))),
    }
    return {"seed": seed, "rows": rows, "heldout": heldout, "end": end}


def judged(ends: dict[str, list[dict[str, float]]], experts: int) -> list[dict[str, Any]]:
    """The field's claims against the ends of the runs, seed by seed."""
    plain, loss, bias = ends.values()
    vio, dead, bits = ({name: spread([end[key] for end in runs]) for name, runs in ends.items()} for key in ("max_vio", "dead", "bits"))
    return [
        claim(
            "without balancing a few experts get several times their share and others nothing",
            "Shazeer et al. 2017, §4",
            all(end["max_vio"] > 2 and end["dead"] >= 1 for end in plain),
            f"MaxVio {told(vio['nothing'])}; {told(dead['nothing'], 1)} of {experts} experts idle",
            "in every seed MaxVio above 2 and at least one expert idle",
        ),
        claim(
            "the auxiliary loss prevents it",
            "Fedus et al. 2021, §2.2",
            all(a["max_vio"] < b["max_vio"] / 2 and a["dead"] < 1 for a, b in zip(loss, plain, strict=True)),
            f"MaxVio {told(vio['auxiliary loss'])}; {told(dead['auxiliary loss'], 1)} idle",
            "in every seed less than half of the MaxVio without balancing, and fewer than one expert idle",
        ),
        claim(
            "so does a bias without a loss",
            "Wang et al. 2024",
            all(a["max_vio"] < b["max_vio"] / 2 and a["dead"] < 1 for a, b in zip(bias, plain, strict=True)),
            f"MaxVio {told(vio['bias'])}; {told(dead['bias'], 1)} idle",
            "in every seed less than half of the MaxVio without balancing, and fewer than one expert idle",
        ),
        claim(
            "a balanced layer predicts better than a collapsed one",
            "common reading",
            all(max(a["bits"], b["bits"]) < c["bits"] for a, b, c in zip(loss, bias, plain, strict=True)),
            "; ".join(f"{name} {told(bits[name], 3)}" for name in ends) + " bits per byte",
            "in every seed fewer bits with the loss and with the bias than with nothing, from the same start",
        ),
        claim(
            "the bias costs less quality than the loss",
            "Wang et al. 2024",
            all(b["bits"] < a["bits"] for a, b in zip(loss, bias, strict=True)),
            f"auxiliary loss {told(bits['auxiliary loss'], 3)}; bias {told(bits['bias'], 3)} bits per byte",
            "in every seed fewer bits with the bias than with the loss, from the same start",
        ),
    ]


def run(seeds: Sequence[int], smoke: bool) -> dict[str, Any]:
    """Three ways of balancing by as many seeds; the same seed starts with the same parameters and sees the same text in each."""
    size, corpus = SMOKE if smoke else FULL, load_corpus()
    model_config = lab_model(ScoresConfig(), GatingConfig(), BalanceConfig())
    experts = model_config.moe.experts.count * model_config.layers

    def measure() -> dict[str, Any]:
        arms = {name: [one_run(balance, seed, size, corpus) for seed in seeds] for name, balance in ARMS.items()}
        ends = {name: [one["end"] for one in runs] for name, runs in arms.items()}
        summary = {name: {key: spread([end[key] for end in runs]) for key in runs[0]} for name, runs in ends.items()}
        rows = [[name, *(f"{one[key]['mean']:.2f}" for key in one)] for name, one in summary.items()]
        return {
            "arms": arms,
            "summary": summary,
            "claims": judged(ends, experts),
            "table": {"columns": ["means over the seeds", "MaxVio", f"idle of {experts}", "bits per byte"], "rows": rows},
            "model_config": model_config.to_dict(),
            "balance": {name: balance for name, balance in ARMS.items()},
            "train_config": lab_training(size.steps).to_dict(),
        }

    return framed("collapse", seeds, smoke, corpus, measure)
