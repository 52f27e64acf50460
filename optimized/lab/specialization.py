"""What experts specialize in: every measure of the reference, over the checkpoints of a training run, each against its null model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from reference.autograd.checkpoints import moe_parameters
from reference.autograd.conversion import routing_to_numpy
from reference.autograd.training import heldout_bits
from reference.autograd.transformer import LanguageModel
from reference.churn import routing_churn
from reference.config import BalanceConfig, GatingConfig, ScoresConfig
from reference.overlap import all_outputs, hidden_units, output_overlap, weight_overlap
from reference.redundancy import redundancy
from reference.specialization import domain_expert_share, measure, position_bins
from reference.text import Corpus, heldout_windows, load_corpus

from .common import claim, framed, fresh, lab_model, lab_training, spread, steps_of, told
from .masked import masked_bits

SCORES = ScoresConfig("sigmoid")
GATING = GatingConfig(top_k=2, correction_bias=True, normalize="sum", eps=1e-20)
BALANCE = BalanceConfig(bias_rule="sign", bias_rate=0.01)
EXPERTS, WIDTH, BINS = 8, 64, 8
LABELS = ("domain", "byte", "position")


class Size(NamedTuple):
    """Steps and the checkpoints at which is measured; held-out windows a domain for routing and for masking; draws of the null models."""

    checkpoints: tuple[int, ...]
    windows: int
    masked_windows: int
    permutations: int
    draws: int
    overlap_tokens: int


FULL = Size((0, 20, 60, 150, 300, 600, 1000, 1600), 16, 6, 200, 20, 256)
SMOKE = Size((0, 4, 8), 2, 1, 19, 2, 32)


class Text(NamedTuple):
    """The held-out bytes that every checkpoint reads, and what is known of each of their tokens."""

    tokens_BS: torch.Tensor
    domain_T: np.ndarray
    byte_T: np.ndarray
    sequence_T: np.ndarray
    position_T: np.ndarray


class Look(NamedTuple):
    """One layer at one checkpoint: the experts of each held-out token, and what reached the layer."""

    expert_TK: np.ndarray
    x_TD: np.ndarray


def read_text(corpus: Corpus, windows: int, length: int) -> Text:
    """Evenly spaced held-out windows of all domains."""
    tokens_BS = np.concatenate([heldout_windows(corpus, domain, length, windows) for domain in corpus.domains])
    sequence_T = np.repeat(np.arange(len(tokens_BS)), length)
    domain_T = np.repeat(np.arange(len(corpus.domains)), windows * length)
    return Text(torch.from_numpy(tokens_BS), domain_T, tokens_BS.ravel(), sequence_T, position_bins(sequence_T, BINS))


@torch.no_grad()
def look(model: LanguageModel, text: Text) -> dict[int, Look]:
    """MoE layer → what it does with the held-out text, in evaluation mode; the model's mode is put back."""
    reached: dict[int, np.ndarray] = {}

    def keep(layer: int) -> Callable[..., None]:
        return lambda _, arguments: reached.__setitem__(layer, arguments[0].flatten(0, -2).double().numpy())

    handles = [moe.register_forward_pre_hook(keep(layer)) for layer, moe in model.moe_layers().items()]
    training = model.training
    try:
        routings = model.eval()(text.tokens_BS)[1].routing
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    return {layer: Look(routing_to_numpy(routing).expert, reached[layer]) for layer, routing in sorted(routings.items())}


def informations(expert_TK: np.ndarray, text: Text, size: Size, rng: np.random.Generator) -> dict[str, Any]:
    """Bits about domain, byte and position, each against the null that fits it.

    A domain belongs to whole sequences. A byte is more frequent in one domain than in another, so its null deals bytes out within a domain.
    A position's null deals positions out within a sequence.
    """
    nulls: dict[str, dict[str, Any]] = {
        "domain": {"label_T": text.domain_T, "group_ids": text.sequence_T},
        "byte": {"label_T": text.byte_T, "within": text.domain_T},
        "position": {"label_T": text.position_T, "within": text.sequence_T},
    }
    return {label: measure(expert_TK, rng=rng, permutations=size.permutations, **nulls[label])._asdict() for label in LABELS}


