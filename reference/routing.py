"""The first seam: x_TD → logits → scores → choice → gates → drops, with the losses, forward and backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .balancing import LOSSES, LossInputs, count_load, mean_probability
from .capacity import RECYCLES, Placed, expert_capacity, keep_within_capacity, queue_order
from .choices import CHOICES, ChoiceContext, choose, choose_all, slots
from .config import MoEConfig, ScoresConfig, require
from .expert_dropout import draw_dropout
from .experts import Params
from .gating import SECOND_CHOICES, expert_scale_backward, expert_scale_forward, gates_backward, gates_forward, survivors
from .noise import LOGIT_NOISE, Noisy
from .scores import (
    INPUT_NOISE,
    INPUT_NORMS,
    SCORE_FUNCTIONS,
    logits_backward,
    logits_forward,
    residual_backward,
    residual_forward,
    softcap_forward,
)
from .soft import SlotLogitsCache, SoftMix, slot_logits_backward, slot_logits_forward, soft_mix, soft_mix_backward
from .tokens import Draws, TokenInfo


@dataclass(frozen=True)
class Routing:
    """What the router decided.

    expert      [T, K] int64, the chosen experts; K is E where a token may have any number of them (`choices.slots`)
    gate        [T, K] in fp32 or better, the weight finally multiplied; 0 where not kept
    keep        [T, K] bool, False for padding, slots without a choice, rejected second choices and drops
    load        [E] int64, assignments before the drop, without padding
    importance  [E], mean score share over the real tokens
    logits, scores  [T, E]; the logits are those without noise
    draws       the random numbers used, by name
    mix         Soft MoE's shares, of which the other fields tell the sums: gate those of combine over an expert's slots, all in keep;
                logits and scores are [T, E, C] there, scores those of dispatch. None where tokens are sent to experts
    """

    expert: np.ndarray
    gate: np.ndarray
    keep: np.ndarray
    load: np.ndarray
    importance: np.ndarray
    logits: np.ndarray
    scores: np.ndarray
    draws: dict[str, np.ndarray]
    mix: SoftMix | None = None


def check_replay(replay: Routing, tokens: TokenInfo, config: MoEConfig) -> None:
    """ValueError unless the recorded choices fit this pass."""
    expert_TK, keep_TK, count = np.asarray(replay.expert), np.asarray(replay.keep), config.experts.count
    needed = (len(tokens.real_T), slots(config.gating, count))
    require(expert_TK.shape == needed, f"replay.expert has shape {expert_TK.shape}; this pass needs {needed}")
    require(expert_TK.dtype.kind in "iu", f"replay.expert has dtype {expert_TK.dtype}; it must be integer")
    require(keep_TK.shape == needed, f"replay.keep has shape {keep_TK.shape}, replay.expert {expert_TK.shape}")
    require(keep_TK.dtype == bool, f"replay.keep has dtype {keep_TK.dtype}; it must be bool")
    low, high = expert_TK.min(initial=0), expert_TK.max(initial=0)
    require(low >= 0 and high < count, f"replay.expert has ids {low} … {high}; the layer has {count} experts")
    require(np.shape(replay.load) == (count,), f"replay.load has shape {np.shape(replay.load)}; the layer has {count} experts")
    kept_pads = np.flatnonzero(keep_TK.any(1) & ~tokens.real_T)
    require(len(kept_pads) == 0, f"replay keeps assignments of padding, in tokens {kept_pads[:5].tolist()}")


class LogitCaches(NamedTuple):
    """What the way from x to the noisy logits leaves for its backward: the function of each stage and its cache, None without one."""

    config: ScoresConfig
    noise: str
    norm: Any
    factor: np.ndarray
    linear: Any
    residual: Any
    slope: np.ndarray
    logit_noise: Any


def router_logits_forward(
    x_TD: np.ndarray, params: Params, config: ScoresConfig, draws: Draws, *, training: bool, previous_TE: np.ndarray | None = None
) -> tuple[np.ndarray, Noisy, LogitCaches]:
    """(logits [T, E], with their noise, caches): norm → input noise → linear → residual → softcap → logit noise; noise in training only."""
    input_noise, logit_noise = (config.noise, config.logit_noise) if training else ("none", "none")
    normed_TD, norm = INPUT_NORMS[config.input_norm].forward(x_TD)
    noisy_TD, factor = INPUT_NOISE[input_noise](normed_TD, config.noise_scale, draws)
    raw_TE, linear = logits_forward(noisy_TD, params["router.weight"], params.get("router.bias"))
    residual = None
    if previous_TE is not None:
        raw_TE, residual = residual_forward(raw_TE, previous_TE, params["router.residual_weight"])
    logits_TE, slope = softcap_forward(raw_TE, config.softcap)
    noise, cache = LOGIT_NOISE[logit_noise].forward(logits_TE, noisy_TD, params.get("router.noise_weight"), draws)
    return logits_TE, noise, LogitCaches(config, logit_noise, norm, factor, linear, residual, slope, cache)


def router_logits_backward(
    dlogits_TE: np.ndarray | float, dnoisy_TE: np.ndarray, ddeviation: np.ndarray | float, cache: LogitCaches
) -> tuple[np.ndarray, np.ndarray | None, Params]:
    """(dx [T, D], dprevious [T, E] or None, gradients by name) of `router_logits_forward`, from the cotangents of logits, noisy logits
    and deviation."""
    dclean_TE, dnoise_TD, dnoise_weight = LOGIT_NOISE[cache.noise].backward(dnoisy_TE, ddeviation, cache.logit_noise)
    draw_TE, dprevious_TE = (dlogits_TE + dclean_TE) * cache.slope, None
    dinput_TD, dweight, dbias = logits_backward(draw_TE, cache.linear)
    dparams = {"router.weight": dweight} | ({"router.bias": dbias} if cache.config.bias else {})
    if LOGIT_NOISE[cache.config.logit_noise].learned:
        dparams["router.noise_weight"] = np.zeros_like(dweight) if dnoise_weight is None else dnoise_weight
    if cache.config.residual:
        dparams["router.residual_weight"] = np.zeros((len(dweight), len(dweight)), dweight.dtype)
    if cache.residual is not None:
        dprevious_TE, dparams["router.residual_weight"] = residual_backward(draw_TE, cache.residual)
    dinput_TD = dinput_TD if dnoise_TD is None else dinput_TD + dnoise_TD
    return INPUT_NORMS[cache.config.input_norm].backward(dinput_TD * cache.factor, cache.norm), dprevious_TE, dparams


class RouteCache(NamedTuple):
    """What `route_backward` needs of each stage, and the losses' caches by name."""

    config: MoEConfig
    logits: LogitCaches
    scores: Any
    probability: Any
    gates: Any
    expert_scale: Any
    keep_TK: np.ndarray
    losses: dict[str, Any]


