"""The whole layer: route → apply_experts → + shared experts, forward and backward, driven by `MoEConfig`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .balancing import BIAS_RULES, LOSSES, LossInputs, count_load, mean_probability
from .capacity import group_capacity, keep_within_capacity
from .config import MoEConfig, require
from .dispatch import combine_backward, combine_forward, dispatch_backward, dispatch_forward
from .experts import ACTIVATIONS, Params, experts_backward, experts_forward, first_matrix, shared_backward, shared_forward
from .gating import SECOND_CHOICES, choose, gates_backward, gates_forward
from .scores import INPUT_NOISE, SCORE_FUNCTIONS, logits_backward, logits_forward
from .tokens import Draws, TokenInfo, token_info

BUFFERS = frozenset({"router.correction_bias"})  # saved with the parameters, moved by rules instead of gradients


@dataclass(frozen=True)
class Routing:
    """What the router decided.

    expert      [T, K] int64, the chosen experts
    gate        [T, K] in fp32 or better, the weight finally multiplied; 0 where not kept
    keep        [T, K] bool, False for padding, rejected second choices and drops
    load        [E] int64, assignments before the drop, without padding
    importance  [E], mean score share over the real tokens
    logits, scores  [T, E]
    draws       the random numbers used, by name
    """

    expert: np.ndarray
    gate: np.ndarray
    keep: np.ndarray
    load: np.ndarray
    importance: np.ndarray
    logits: np.ndarray
    scores: np.ndarray
    draws: dict[str, np.ndarray]


@dataclass(frozen=True)
class MoEOutput:
    """y [T, D]; loss, the losses weighted by config.balance (0 in evaluation); losses by name, unweighted (empty in evaluation)."""

    y: np.ndarray
    loss: float
    losses: dict[str, float]
    routing: Routing


def parameter_shapes(config: MoEConfig) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the layer's arrays, buffers included: the keys of `MoE(config).state_dict()`."""
    width, experts = config.d_model, config.experts
    rows = 2 if ACTIVATIONS[experts.activation].gated else 1
    shapes: dict[str, tuple[int, ...]] = {"router.weight": (experts.count, width)}
    if config.scores.bias:
        shapes["router.bias"] = (experts.count,)
    if config.gating.correction_bias:
        shapes["router.correction_bias"] = (experts.count,)
    for prefix, stack, hidden in (("experts", (experts.count,), experts.width), ("shared", (), experts.total_shared_width)):
        if hidden:
            up, down = f"{prefix}.{first_matrix(experts)}", f"{prefix}.down_proj"
            shapes |= {up: (*stack, rows * hidden, width), down: (*stack, width, hidden)}
            if experts.bias:
                shapes |= {f"{up}_bias": (*stack, rows * hidden), f"{down}_bias": (*stack, width)}
    return shapes


def init_params(config: MoEConfig, rng: np.random.Generator, dtype: Any = np.float64) -> Params:
    """Fresh parameters by name: matrices from N(0, 1/fan-in), biases and the fp32 correction bias 0.

    Every expert is drawn anew: experts that start as copies of each other receive equal gradients and stay copies.
    """
    params: Params = {}
    for name, shape in parameter_shapes(config).items():
        if name.endswith("bias"):
            params[name] = np.zeros(shape, np.float32 if name in BUFFERS else dtype)
        else:
            params[name] = (rng.standard_normal(shape) / np.sqrt(shape[-1])).astype(dtype)
    return params


def check_params(params: Mapping[str, np.ndarray], config: MoEConfig) -> None:
    """ValueError where a parameter is missing, has another shape, or holds NaN or infinity."""
    for name, shape in parameter_shapes(config).items():
        require(name in params, f"params has no {name!r}; this config needs {', '.join(parameter_shapes(config))}")
        require(params[name].shape == shape, f"{name} has shape {params[name].shape}; this config needs {shape}")
        require(bool(np.isfinite(params[name]).all()), f"{name} holds NaN or infinity")


def check_input(x_TD: np.ndarray, config: MoEConfig) -> None:
    """ValueError unless x is a finite [T, d_model] array of floats."""
    require(isinstance(x_TD, np.ndarray) and x_TD.dtype.kind == "f", f"x must be a float array, got {getattr(x_TD, 'dtype', type(x_TD))}")
    require(x_TD.ndim == 2 and x_TD.shape[1] == config.d_model, f"x has shape {x_TD.shape}; it must be (T, {config.d_model})")
    broken = np.flatnonzero(~np.isfinite(x_TD).all(1))
    require(len(broken) == 0, f"x holds NaN or infinity, in tokens {broken[:5].tolist()}")


