"""What is inside a trained model: how its routers share held-out text out among the experts, and how sure they are of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from reference.autograd.transformer import LanguageModel
from reference.balancing import coefficient_of_variation, dead_experts, max_violation
from reference.routing import Routing


class LayerFacts(NamedTuple):
    """One MoE layer on held-out text.

    max_violation, variation, dead   of the load
    strongest                        the largest gate's share of the sum of a token's gates, the mean over tokens; 1/K where all weigh alike
    dropped                          share of the chosen assignments that found their expert full
    bias_low, bias_high              of the correction biases; None where the layer has none
    """

    max_violation: float
    variation: float
    dead: int
    strongest: float
    dropped: float
    bias_low: float | None
    bias_high: float | None


def layer_facts(model: LanguageModel, routings: Mapping[int, Routing]) -> dict[int, LayerFacts]:
    """MoE layer → its facts, from the model's `tour.heldout_routings`."""
    layers = model.moe_layers()
    return {number: _facts(routing, _bias(layers[number])) for number, routing in routings.items()}


def _bias(layer: torch.nn.Module) -> np.ndarray | None:
    bias = layer.state_dict().get("router.correction_bias")
    return None if bias is None else bias.double().numpy()


def _facts(routing: Routing, bias_E: np.ndarray | None) -> LayerFacts:
    load_E, sum_T = routing.load, routing.gate.sum(1)
    chosen, kept, weighed_T = int(load_E.sum()), int(routing.keep.sum()), sum_T > 0
    return LayerFacts(
        max_violation(load_E),
        coefficient_of_variation(load_E),
        dead_experts(load_E),
        float((routing.gate.max(1)[weighed_T] / sum_T[weighed_T]).mean()) if weighed_T.any() else 0.0,
        1 - kept / chosen if chosen else 0.0,
        None if bias_E is None else float(bias_E.min()),
        None if bias_E is None else float(bias_E.max()),
    )