class Decision(NamedTuple):
    """All discrete results of a pass: what the router chose and which of it exists, where each went after the drop, and the load chosen."""

    chosen_TK: np.ndarray
    picked_TK: np.ndarray
    expert_TK: np.ndarray
    keep_TK: np.ndarray
    load_E: np.ndarray


def decide(scores_TE: np.ndarray, bias: np.ndarray | None, config: MoEConfig, tokens: TokenInfo, context: ChoiceContext) -> Decision:
    """The discrete half of a pass, for given scores [T, E]: choice, second choice, drop, recycling."""
    training, draws, experts = context.training, context.draws, config.experts.count
    slots = expert_capacity(config, tokens, training=training)
    chosen_TK, picked_TK = choose(scores_TE, bias, config.gating, tokens, context._replace(slots_B=slots))
    gate_TK, _ = gates_forward(scores_TE, chosen_TK, config.gating)
    wanted_TK = picked_TK & SECOND_CHOICES[config.gating.second_choice if training else "always"](gate_TK, config.gating, draws)
    order, recycled = config.capacity.order, config.capacity.recycle
    if config.capacity.formula == "none":  # nobody waits for a slot, so nobody draws lots for one
        order, recycled = "choice_major", "none"
    order_N = queue_order(gate_TK, order, draws, training=training)
    kept_TK = keep_within_capacity(chosen_TK, wanted_TK, slots, order_N, tokens)
    recycle = RECYCLES[recycled if training else "none"]
    expert_TK, keep_TK = recycle(Placed(chosen_TK, kept_TK), wanted_TK, slots, experts, tokens, draws)
    return Decision(chosen_TK, picked_TK, expert_TK, keep_TK, count_load(chosen_TK, picked_TK, experts))