def check_replay(replay: Routing, tokens: TokenInfo, config: MoEConfig) -> None:
    """ValueError unless the recorded choices fit this pass."""
    expert_TK, keep_TK, count = np.asarray(replay.expert), np.asarray(replay.keep), config.experts.count
    needed = (len(tokens.real_T), config.gating.top_k)
    require(expert_TK.shape == needed, f"replay.expert has shape {expert_TK.shape}; this pass needs {needed}")
    require(expert_TK.dtype.kind in "iu", f"replay.expert has dtype {expert_TK.dtype}; it must be integer")
    require(keep_TK.shape == needed, f"replay.keep has shape {keep_TK.shape}, replay.expert {expert_TK.shape}")
    require(keep_TK.dtype == bool, f"replay.keep has dtype {keep_TK.dtype}; it must be bool")
    low, high = expert_TK.min(initial=0), expert_TK.max(initial=0)
    require(low >= 0 and high < count, f"replay.expert has ids {low} … {high}; the layer has {count} experts")
    require(np.shape(replay.load) == (count,), f"replay.load has shape {np.shape(replay.load)}; the layer has {count} experts")
    kept_pads = np.flatnonzero(keep_TK.any(1) & ~tokens.real_T)
    require(len(kept_pads) == 0, f"replay keeps assignments of padding, in tokens {kept_pads[:5].tolist()}")


class RouteCache(NamedTuple):
    """What `route_backward` needs of each stage, and the losses' caches by name."""

    config: MoEConfig
    noise_factor: np.ndarray
    logits: Any
    scores: Any
    probability: Any
    gates: Any
    keep_TK: np.ndarray
    losses: dict[str, Any]


