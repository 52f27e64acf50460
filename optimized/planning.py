"""What a model asks of machines, before there is one: memory, what a step reads and computes, and what experts on several ranks send.

The equations are those of `reference.cost`. Only which ranks a token reaches is drawn: limits on groups, capacities and choices by
expert have no formula, so an untrained router of the same settings decides.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from reference import init_params, moe_forward
from reference.choices import CHOICES
from reference.config import MoEConfig, require
from reference.cost import (
    AllToAll,
    activation_bytes,
    all_to_all_volume,
    expected_experts_touched,
    flops_per_token,
    layer_parameters,
    model_parameters,
    sum_parameters,
    weight_bytes,
)
from reference.model_config import ModelConfig
from reference.zero_computation import zero_computation_shapes

from .expert_parallel.placement import Placement

FORMATS = {"float32": (4.0, 4), "bfloat16": (2.0, 2), "float16": (2.0, 2), "fp8": (1.0, 2), "mxfp4": (4.25 / 8, 2)}
"""Format of the weights → (bytes of a weight, bytes of a number of an activation). MXFP4 has an 8-bit exponent for every 32 weights; where
weights have fewer than 16 bits, activations are kept and sent in bf16."""
ROUTER_WIDTH = 64
RANK_TOKENS, MOST_NUMBERS, MOST_RANKS = 64, 1 << 22, 4096


class Step(NamedTuple):
    """One step of so many tokens.

    experts        networks read in a MoE layer, the mean over the layers, by a router without favourites; None without such a layer
    read_bytes     of weights;  kept_bytes: at most what the MoE layers keep for a backward
    flops          forward
    """

    tokens: int
    experts: float | None
    read_bytes: float
    kept_bytes: float
    flops: float


class Spread(NamedTuple):
    """A model whose experts live on so many ranks, each of which has everything else.

    experts        networks of a layer on the rank that has most
    weight_bytes   of that rank
    unit           what sends: a "token", or where tokens are mixed a "group" of them, whose slots travel
    rows           that one of these sends to other ranks in a MoE layer, the mean over layers
    forward_bytes, backward_bytes   of one of these in all layers, there and back
    """

    ranks: int
    experts: int
    weight_bytes: float
    unit: str
    rows: float
    forward_bytes: float
    backward_bytes: float


def sizes(dtype: str) -> tuple[float, int]:
    """Bytes of a weight and of a number of an activation. Raises ValueError for an unknown format."""
    require(dtype in FORMATS, f"dtype is {dtype!r}; known: {', '.join(FORMATS)}")
    return FORMATS[dtype]


def step(model: ModelConfig, tokens: int, *, context: int, dtype: str) -> Step:
    """What one step of `tokens` tokens, in sequences of `context`, reads, keeps and computes. Raises ValueError for fewer than 1."""
    require(tokens >= 1, f"tokens is {tokens}; a step has at least 1 token")
    (size, itemsize), layers = sizes(dtype), model.moe_layers()
    experts = sum(expected_experts_touched(config, tokens) for config in layers) / len(layers) if layers else None
    kept = sum(activation_bytes(config, tokens, bytes_per_number=itemsize) for config in layers)
    return Step(tokens, experts, weight_bytes(model, tokens, bytes_per_weight=size), kept, tokens * flops_per_token(model, context).forward)


def spread(model: ModelConfig, ranks: int, *, dtype: str) -> Spread:
    """The model on `ranks` ranks. Raises ValueError for fewer than 1 or more than 4096, and for a model without experts."""
    (size, itemsize), layers = sizes(dtype), Counter(model.moe_layers())
    require(bool(layers), f"{model.name} has no MoE layer whose experts could be spread over ranks")
    require(1 <= ranks <= MOST_RANKS, f"ranks is {ranks}; from 1 to {MOST_RANKS} can be counted")
    elsewhere = rows = forward = backward = 0.0
    most = 0
    for config, count in layers.items():
        placement = Placement.contiguous(config.experts.networks, ranks)
        own = len(placement.local(0))
        most, elsewhere = max(most, own), elsewhere + count * _network_parameters(config) * (1 - own / config.experts.networks)
        volume, crossings, units = _drawn_volume(config, placement, itemsize)
        rows += count * crossings / units
        forward += count * float(volume.dispatch.sum() + volume.combine.sum()) / units
        backward += count * float(volume.combine_gradient.sum() + volume.dispatch_gradient.sum()) / units
    total = sum_parameters(model_parameters(model)).total
    unit = "group" if CHOICES[model.moe.gating.choice].mixes else "token"
    return Spread(ranks, most, size * (total - elsewhere), unit, rows / layers.total(), forward, backward)


def _network_parameters(config: MoEConfig) -> int:
    """Of all networks of a layer; what experts without one learn is on every rank."""
    others = sum(math.prod(shape) for shape in zero_computation_shapes(config.d_model, config.experts).values())
    return layer_parameters(config)["routed_experts"].total - others


def _drawn_volume(config: MoEConfig, placement: Placement, itemsize: int) -> tuple[AllToAll, int, int]:
    """(bytes, rows that crossed, tokens or groups that sent them) of a drawn routing, each rank with the tokens of one group."""
    tokens = max(1, min(RANK_TOKENS, MOST_NUMBERS // (max(config.experts.count, placement.ranks) * placement.ranks)))
    rank_T = np.repeat(np.arange(placement.ranks), tokens)
    expert_TK, keep_TK = _drawn_choices(config, rank_T)
    units = len(rank_T)
    if CHOICES[config.gating.choice].mixes:
        rank_T, units = np.repeat(np.arange(placement.ranks), len(expert_TK) // placement.ranks), placement.ranks
    volume = all_to_all_volume(
        expert_TK, keep_TK, rank_T, np.array(placement.owner), config.d_model, ranks=placement.ranks, itemsize=itemsize
    )
    return volume, int(volume.combine.sum()) // (config.d_model * itemsize), units


def _drawn_choices(config: MoEConfig, group_T: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(expert, keep) [T, K] by an untrained router in training; where tokens are mixed, a row for each slot of each group."""
    if CHOICES[config.gating.choice].mixes:
        slot_N = np.tile(np.repeat(np.arange(config.experts.count), config.gating.slots), int(group_T[-1]) + 1)
        return slot_N[:, None], np.ones((len(slot_N), 1), bool)
    rng = np.random.default_rng(0)
    experts = replace(config.experts, width=1, shared=0, shared_width=None, shared_gate="none", dropout=0.0)
    narrow = replace(config, d_model=ROUTER_WIDTH, experts=experts)
    x_TD, id_T = rng.standard_normal((len(group_T), ROUTER_WIDTH)), rng.integers(0, max(config.gating.vocabulary, 1), len(group_T))
    output, _ = moe_forward(x_TD, init_params(narrow, rng), narrow, training=True, rng=rng, token_ids=id_T, group_ids=group_T)
    return output.routing.expert, output.routing.keep


def plan(model: ModelConfig, *, tokens: Sequence[int], ranks: Sequence[int], context: int, dtype: str) -> dict[str, Any]:
    """All of it, as plain data: the parts of the model, a `Step` for each number of tokens, a `Spread` for each number of ranks."""
    parts = {name: part for name, part in model_parameters(model).items() if part.total}
    return {
        "model": model.to_dict(),
        "dtype": dtype,
        "bytes_per_weight": sizes(dtype)[0],
        "context": context,
        "parameters": parts | {"all": sum_parameters(parts)},
        "steps": [step(model, count, context=context, dtype=dtype) for count in tokens],
        "ranks": [spread(model, count, dtype=dtype) for count in ranks],
    }
