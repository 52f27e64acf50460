"""What `moebius tour` measures: a small language model on real text, and its layers in every track.

Nothing here prints; `commands/tour.py` shows the results and `report.py` writes them down.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from reference.autograd import MoE
from reference.autograd.checkpoints import load_model, moe_parameters
from reference.autograd.conversion import routing_to_numpy
from reference.autograd.sampling import sample
from reference.autograd.tour_model import steps_in
from reference.autograd.training import TrainConfig, heldout_bits, train
from reference.autograd.transformer import LanguageModel
from reference.model_config import ModelConfig
from reference.proof.cases import Inputs
from reference.routing import Routing
from reference.specialization import domain_expert_share, measure
from reference.text import DOMAINS, Corpus, decode, heldout_windows, load_corpus

from .comparison import Row, Timing, compare_tracks, free_inputs, time_tracks
from .tracks import TRACKS, Conditions

COMMITTED = Path(__file__).parent / "data" / "tour_model.safetensors"


@dataclass(frozen=True)
class Size:
    """How much of everything: seconds of training and of timing, held-out windows a domain, tokens of the parity pass, sampled bytes."""

    train_seconds: float
    heldout: int
    parity_windows: int
    parity_length: int
    timing_seconds: float
    permutations: int
    sample_bytes: int

    @property
    def window(self) -> int:
        """Bytes of a held-out window."""
        return min(256, 8 * self.parity_length)


FULL = Size(60.0, heldout=24, parity_windows=2, parity_length=128, timing_seconds=6.0, permutations=200, sample_bytes=400)
SMOKE = Size(4.0, heldout=4, parity_windows=1, parity_length=32, timing_seconds=0.5, permutations=50, sample_bytes=80)


class TimeUpError(Exception):
    """Training took much longer than its measured first steps had promised."""


@dataclass
class Trained:
    """A model and how it came about.

    log, seconds, steps, planned   of its training;  bits: held-out bits per byte by domain;  routing: MoE layer → who routes where
    """

    model: LanguageModel
    log: list[dict[str, Any]]
    seconds: float
    steps: int
    planned: int
    bits: dict[str, float]
    routing: dict[int, LayerRouting]


class LayerRouting(NamedTuple):
    """One MoE layer on held-out text: share [domain][expert], and mutual information of expert and domain with its permutation null."""

    share: list[list[float]]
    information: dict[str, float]


def open_corpus() -> tuple[Corpus, dict[str, str]]:
    """(corpus, domain → why it is missing): a Python whose distribution leaves a domain out still gives the others."""
    missing: dict[str, str] = {}
    try:
        return load_corpus(), missing
    except ValueError:
        for domain in DOMAINS:
            try:
                load_corpus((domain,))
            except ValueError as error:
                missing[domain] = str(error)
    return load_corpus(tuple(domain for domain in DOMAINS if domain not in missing)), missing


def corpus_facts(corpus: Corpus) -> list[dict[str, Any]]:
    """Sizes by domain."""
    return [
        {
            "domain": domain,
            "train_bytes": int(corpus.train[domain].size),
            "heldout_bytes": int(corpus.heldout[domain].size),
            "documents": len(corpus.train_names[domain]) + len(corpus.heldout_names[domain]),
        }
        for domain in corpus.domains
    ]


def train_live(
    model: ModelConfig, config: TrainConfig, corpus: Corpus, size: Size, *, moe_class: Callable[..., nn.Module] = MoE, progress: bool = True
) -> tuple[LanguageModel, list[dict[str, Any]], int, int, float]:
    """(model, log, steps done, steps planned, seconds): the whole schedule, in the number of steps that fits into the time."""
    planned = max(8, steps_in(size.train_seconds, model, config, corpus, moe_class=moe_class))
    config = dataclasses.replace(
        config,
        steps=planned,
        warmup=min(config.warmup, planned // 5),
        log_every=max(1, planned // 60),
        evaluate_every=0,
        heldout=size.heldout,
    )
    began = time.perf_counter()
    latest: dict[str, Any] = {"log": []}

    def watch(row: dict[str, Any], trained: LanguageModel) -> None:
        latest.update(model=trained, log=[*latest["log"], row])
        if time.perf_counter() - began > 1.4 * size.train_seconds:
            raise TimeUpError

    try:
        result = train(model, config, corpus, moe_class=moe_class, progress=progress, callback=watch)
        latest.update(model=result.model, log=result.log)
    except TimeUpError:
        latest["model"].eval()
    return latest["model"], latest["log"], latest["log"][-1]["step"], planned, time.perf_counter() - began


def read_committed(moe_class: Callable[..., nn.Module] = MoE) -> tuple[LanguageModel, dict[str, Any]] | None:
    """(the committed model in fp32, its log), or None where the files are missing. Raises ValueError where they cannot be read."""
    log = COMMITTED.with_suffix(".json")
    if not (COMMITTED.is_file() and log.is_file()):
        return None
    return load_model(COMMITTED, moe_class=moe_class, dtype=torch.float32), json.loads(log.read_text(encoding="utf-8"))


def heldout_pass(model: LanguageModel, corpus: Corpus, windows: int, length: int) -> tuple[torch.Tensor, np.ndarray]:
    """(tokens_BS, domain_B): the same evenly spaced held-out windows for every model."""
    texts = [heldout_windows(corpus, domain, length, windows) for domain in corpus.domains]
    return torch.from_numpy(np.concatenate(texts)), np.repeat(np.arange(len(corpus.domains)), windows)


@torch.no_grad()
def heldout_routings(model: LanguageModel, corpus: Corpus, size: Size) -> tuple[dict[int, Routing], np.ndarray]:
    """(MoE layer → its routing in evaluation, domain of each sequence [B]) on `size.heldout` windows of every domain."""
    tokens_BS, domain_B = heldout_pass(model, corpus, size.heldout, size.window)
    routings = model.eval()(tokens_BS)[1].routing
    return {layer: routing_to_numpy(routing) for layer, routing in sorted(routings.items())}, domain_B


def who_routes_where(routings: Mapping[int, Routing], domain_B: np.ndarray, corpus: Corpus, size: Size) -> dict[int, LayerRouting]:
    """MoE layer → shares and mutual information of `heldout_routings`; the null deals labels out by sequence: a domain belongs to one."""
    label_T, sequence_T = np.repeat(domain_B, size.window), np.repeat(np.arange(len(domain_B)), size.window)
    experts = max((len(routing.load) for routing in routings.values()), default=0)  # layers may differ
    found = {}
    for layer, routing in routings.items():
        share_VE = domain_expert_share(routing.expert, label_T, experts, labels=len(corpus.domains), keep_TK=routing.keep)
        measured = measure(
            routing.expert,
            label_T,
            np.random.default_rng(layer),
            keep_TK=routing.keep,
            group_ids=sequence_T,
            permutations=size.permutations,
        )
        found[layer] = LayerRouting(share_VE.tolist(), measured._asdict())
    return found


def examine(
    model: LanguageModel, log: list[dict[str, Any]], corpus: Corpus, size: Size, *, length: int, batch: int,
    seconds: float, steps: int, planned: int,
) -> Trained:  # fmt: skip
    """A trained model with its held-out bits and who routes where."""
    bits = heldout_bits(model, corpus, length, size.heldout, batch)
    return Trained(model, log, seconds, steps, planned, bits, who_routes_where(*heldout_routings(model, corpus, size), corpus, size))


@torch.no_grad()
def layer_inputs(model: LanguageModel, corpus: Corpus, size: Size) -> dict[int, tuple[Inputs, Conditions]]:
    """MoE layer → what reaches it on held-out text, its trained parameters, and a random cotangent; each sequence is a group."""
    tokens_BS, _ = heldout_pass(model, corpus, size.parity_windows, size.parity_length)
    reached: dict[int, np.ndarray] = {}

    def keep(layer: int) -> Callable[..., None]:
        def hook(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            reached[layer] = arguments[0].flatten(0, -2).double().cpu().numpy()

        return hook

    handles = [moe.register_forward_pre_hook(keep(layer)) for layer, moe in model.moe_layers().items()]
    try:
        model.eval()(tokens_BS)
    finally:
        for handle in handles:
            handle.remove()
    group_T = np.repeat(np.arange(len(tokens_BS)), tokens_BS.shape[1])
    found = {}
    for layer, x_TD in sorted(reached.items()):
        config, params = moe_parameters(model, layer)
        dy_TD = np.random.default_rng(layer).standard_normal(x_TD.shape)
        wide = {name: np.asarray(array, np.float64) for name, array in params.items()}
        found[layer] = free_inputs(config, wide, x_TD, dy_TD), Conditions(training=True, group_ids=group_T)
    return found


def parity_of_layers(layers: Mapping[int, tuple[Inputs, Conditions]]) -> list[Row]:
    """Every track on every trained layer in every dtype it has."""
    rows = []
    for layer, (inputs, conditions) in layers.items():
        rows += compare_tracks(
            f"layer {layer}", inputs, conditions, tracks=list(TRACKS.values()), dtypes=("float64", "float32", "bfloat16")
        )
    return rows


def worst_of_layers(rows: list[Row]) -> list[Row]:
    """One row for each track and dtype: of its layers a broken one first, then the one with the largest error; flips are summed."""
    table: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        table.setdefault((row.track, row.dtype), []).append(row)
    worst = []
    for group in table.values():
        shown = max(group, key=lambda row: (row.broken, row.rms_error or 0.0))
        worst.append(dataclasses.replace(shown, flips=sum(row.flips for row in group)))
    return worst


def speed_of_layer(layers: Mapping[int, tuple[Inputs, Conditions]], seconds: float) -> list[Timing]:
    """Every track on the first trained layer in fp32, the truth in its float64."""
    inputs, conditions = next(iter(layers.values()))
    return time_tracks(inputs, conditions, tracks=list(TRACKS.values()), dtype="float32", seconds=seconds)


def printable(text: str) -> str:
    """The text with a dot for every character that a terminal would obey or cannot show; an untrained model writes any byte."""
    return "".join(c if (c.isprintable() and c != "\ufffd") or c == "\n" else " " if c == "\t" else "·" for c in text)


def continue_text(model: LanguageModel, corpus: Corpus, count: int, *, temperature: float = 0.7, seed: int = 0) -> list[dict[str, str]]:
    """For each domain the beginning of a held-out window and what the model makes of it."""
    found = []
    for domain in corpus.domains:
        prompt = heldout_windows(corpus, domain, 64, 3)[1]
        prompt = prompt[np.flatnonzero(prompt == ord("\n"))[0] + 1 :] if (prompt[:48] == ord("\n")).any() else prompt
        text = sample(model, bytes(prompt.astype(np.uint8)), count, temperature=temperature, top_p=0.95, seed=seed)
        shown, text = (printable(decode(list(part), "replace")) for part in (prompt, text))
        found.append({"domain": domain, "prompt": shown, "text": text})
    return found