def _replayed(
    replay: Routing, scores_TE: np.ndarray, bias: np.ndarray | None, config: MoEConfig, tokens: TokenInfo, context: ChoiceContext
) -> Decision:
    check_replay(replay, tokens, config)
    expert_TK, keep_TK, load_E = (np.asarray(a) for a in (replay.expert, replay.keep, replay.load))
    if config.capacity.recycle != "none":  # the record holds where a token went, not what the router had chosen for it
        return Decision(*choose(scores_TE, bias, config.gating, tokens, context), expert_TK, keep_TK, load_E)
    real_TK = np.repeat(tokens.real_T[:, None], expert_TK.shape[1], axis=1)
    return Decision(expert_TK, keep_TK if CHOICES[config.gating.choice].every_expert else real_TK, expert_TK, keep_TK, load_E)


def route_forward(
    x_TD: np.ndarray, params: Params, config: MoEConfig, tokens: TokenInfo, *,
    training: bool = False, rng: np.random.Generator | None = None, replay: Routing | None = None,
) -> tuple[Routing, dict[str, float], RouteCache]:  # fmt: skip
    """(routing, the unweighted losses by name, cache): x → logits → scores → choice → gates → drops.

    In a replay the discrete decisions (expert, keep) and the draws are those of the earlier pass; everything continuous is
    computed anew, so gradients are alive.
    """
    draws, gating = Draws(rng, None if replay is None else replay.draws), config.gating
    logits_TE, noise, logits_cache = router_logits_forward(
        x_TD, params, config.scores, draws, training=training, previous_TE=tokens.previous_TE
    )
    function = SCORE_FUNCTIONS[config.scores.function]
    scores_TE, scores_cache = function.forward(noise.noisy_TE)
    probability_TE, probability_cache = function.probability_forward(scores_TE)
    bias = params.get("router.correction_bias") if gating.correction_bias else None
    context = ChoiceContext(noise.noisy_TE, probability_TE, None, params.get("router.hash_table"), draws, training)
    if replay is None:
        chosen_TK, picked_TK, expert_TK, keep_TK, load_E = decide(scores_TE, bias, config, tokens, context)
    else:
        chosen_TK, picked_TK, expert_TK, keep_TK, load_E = _replayed(replay, scores_TE, bias, config, tokens, context)
    gate_TK, gates_cache = gates_forward(scores_TE, expert_TK, gating, survivors(keep_TK) if gating.after_drop else None)
    scale_cache = None
    if gating.expert_scale:
        gate_TK, scale_cache = expert_scale_forward(gate_TK, expert_TK, params["router.expert_scale"])
    sizes = (gating.top_k, gating.groups, gating.top_groups, config.experts.networks, config.experts.network_share)
    inputs = LossInputs(logits_TE, scores_TE, probability_TE, chosen_TK, picked_TK, tokens, gate_TK, noise, *sizes)
    results = {name: LOSSES[name].forward(inputs) for name, _ in config.balance.losses} if training else {}
    importance_E = mean_probability(probability_TE, tokens)
    gate_TK, taken = np.where(keep_TK, gate_TK, 0), draw_dropout(expert_TK, config.experts, draws, training=training)
    routing = Routing(expert_TK, gate_TK, keep_TK, load_E, importance_E, logits_TE, scores_TE, taken)
    caches = (logits_cache, scores_cache, probability_cache, gates_cache, scale_cache)
    cache = RouteCache(config, *caches, keep_TK, {name: inner for name, (_, inner) in results.items()})
    return routing, {name: float(value) for name, (value, _) in results.items()}, cache