def _decide(
    scores_TE: np.ndarray, correction_bias: np.ndarray | None, config: MoEConfig, tokens: TokenInfo, draws: Draws, *, training: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All discrete decisions of a pass: (expert [T, K], picked before the drop [T, K], kept after it [T, K])."""
    expert_TK, picked_TK = choose(scores_TE, correction_bias, config.gating, tokens)
    gate_TK, _ = gates_forward(scores_TE, expert_TK, config.gating)
    rule = config.gating.second_choice if training else "always"
    wanted_TK = picked_TK & SECOND_CHOICES[rule](gate_TK, draws)
    capacity = group_capacity(config.capacity, config.gating.top_k, config.experts.count, tokens, training=training)
    return expert_TK, picked_TK, keep_within_capacity(expert_TK, gate_TK, wanted_TK, capacity, config.capacity.order, tokens)


def route_forward(
    x_TD: np.ndarray, params: Params, config: MoEConfig, tokens: TokenInfo, *,
    training: bool = False, rng: np.random.Generator | None = None, replay: Routing | None = None,
) -> tuple[Routing, dict[str, float], RouteCache]:  # fmt: skip
    """(routing, the unweighted losses by name, cache): x → logits → scores → choice → gates → drops.

    In a replay the discrete decisions (expert, keep) and the draws are those of the earlier pass; everything continuous is
    computed anew, so gradients are alive.
    """
    draws = Draws(rng, None if replay is None else replay.draws)
    noise = config.scores.noise if training else "none"
    noisy_TD, noise_factor = INPUT_NOISE[noise](x_TD, config.scores.noise_scale, draws)
    logits_TE, logits_cache = logits_forward(noisy_TD, params["router.weight"], params.get("router.bias"))
    function = SCORE_FUNCTIONS[config.scores.function]
    scores_TE, scores_cache = function.forward(logits_TE)
    probability_TE, probability_cache = function.probability_forward(scores_TE)
    if replay is None:
        bias = params.get("router.correction_bias") if config.gating.correction_bias else None
        expert_TK, picked_TK, keep_TK = _decide(scores_TE, bias, config, tokens, draws, training=training)
        load_E = count_load(expert_TK, picked_TK, config.experts.count)
    else:
        check_replay(replay, tokens, config)
        expert_TK, keep_TK, load_E = (np.asarray(a) for a in (replay.expert, replay.keep, replay.load))
        picked_TK = np.repeat(tokens.real_T[:, None], expert_TK.shape[1], axis=1)
    gate_TK, gates_cache = gates_forward(scores_TE, expert_TK, config.gating)
    inputs = LossInputs(logits_TE, scores_TE, probability_TE, expert_TK, picked_TK, tokens)
    results = {name: LOSSES[name].forward(inputs) for name, _ in config.balance.losses} if training else {}
    routing = Routing(
        expert_TK,
        np.where(keep_TK, gate_TK, 0),
        keep_TK,
        load_E,
        mean_probability(probability_TE, tokens),
        logits_TE,
        scores_TE,
        draws.taken,
    )
    cache = RouteCache(
        config, noise_factor, logits_cache, scores_cache, probability_cache, gates_cache, keep_TK, {n: c for n, (_, c) in results.items()}
    )
    return routing, {name: float(value) for name, (value, _) in results.items()}, cache


def route(
    x_TD: np.ndarray, params: Params, config: MoEConfig, *,
    training: bool = False, rng: np.random.Generator | None = None, token_ids: np.ndarray | None = None,
    group_ids: np.ndarray | None = None, pad_mask: np.ndarray | None = None, replay: Routing | None = None,
) -> Routing:  # fmt: skip
    """The first seam: which experts every token goes to, and with what gates. Arguments as in `moe_forward`."""
    check_input(x_TD, config)
    check_params(params, config)
    tokens = token_info(len(x_TD), token_ids, group_ids, pad_mask)
    return route_forward(x_TD, params, config, tokens, training=training, rng=rng, replay=replay)[0]


def route_backward(dgate_TK: np.ndarray, dlosses: Mapping[str, float], cache: RouteCache) -> tuple[np.ndarray, Params]:
    """(dx [T, D], gradients by name) from the cotangents of the gates and of each unweighted loss."""
    function = SCORE_FUNCTIONS[cache.config.scores.function]
    dscores_TE = gates_backward(np.where(cache.keep_TK, dgate_TK, 0), cache.gates)
    cotangents = {"logits": np.zeros_like(dscores_TE), "probability": np.zeros_like(dscores_TE)}
    for name, dloss in dlosses.items():
        for target, value in LOSSES[name].backward(dloss, cache.losses[name]).items():
            cotangents[target] = cotangents[target] + value
    dscores_TE = dscores_TE + function.probability_backward(cotangents["probability"], cache.probability)
    dlogits_TE = function.backward(dscores_TE, cache.scores) + cotangents["logits"]
    dnoisy_TD, dweight, dbias = logits_backward(dlogits_TE, cache.logits)
    dparams = {"router.weight": dweight} | ({"router.bias": dbias} if cache.config.scores.bias else {})
    return dnoisy_TD * cache.noise_factor, dparams


class ApplyCache(NamedTuple):
    """Caches of dispatch, experts and combine."""

    dispatch: Any
    experts: Any
    combine: Any


def apply_experts_forward(x_TD: np.ndarray, routing: Routing, params: Params, config: MoEConfig) -> tuple[np.ndarray, ApplyCache]:
    """Dispatch, routed experts, combine, for a given routing: (y [T, D], cache)."""
    rows_ND, dispatch = dispatch_forward(x_TD, routing.expert, routing.keep, config.experts.count)
    out_ND, experts = experts_forward(rows_ND, dispatch.bounds_P, params, config.experts)
    y_TD, combine = combine_forward(out_ND, routing.gate, dispatch)
    return y_TD.astype(x_TD.dtype, copy=False), ApplyCache(dispatch, experts, combine)


def apply_experts(x_TD: np.ndarray, routing: Routing, params: Params, config: MoEConfig) -> np.ndarray:
    """The second seam: y [T, D] of the routed experts for a given routing (no shared experts)."""
    return apply_experts_forward(x_TD, routing, params, config)[0]


def apply_experts_backward(dy_TD: np.ndarray, cache: ApplyCache) -> tuple[np.ndarray, np.ndarray, Params]:
    """(dx [T, D], dgate [T, K], gradients by name) of `apply_experts_forward`."""
    dout_ND, dgate_TK = combine_backward(dy_TD, cache.combine)
    drows_ND, dparams = experts_backward(dout_ND, cache.experts)
    return dispatch_backward(drows_ND, cache.dispatch), dgate_TK, dparams


class LayerCache(NamedTuple):
    """What `moe_backward` needs; shared is None without shared experts."""

    params: Params
    config: MoEConfig
    tokens: TokenInfo
    route: RouteCache
    apply: ApplyCache
    shared: Any


def moe_forward(
    x_TD: np.ndarray, params: Params, config: MoEConfig, *,
    training: bool = False, rng: np.random.Generator | None = None, token_ids: np.ndarray | None = None,
    group_ids: np.ndarray | None = None, pad_mask: np.ndarray | None = None, replay: Routing | None = None,
) -> tuple[MoEOutput, LayerCache]:  # fmt: skip
    """A Mixture-of-Experts layer (moe): y_t = Σ_k g_tk FFN_{e_tk}(x_t) + FFN_shared(x_t).

    Shapes: x [T, D]; token_ids, group_ids [T] int; pad_mask [T] bool, True for padding, whose y is 0.
    training switches noise, random second choices, the training capacity and the losses on; rng is needed where something is drawn.
    replay: an earlier routing, whose decisions and draws are used again.
    Returns: (output, cache for `moe_backward`).
    Raises: ValueError for a wrong shape or dtype, NaN or infinity in x or params, or a replay that does not fit.
    """
    check_input(x_TD, config)
    check_params(params, config)
    tokens = token_info(len(x_TD), token_ids, group_ids, pad_mask)
    routing, losses, route_cache = route_forward(x_TD, params, config, tokens, training=training, rng=rng, replay=replay)
    y_TD, apply_cache = apply_experts_forward(x_TD, routing, params, config)
    shared_cache = None
    if config.experts.shared:
        shared_TD, shared_cache = shared_forward(x_TD, params, config.experts)
        y_TD = y_TD + shared_TD * tokens.real_T[:, None]
    loss = float(sum(weight * losses[name] for name, weight in config.balance.losses)) if training else 0.0
    return MoEOutput(y_TD, loss, losses, routing), LayerCache(params, config, tokens, route_cache, apply_cache, shared_cache)


def _loss_cotangents(dloss: float | Mapping[str, float], cache: LayerCache) -> dict[str, float]:
    computed = cache.route.losses
    if not isinstance(dloss, Mapping):
        return {name: dloss * weight for name, weight in cache.config.balance.losses if name in computed}
    for name in dloss:
        require(
            name in computed, f"dloss names the loss {name!r}; this pass computed {', '.join(computed) or 'none (it was an evaluation)'}"
        )
    return dict(dloss)


def moe_backward(dy_TD: np.ndarray, cache: LayerCache, dloss: float | Mapping[str, float] = 1.0) -> tuple[np.ndarray, Params]:
    """(dx [T, D], gradients by parameter name) of `moe_forward`; buffers have none.

    dy is the cotangent of output.y; dloss that of output.loss, or a mapping from loss name to the cotangent of the unweighted loss.
    """
    expected = (len(cache.tokens.real_T), cache.config.d_model)
    require(dy_TD.shape == expected, f"dy has shape {dy_TD.shape}; y has {expected}")
    dx_TD, dgate_TK, dparams = apply_experts_backward(dy_TD, cache.apply)
    drouter_TD, drouter = route_backward(dgate_TK, _loss_cotangents(dloss, cache), cache.route)
    dx_TD, dparams = dx_TD + drouter_TD, dparams | drouter
    if cache.config.experts.shared:
        dreal_TD = dy_TD * cache.tokens.real_T[:, None]
        dshared_TD, dshared = shared_backward(dreal_TD, cache.shared, cache.params, cache.config.experts)
        dx_TD, dparams = dx_TD + dshared_TD, dparams | dshared
    return dx_TD, dparams


def update_bias(correction_bias: np.ndarray, load_E: np.ndarray, config: MoEConfig) -> np.ndarray:
    """The correction bias [E] after one optimizer step, by config.balance's rule; load [E] summed over micro-batches and ranks."""
    require(load_E.shape == correction_bias.shape, f"load has shape {load_E.shape}; the bias has {correction_bias.shape}")
    return BIAS_RULES[config.balance.bias_rule](correction_bias, load_E, config.balance.bias_rate)
