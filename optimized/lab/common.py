"""What the experiments share: a small model, its training step by step, and the frame of a result."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import torch

from reference.autograd.training import Run, StepResult, TrainConfig, batch_of_step, make_optimizer, optimizer_step
from reference.autograd.transformer import LanguageModel
from reference.balancing import dead_experts, max_violation
from reference.config import BalanceConfig, ExpertsConfig, GatingConfig, MoEConfig, ScoresConfig
from reference.model_config import AttentionConfig, ModelConfig
from reference.text import Corpus

from ..comparison import plain
from . import EXPERIMENTS

PACKAGES = ("numpy", "torch")
DIGITS = 5
Weights = tuple[tuple[str, float], ...]


def lab_model(scores: ScoresConfig, gating: GatingConfig, balance: BalanceConfig, *, experts: int = 16, width: int = 32) -> ModelConfig:
    """Two MoE layers of width 64: about a quarter of the width and a tenth of the parameters of the tour's model."""
    moe = MoEConfig(64, scores, gating, experts=ExpertsConfig(experts, width), balance=balance)
    return ModelConfig("lab", moe, layers=2, attention=AttentionConfig(heads=4, kv_heads=2, head_dim=16))


def lab_training(steps: int, **fields: Any) -> TrainConfig:
    """1024 bytes a step; few steps, so the rate is high and falls to a tenth."""
    return TrainConfig(**{"steps": steps, "batch": 8, "length": 128, "lr": 4e-3, "warmup": min(20, steps // 4), **fields})


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Results depend on how sums are split over threads, so there is one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fresh(model_config: ModelConfig, train_config: TrainConfig, corpus: Corpus) -> Run:
    """A run before its first step, its parameters a function of the seed."""
    with torch.random.fork_rng():
        torch.manual_seed(train_config.seed)
        model = LanguageModel(model_config)
    return Run(model, make_optimizer(model, train_config), train_config, corpus, corpus.fingerprint(), [])


def steps_of(run: Run, weights: Callable[[int], Weights] = lambda step: ()) -> Iterator[tuple[int, StepResult]]:
    """(steps done, result of the last one) until the run's end; weights(step) are the domains' weights from which a step draws."""
    for step in range(run.config.steps):
        windows = batch_of_step(run.corpus, dataclasses.replace(run.config, domain_weights=weights(step)), step)
        yield step + 1, optimizer_step(run, step, windows)


def balance_of(result: StepResult) -> dict[str, Any]:
    """MaxVio and experts without a token in the step's batch, by MoE layer."""
    loads = [load.numpy() for _, load in sorted(result.load.items())]
    return {"max_vio": [max_violation(load) for load in loads], "dead": [dead_experts(load) for load in loads]}


def spread(values: Sequence[float]) -> dict[str, float]:
    """Mean, least and largest over the seeds."""
    return {"mean": float(np.mean(values)), "low": float(np.min(values)), "high": float(np.max(values))}


def told(values: dict[str, float], places: int = 2) -> str:
    """A spread as text: mean, and the range over the seeds."""
    return f"{values['mean']:.{places}f} ({values['low']:.{places}f} – {values['high']:.{places}f})"


def claim(text: str, source: str, held: bool, seen: str, rule: str) -> dict[str, Any]:
    """What is said in the literature, who says it, whether it held in every seed here, the numbers, and what "held" asks for."""
    return {"claim": text, "source": source, "held": bool(held), "seen": seen, "rule": rule}


def rounded(value: Any) -> Any:
    """Plain data with floats of DIGITS significant digits: what a committed file needs."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.{DIGITS}g}") if isinstance(value, float) and math.isfinite(value) else value


def framed(name: str, seeds: Sequence[int], smoke: bool, corpus: Corpus, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The result of `measure` with what is needed to make it again: command, seeds, versions, text."""
    began = time.perf_counter()
    with one_thread():
        found = measure()
    options = f" --seeds {','.join(map(str, seeds))}" + (" --smoke" if smoke else "")
    frame = {
        "experiment": name,
        "question": EXPERIMENTS[name].question,
        "command": f"moebius lab {name}{options} --json docs/results/{EXPERIMENTS[name].result}.json",
        "smoke": smoke,
        "seeds": list(seeds),
        "versions": {"python": platform.python_version()} | {package: version(package) for package in PACKAGES},
        "corpus": corpus.fingerprint(),
        "seconds": round(time.perf_counter() - began),
    }
    return rounded(plain(frame | found))