def layer_facts(model: LanguageModel, layer: int, seen: Look, text: Text, size: Size, rng: np.random.Generator) -> dict[str, Any]:
    """Everything that one layer at one checkpoint shows by itself."""
    config, params = moe_parameters(model, layer)
    some = rng.choice(len(seen.x_TD), size.overlap_tokens, replace=False)
    params = {name: np.asarray(array, np.float64) for name, array in params.items()}
    domains = int(text.domain_T.max()) + 1
    return {
        "share": domain_expert_share(seen.expert_TK, text.domain_T, EXPERTS, labels=domains),
        "information": informations(seen.expert_TK, text, size, rng),
        "weights": weight_overlap(hidden_units(params, config), rng, draws=size.draws),
        "outputs": output_overlap(all_outputs(seen.x_TD[some], params, config), rng, draws=size.draws),
    }


def agreements(looks: list[dict[int, Look]], text: Text, size: Size, rng: np.random.Generator) -> list[dict[str, Any]]:
    """For each checkpoint, by layer: agreement with the checkpoint before it, and with the last one, also beyond what the byte explains."""
    found = []
    for number, seen in enumerate(looks):
        by_layer = {}
        for layer, one in seen.items():
            last, before = looks[-1][layer].expert_TK, looks[max(number - 1, 0)][layer].expert_TK
            compare = dict(experts=EXPERTS, rng=rng, permutations=size.draws)
            by_layer[layer] = {
                "previous": routing_churn(before, one.expert_TK, **compare),  # type: ignore[arg-type]
                "last": routing_churn(one.expert_TK, last, **compare),  # type: ignore[arg-type]
                "last_within_byte": routing_churn(one.expert_TK, last, within=text.byte_T, **compare),  # type: ignore[arg-type]
            }
        found.append(by_layer)
    return found


