"""The whole layer: route → apply_experts → + shared experts, forward and backward, driven by `MoEConfig`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .balancing import BIAS_RULES
from .choices import CHOICES
from .config import MoEConfig, require
from .dispatch import combine_backward, combine_forward, dispatch_backward, dispatch_forward, gate_rows_backward, gate_rows_forward
from .expert_dropout import dropout_factors
from .experts import Params, experts_backward, experts_forward
from .parameters import BUFFERS, check_input, check_params, check_previous, init_params, parameter_shapes
from .penalty import loss_weights, update_penalty
from .routing import Routing, check_replay, route_backward, route_forward, soft_route_backward, soft_route_forward
from .shared import add_shared_backward, add_shared_forward
from .soft import SoftCache, mix_backward, mix_forward
from .tokens import TokenInfo, token_info

__all__ = [
    "BUFFERS", "LayerCache", "MoEOutput", "Params", "Routing", "apply_experts", "apply_experts_backward", "apply_experts_forward",
    "chained_backward", "check_input", "check_params", "check_previous", "check_replay", "init_params", "moe_backward", "moe_forward",
    "parameter_shapes", "route", "route_backward", "route_forward", "update_bias", "update_penalty",
]  # fmt: skip


@dataclass(frozen=True)
class MoEOutput:
    """What a layer says of its tokens.

    y         [T, D]
    loss      the losses weighted by config.balance; 0 in evaluation
    losses    by name, unweighted; empty in evaluation
    routing   what the router decided
    """

    y: np.ndarray
    loss: float
    losses: dict[str, float]
    routing: Routing


class ApplyCache(NamedTuple):
    """Caches of dispatch, gates on inputs (None: the gates are on outputs), experts and combine."""

    dispatch: Any
    gated: Any
    experts: Any
    combine: Any


def apply_experts_forward(x_TD: np.ndarray, routing: Routing, params: Params, config: MoEConfig) -> tuple[np.ndarray, ApplyCache]:
    """Dispatch, routed experts, combine, for a given routing: (y [T, D], cache)."""
    rows_ND, dispatch = dispatch_forward(x_TD, routing.expert, routing.keep, config.experts.count)
    gate_TK, gated = routing.gate, None
    if config.experts.gate_inputs:
        rows_ND, gated = gate_rows_forward(rows_ND, gate_TK, dispatch)
        gate_TK = np.ones_like(gate_TK)
    factor = dropout_factors(routing.draws, dispatch, config.experts, rows_ND.dtype)
    out_ND, experts = experts_forward(rows_ND, dispatch.bounds_P, params, config.experts, factor)
    y_TD, combine = combine_forward(out_ND, gate_TK, dispatch)
    return y_TD.astype(x_TD.dtype, copy=False), ApplyCache(dispatch, gated, experts, combine)


def apply_experts(x_TD: np.ndarray, routing: Routing, params: Params, config: MoEConfig) -> np.ndarray:
    """The second seam: y [T, D] of the routed experts for a given routing (no shared experts)."""
    return _seams(config).apply(x_TD, routing, params, config)[0]


def apply_experts_backward(dy_TD: np.ndarray, cache: ApplyCache) -> tuple[np.ndarray, np.ndarray, Params]:
    """(dx [T, D], dgate [T, K], gradients by name) of `apply_experts_forward`."""
    dout_ND, dgate_TK = combine_backward(dy_TD, cache.combine)
    drows_ND, dparams = experts_backward(dout_ND, cache.experts)
    if cache.gated is not None:
        drows_ND, dgate_TK = gate_rows_backward(drows_ND, cache.gated)
    return dispatch_backward(drows_ND, cache.dispatch), dgate_TK, dparams


def apply_soft_forward(x_TD: np.ndarray, routing: Routing, params: Params, config: MoEConfig) -> tuple[np.ndarray, SoftCache]:
    """`mix_forward` for a given routing; ValueError where it has no mix."""
    require(routing.mix is not None, "gating.choice is 'soft', but routing.mix is None: it was recorded by another router")
    return mix_forward(x_TD, routing.mix, params, config)  # type: ignore[arg-type]


class Seams(NamedTuple):
    """Both seams of a layer, forward and backward; what `apply_backward` returns in its second place is what `route_backward` takes."""

    route: Callable[..., Any]
    route_backward: Callable[..., tuple[np.ndarray, np.ndarray | None, Params]]
    apply: Callable[..., tuple[np.ndarray, Any]]
    apply_backward: Callable[..., tuple[np.ndarray, Any, Params]]


SEAMS: dict[bool, Seams] = {
    False: Seams(route_forward, route_backward, apply_experts_forward, apply_experts_backward),
    True: Seams(soft_route_forward, soft_route_backward, apply_soft_forward, mix_backward),
}
"""By whether the router mixes tokens instead of sending them (`Choice.mixes`)."""


def _seams(config: MoEConfig) -> Seams:
    return SEAMS[CHOICES[config.gating.choice].mixes]


def route(
    x_TD: np.ndarray, params: Params, config: MoEConfig, *,
    training: bool = False, rng: np.random.Generator | None = None, token_ids: np.ndarray | None = None,
    group_ids: np.ndarray | None = None, pad_mask: np.ndarray | None = None, replay: Routing | None = None,
    previous_logits: np.ndarray | None = None,
) -> Routing:  # fmt: skip
    """The first seam: which experts every token goes to, and with what gates. Arguments as in `moe_forward`."""
    check_input(x_TD, config)
    check_params(params, config)
    check_previous(previous_logits, len(x_TD), config)
    tokens = token_info(len(x_TD), token_ids, group_ids, pad_mask, previous_logits)
    return _seams(config).route(x_TD, params, config, tokens, training=training, rng=rng, replay=replay)[0]


class LayerCache(NamedTuple):
    """What `moe_backward` needs; shared is None without shared experts."""

    params: Params
    config: MoEConfig
    tokens: TokenInfo
    route: Any
    apply: Any
    shared: Any


def moe_forward(
    x_TD: np.ndarray, params: Params, config: MoEConfig, *,
    training: bool = False, rng: np.random.Generator | None = None, token_ids: np.ndarray | None = None,
    group_ids: np.ndarray | None = None, pad_mask: np.ndarray | None = None, replay: Routing | None = None,
    previous_logits: np.ndarray | None = None,
) -> tuple[MoEOutput, LayerCache]:  # fmt: skip
    """A Mixture-of-Experts layer (moe): y_t = Σ_k g_tk FFN_{e_tk}(x_t) + FFN_shared(x_t).

    Shapes: x [T, D]; token_ids, group_ids [T] int (without: one group); pad_mask [T] bool, True for padding, whose y is 0.
    training switches noise, random second choices, the training capacity and the losses on; rng is needed where something is drawn.
    replay: an earlier routing, whose decisions and draws are used again.
    previous_logits: [T, E], the `routing.logits` of the MoE layer before, for a config with scores.residual; without them, as in the
    first layer, the term is absent.
    Returns: (output, cache for `moe_backward`).
    Raises: ValueError for a wrong shape or dtype, NaN or infinity in x or params, or a replay that does not fit.
    """
    check_input(x_TD, config)
    check_params(params, config)
    check_previous(previous_logits, len(x_TD), config)
    tokens = token_info(len(x_TD), token_ids, group_ids, pad_mask, previous_logits)
    routing, losses, route_cache = _seams(config).route(x_TD, params, config, tokens, training=training, rng=rng, replay=replay)
    y_TD, apply_cache = _seams(config).apply(x_TD, routing, params, config)
    shared_cache = None
    if config.experts.shared:
        y_TD, shared_cache = add_shared_forward(x_TD, y_TD, tokens.real_T, params, config.experts)
    weights = loss_weights(config, params.get("router.penalty"))
    loss = float(sum(weights[name] * value for name, value in losses.items()))
    return MoEOutput(y_TD, loss, losses, routing), LayerCache(params, config, tokens, route_cache, apply_cache, shared_cache)


def _loss_cotangents(dloss: float | Mapping[str, float], cache: LayerCache) -> dict[str, float]:
    computed = cache.route.losses
    if not isinstance(dloss, Mapping):
        weights = loss_weights(cache.config, cache.params.get("router.penalty"))
        return {name: dloss * weight for name, weight in weights.items() if name in computed}
    for name in dloss:
        require(
            name in computed, f"dloss names the loss {name!r}; this pass computed {', '.join(computed) or 'none (it was an evaluation)'}"
        )
    return dict(dloss)


def moe_backward(dy_TD: np.ndarray, cache: LayerCache, dloss: float | Mapping[str, float] = 1.0) -> tuple[np.ndarray, Params]:
    """(dx [T, D], gradients by parameter name) of `moe_forward`; buffers have none.

    dy is the cotangent of output.y; dloss that of output.loss, or a mapping from loss name to the cotangent of the unweighted loss.
    """
    dx_TD, _, dparams = chained_backward(dy_TD, cache, dloss)
    return dx_TD, dparams


def chained_backward(
    dy_TD: np.ndarray, cache: LayerCache, dloss: float | Mapping[str, float] = 1.0, dlogits: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray | None, Params]:
    """`moe_backward` of a layer in a chain of routers: (dx [T, D], dprevious [T, E], gradients by parameter name).

    dlogits is the cotangent of output.routing.logits: the dprevious of the layer after it, None after the last. dprevious is None where
    the pass was given no previous_logits. Raises: ValueError for a wrong shape.
    """
    expected = (len(cache.tokens.real_T), cache.config.d_model)
    require(dy_TD.shape == expected, f"dy has shape {dy_TD.shape}; y has {expected}")
    logits = (expected[0], *cache.params["router.weight"].shape[:-1])
    behind: np.ndarray | float = 0.0 if dlogits is None else dlogits
    require(dlogits is None or dlogits.shape == logits, f"dlogits has shape {np.shape(behind)}; the logits have {logits}")
    dshared_TD, dshared = np.zeros_like(dy_TD), {}
    if cache.shared is not None:
        dshared_TD, dy_TD, dshared = add_shared_backward(dy_TD, cache.shared, cache.params, cache.config.experts)
    seams = _seams(cache.config)
    dx_TD, dgate, dparams = seams.apply_backward(dy_TD, cache.apply)
    drouter_TD, dprevious_TE, drouter = seams.route_backward(dgate, _loss_cotangents(dloss, cache), cache.route, behind)
    return dx_TD + drouter_TD + dshared_TD, dprevious_TE, dparams | drouter | dshared


def update_bias(correction_bias: np.ndarray, load_E: np.ndarray, config: MoEConfig) -> np.ndarray:
    """The correction bias [E] after one optimizer step, by config.balance's rule; load [E] summed over micro-batches and ranks.

    The biases of zero-computation experts stay: those of the networks decide how often these are passed over.
    Source: LongCat-Flash technical report (Meituan 2025), §2.1.1.
    """
    require(load_E.shape == correction_bias.shape, f"load has shape {load_E.shape}; the bias has {correction_bias.shape}")
    moved = BIAS_RULES[config.balance.bias_rule](correction_bias, load_E, config.balance.bias_rate)
    return np.where(np.arange(len(moved)) < config.experts.networks, moved, correction_bias)
