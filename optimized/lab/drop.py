"""Who is dropped where capacity is limited: the share of assignments lost in each part of a sequence, by the order of the queue.

Nothing is trained. One router throws dice; the others are the layers of the committed model, which was trained without a capacity and is
given one here, as it reads text that it has not seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from reference.autograd.checkpoints import load_model
from reference.autograd.conversion import routing_to_numpy
from reference.balancing import drop_rate_by_position
from reference.capacity import group_capacity, keep_within_capacity, queue_order
from reference.config import CapacityConfig, MoEConfig
from reference.gating import top_k
from reference.scores import softmax_forward
from reference.text import Corpus, heldout_windows, load_corpus
from reference.tokens import Draws, token_info

from ..tour import COMMITTED
from .common import claim, framed, spread, told

ORDERS = ("token_major", "choice_major", "random", "batch_prioritized")
FACTOR, BINS, LENGTH = 1.0, 8, 256
LATE = "OpenMoE (Xue et al. 2024), §4.3"


class Routed(NamedTuple):
    """What a router chose before any drop: experts and gates of each token [T, K], the token's sequence and its position in it [T]."""

    router: str
    expert_TK: np.ndarray
    gate_TK: np.ndarray
    sequence_T: np.ndarray
    position_T: np.ndarray


def _places(sequences: int) -> tuple[np.ndarray, np.ndarray]:
    return np.repeat(np.arange(sequences), LENGTH), np.tile(np.arange(LENGTH), sequences)


def thrown(config: MoEConfig, sequences: int, rng: np.random.Generator) -> Routed:
    """Independent standard normal logits: every expert is equally likely for every token."""
    scores_TE, _ = softmax_forward(rng.standard_normal((sequences * LENGTH, config.experts.count)))
    expert_TK = top_k(scores_TE, config.gating.top_k)
    return Routed("dice", expert_TK, np.take_along_axis(scores_TE, expert_TK, axis=1), *_places(sequences))


@torch.no_grad()
def learned(corpus: Corpus, windows: int, part: int, parts: int) -> Iterator[Routed]:
    """Each MoE layer of the committed model on every `parts`-th held-out window, so that seeds share no text."""
    model = load_model(COMMITTED, dtype=torch.float32).eval()
    texts = [heldout_windows(corpus, domain, LENGTH, windows * parts)[part::parts] for domain in corpus.domains]
    tokens_BS = torch.from_numpy(np.concatenate(texts))
    for layer, routing in sorted(model(tokens_BS)[1].routing.items()):
        found = routing_to_numpy(routing)
        yield Routed(f"layer {layer}", found.expert, found.gate, *_places(len(tokens_BS)))


def drop_rates(routed: Routed, order: str, experts: int, rng: np.random.Generator) -> list[float]:
    """The share of assignments dropped in each of BINS parts of the sequences, where each expert has FACTOR · K S / E slots a sequence."""
    config = CapacityConfig("per_assignment", FACTOR, order=order)
    tokens = token_info(len(routed.position_T), group_ids=routed.sequence_T)
    slots_B = group_capacity(config, routed.expert_TK.shape[1], experts, tokens, training=True)
    order_N = queue_order(routed.gate_TK, order, Draws(rng), training=True)
    wanted_TK = np.ones(routed.expert_TK.shape, bool)
    keep_TK = keep_within_capacity(routed.expert_TK, wanted_TK, slots_B, order_N, tokens)
    return drop_rate_by_position(wanted_TK, keep_TK, routed.position_T, BINS).tolist()


def one_seed(seed: int, part: int, parts: int, windows: int, corpus: Corpus) -> dict[str, dict[str, list[float]]]:
    """Router → order → drop rate by position."""
    rng = np.random.default_rng(seed)
    config = load_model(COMMITTED, dtype=torch.float32).config.moe
    routers = [thrown(config, windows * len(corpus.domains), rng), *learned(corpus, windows, part, parts)]
    return {routed.router: {order: drop_rates(routed, order, config.experts.count, rng) for order in ORDERS} for routed in routers}


def judged(runs: Sequence[dict[str, dict[str, list[float]]]]) -> list[dict[str, Any]]:
    """What is said about late tokens, and whether every router in every seed agrees."""
    found = {order: [run[router][order] for run in runs for router in run] for order in ORDERS}
    rise = {order: [rates[-1] - rates[0] for rates in all_rates] for order, all_rates in found.items()}
    lot = [abs(a) < b / 4 for a, b in zip(rise["random"], rise["token_major"], strict=True)]
    return [
        claim(
            "in a queue by position late tokens are dropped more",
            LATE,
            min(rise["token_major"]) > 0,
            f"the last eighth loses {told(spread(rise['token_major']))} more of its assignments than the first",
            "for every router in every seed the last eighth loses more than the first",
        ),
        claim(
            "serving all first choices before any second one does not cure it",
            "GShard's queue, algorithm 1",
            min(rise["choice_major"]) > 0,
            f"the last eighth still loses {told(spread(rise['choice_major']))} more",
            "for every router in every seed the last eighth still loses more than the first",
        ),
        claim(
            "a queue by lot treats all positions alike",
            "DeepSpeed's random token selection",
            all(lot),
            f"{told(spread(rise['random']))} more",
            "for every router in every seed the difference is below a quarter of that of the queue by position",
        ),
    ]


def run(seeds: Sequence[int], smoke: bool) -> dict[str, Any]:
    """Drop rates of every router and order, by as many seeds: each has its own dice and its own held-out text."""
    windows, corpus = 2 if smoke else 24, load_corpus()

    def measure() -> dict[str, Any]:
        runs = [one_seed(seed, part, len(seeds), windows, corpus) for part, seed in enumerate(seeds)]
        summary = {
            router: {order: [spread([run[router][order][place] for run in runs]) for place in range(BINS)] for order in ORDERS}
            for router in runs[0]
        }
        rows = [
            [router, order.replace("_", " "), *(f"{100 * rates[place]['mean']:.1f} %" for place in (0, BINS // 2, -1))]
            for router, orders in summary.items()
            for order, rates in orders.items()
        ]
        return {
            "factor": FACTOR,
            "length": LENGTH,
            "sequences": windows * len(corpus.domains),
            "summary": summary,
            "claims": judged(runs),
            "table": {"columns": ["router", "queue", "first eighth", "fifth", "last eighth"], "rows": rows},
        }

    return framed("drop", seeds, smoke, corpus, measure)