def route_backward(
    dgate_TK: np.ndarray, dlosses: Mapping[str, float], cache: RouteCache, dlogits_TE: np.ndarray | float = 0.0
) -> tuple[np.ndarray, np.ndarray | None, Params]:
    """(dx [T, D], dprevious [T, E] or None, gradients by name) from the cotangents of the gates, of each unweighted loss and of the logits.

    None: the pass was given no logits of the layer before.
    """
    function = SCORE_FUNCTIONS[cache.config.scores.function]
    cotangents: dict[str, Any] = {}
    for name, dloss in dlosses.items():
        for target, value in LOSSES[name].backward(dloss, cache.losses[name]).items():
            cotangents[target] = cotangents.get(target, 0) + value
    dparams: Params = {}
    dgate_TK = np.where(cache.keep_TK, dgate_TK, 0) + cotangents.get("gate", 0)
    if cache.expert_scale is not None:
        dgate_TK, dparams["router.expert_scale"] = expert_scale_backward(dgate_TK, cache.expert_scale)
    dscores_TE = gates_backward(dgate_TK, cache.gates) + cotangents.get("scores", 0)
    if "probability" in cotangents:
        dscores_TE = dscores_TE + function.probability_backward(cotangents["probability"], cache.probability)
    dnoisy_TE = function.backward(dscores_TE, cache.scores) + cotangents.get("noisy", 0)
    dlogits_TE = dlogits_TE + cotangents.get("logits", 0)
    dx_TD, dprevious_TE, drouter = router_logits_backward(dlogits_TE, dnoisy_TE, cotangents.get("deviation", 0), cache.logits)
    return dx_TD, dprevious_TE, drouter | dparams


class SoftRouteCache(NamedTuple):
    """What `soft_route_backward` needs; no losses, there is nothing to balance."""

    logits: SlotLogitsCache
    mix: SoftMix
    losses: dict[str, Any]


def soft_route_forward(
    x_TD: np.ndarray, params: Params, config: MoEConfig, tokens: TokenInfo, *,
    training: bool = False, rng: np.random.Generator | None = None, replay: Routing | None = None,
) -> tuple[Routing, dict[str, float], SoftRouteCache]:  # fmt: skip
    """`route_forward` where nothing is chosen: logits → shares. Neither noise nor a decision is there to be replayed."""
    if replay is not None:
        check_replay(replay, tokens, config)
    logits_TEC, logits_cache = slot_logits_forward(x_TD, params)
    mix = soft_mix(logits_TEC, tokens)
    gate_TE = mix.combine.sum(2)
    expert_TE, keep_TE = choose_all(gate_TE, config.gating, tokens, ChoiceContext())
    load_E, importance_E = count_load(expert_TE, keep_TE, config.experts.count), mean_probability(gate_TE, tokens)
    routing = Routing(expert_TE, gate_TE, keep_TE, load_E, importance_E, logits_TEC, mix.dispatch, {}, mix)
    return routing, {}, SoftRouteCache(logits_cache, mix, {})


def soft_route_backward(
    dmix: SoftMix, dlosses: Mapping[str, float], cache: SoftRouteCache, dlogits_TEC: np.ndarray | float = 0.0
) -> tuple[np.ndarray, None, Params]:
    """(dx [T, D], None, gradients by name) from the cotangents of dispatch, combine and the logits."""
    dx_TD, dparams = slot_logits_backward(soft_mix_backward(dmix, cache.mix) + dlogits_TEC, cache.logits)
    return dx_TD, None, dparams