def one_run(seed: int, size: Size, corpus: Corpus) -> tuple[dict[str, Any], dict[int, Look]]:
    """(the measures at every checkpoint of a training run, the last look)."""
    train_config = lab_training(size.checkpoints[-1], seed=seed)
    run = fresh(lab_model(SCORES, GATING, BALANCE, experts=EXPERTS, width=WIDTH), train_config, corpus)
    text, rng = read_text(corpus, size.windows, train_config.length), np.random.default_rng([seed, 1])
    checkpoints, looks = [], []

    def stop(step: int) -> None:
        looks.append(look(run.model, text))
        loss = masked_bits(run.model, corpus, train_config.length, size.masked_windows)
        checkpoints.append({
            "step": step,
            "bits": heldout_bits(run.model, corpus, train_config.length, size.windows, size.windows),
            "layers": {layer: layer_facts(run.model, layer, seen, text, size, rng) for layer, seen in looks[-1].items()},
            "masked": redundancy(loss, (1, 2, 4), rng, experts=EXPERTS, top_k=GATING.top_k, draws=max(size.draws // 2, 1)),
        })  # fmt: skip

    stop(0)
    for step, _ in steps_of(run):
        if step in size.checkpoints:
            stop(step)
    for checkpoint, by_layer in zip(checkpoints, agreements(looks, text, size, rng), strict=True):
        for layer, found in by_layer.items():
            checkpoint["layers"][layer]["agreement"] = found
    return {"seed": seed, "checkpoints": checkpoints}, looks[-1]


def between_seeds(finals: dict[int, dict[int, Look]], text: Text, size: Size) -> list[dict[str, Any]]:
    """Do two runs find the same experts, up to their names? Each pair of seeds and layer, also beyond what the byte explains."""
    rng, found = np.random.default_rng(2), []
    seeds = list(finals)
    for number, first in enumerate(seeds):
        for second in seeds[number + 1 :]:
            for layer in finals[first]:
                sides = finals[first][layer].expert_TK, finals[second][layer].expert_TK
                compare = dict(experts=EXPERTS, rng=rng, relabel=True, permutations=size.draws)
                plain = routing_churn(*sides, **compare)  # type: ignore[arg-type]
                byte = routing_churn(*sides, within=text.byte_T, **compare)  # type: ignore[arg-type]
                found.append({"seeds": [first, second], "layer": layer, "agreement": plain, "within_byte": byte})
    return found


def judged(runs: list[dict[str, Any]], layers: Sequence[int]) -> list[dict[str, Any]]:
    """The literature's claims against the last checkpoints, and against the way there."""
    last = [one["checkpoints"][-1] for one in runs]
    cells = [checkpoint["layers"][layer]["information"] for checkpoint in last for layer in layers]
    excess = {label: spread([cell[label]["excess"] for cell in cells]) for label in LABELS}
    coefficient = {label: spread([cell[label]["excess"] / cell[label]["expert_entropy"] for cell in cells]) for label in LABELS}
    early = [one["checkpoints"][len(one["checkpoints"]) // 2] for one in runs]
    settled = spread([checkpoint["layers"][layer]["agreement"]["last"].agreement.value for checkpoint in early for layer in layers])
    masked = [{one.disabled: one.increase for one in checkpoint["masked"]} for checkpoint in last]
    return [
        claim(
            "routing follows the token's identity more than its domain",
            "Xue et al. 2024 (OpenMoE), §4",
            all(cell["byte"]["excess"] > cell["domain"]["excess"] for cell in cells),
            f"bits beyond chance: byte within its domain {told(excess['byte'])}, domain {told(excess['domain'])}",
            "in every layer of every seed more bits beyond chance about the byte than about the domain",
        ),
        claim(
            "experts are specialists for domains",
            "common reading",
            all(cell["domain"]["excess"] > 0.5 * cell["domain"]["label_entropy"] for cell in cells),
            f"the expert tells {told(excess['domain'])} of {cells[0]['domain']['label_entropy']:.2f} bits; p = "
            f"{max(cell['domain']['p_value'] for cell in cells):.3f} at most",
            "in every layer of every seed more than half of the domain's bits",
        ),
        claim(
            "routing is independent of the position",
            "common reading",
            all(cell["position"]["p_value"] > 0.05 for cell in cells),
            f"the position explains {told(coefficient['position'], 4)} of the expert's entropy beyond chance; "
            f"p = {min(cell['position']['p_value'] for cell in cells):.3f} at least",
            "in every layer of every seed p above 0.05",
        ),
        claim(
            "routing is decided early and then hardly changes",
            "Xue et al. 2024 (OpenMoE), §4",
            settled["low"] > 0.8,
            f"at step {early[0]['step']} of {last[0]['step']} {told(settled)} of the assignments are those of the end",
            "in every layer of every seed more than 0.8 of the assignments at that step",
        ),
        claim(
            "without its preferred experts a token fares worse than without random ones",
            "Dai et al. 2024 (DeepSeekMoE), §4.5, has no such control",
            all(cell[1].value > cell[1].null_high for cell in masked),
            f"bits per byte lost: {told(spread([cell[1].value for cell in masked]))} without the best one, "
            f"{told(spread([cell[1].null_mean for cell in masked]))} without a random one",
            "in every seed more bits lost without the best one than in 97.5 % of the draws of a random one",
        ),
    ]


def overview(runs: list[dict[str, Any]], layers: Sequence[int]) -> dict[str, Any]:
    """The terminal's table: over the checkpoints, means over seeds and layers."""
    rows = []
    for number, checkpoint in enumerate(runs[0]["checkpoints"]):
        here = [one["checkpoints"][number] for one in runs]
        cells = [each["layers"][layer] for each in here for layer in layers]
        bits = np.mean([list(each["bits"].values()) for each in here])
        excess = [np.mean([cell["information"][label]["excess"] for cell in cells]) for label in LABELS]
        overlaps = [np.mean([cell[name].excess for cell in cells]) for name in ("weights", "outputs")]
        last = np.mean([cell["agreement"]["last"].agreement.value for cell in cells])
        numbers = (*excess, *overlaps, last)
        rows.append([str(checkpoint["step"]), f"{bits:.2f}", *(f"{value:.3f}" for value in numbers)])
    return {"columns": ["step", "bits", *LABELS, "weights", "outputs", "as at the end"], "rows": rows}


def run(seeds: Sequence[int], smoke: bool) -> dict[str, Any]:
    """A run a seed; bits about a label, overlaps and agreements are in excess of chance in the table."""
    size, corpus = SMOKE if smoke else FULL, load_corpus()
    model_config = lab_model(SCORES, GATING, BALANCE, experts=EXPERTS, width=WIDTH)

    def measure_all() -> dict[str, Any]:
        runs, finals = [], {}
        for seed in seeds:
            measured, finals[seed] = one_run(seed, size, corpus)
            runs.append(measured)
        train_config = lab_training(size.checkpoints[-1])
        layers = list(finals[seeds[0]])
        return {
            "domains": list(corpus.domains),
            "runs": runs,
            "between_seeds": between_seeds(finals, read_text(corpus, size.windows, train_config.length), size),
            "claims": judged(runs, layers),
            "table": overview(runs, layers),
            "size": size._asdict(),
            "model_config": model_config.to_dict(),
            "train_config": train_config.to_dict(),
        }

    return framed("specialization", seeds, smoke, corpus, measure_all)
