"""The whole layer in PyTorch: `route` and `apply_experts` on plain dicts of tensors, and `MoE`, the module around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..choices import CHOICES as NUMPY_CHOICES
from ..choices import slots
from ..config import MoEConfig, ScoresConfig, require
from ..parameters import BUFFERS, STARTS, parameter_shapes
from .balancing import BIAS_RULES, LOSSES, LossInputs, count_load, mean_probability
from .capacity import Placed, expert_capacity, keep_within_capacity, queue_order, recycle
from .choices import ChoiceContext, choose, choose_all
from .dispatch import combine_forward, dispatch_forward, gate_rows_forward
from .expert_dropout import draw_dropout, dropout_factors
from .experts import Params, Shared, experts_forward, weighed_shared
from .gating import SECOND_CHOICES, expert_scale_forward, gates_forward, survivors
from .noise import LOGIT_NOISE, Noisy
from .scores import INPUT_NOISE, INPUT_NORMS, SCORE_FUNCTIONS, logits_forward, residual_forward, softcap_forward
from .soft import SoftMix, mix_forward, slot_logits_forward, soft_mix
from .tokens import Draws, TokenInfo, checks_values, token_info, without_autocast

BUFFER_DTYPES = {np.float32: torch.float32, np.int64: torch.int64}
DRAWN = frozenset({"router.hash_table"})  # the one exception that a generator must be asked for


class Routing(NamedTuple):
    """What the router decided: the fields of `reference.Routing` as tensors. gate, logits and scores carry gradients."""

    expert: Tensor
    gate: Tensor
    keep: Tensor
    load: Tensor
    importance: Tensor
    logits: Tensor
    scores: Tensor
    draws: dict[str, Tensor]
    mix: SoftMix | None = None


class Aux(NamedTuple):
    """What a layer says beside y.

    loss      the losses weighted by config.balance; 0 in evaluation
    losses    by name, unweighted; empty in evaluation
    routing   what the router decided
    """

    loss: Tensor
    losses: dict[str, Tensor]
    routing: Routing


def check_input(x: Tensor, config: MoEConfig) -> None:
    """ValueError unless x is a float tensor of at least two dimensions, the last d_model; under MOEBIUS_CHECK=1 also finite."""
    require(isinstance(x, Tensor) and x.is_floating_point(), f"x must be a float tensor, got {getattr(x, 'dtype', type(x).__name__)}")
    require(x.ndim >= 2 and x.shape[-1] == config.d_model, f"x has shape {tuple(x.shape)}; it must be (…, S, {config.d_model})")
    if checks_values():
        broken = (~x.detach().isfinite()).flatten(0, -2).any(1).nonzero().flatten()
        require(len(broken) == 0, f"x holds NaN or infinity, in tokens {broken[:5].tolist()}")


def check_params(x: Tensor, params: Params, config: MoEConfig, parts: tuple[str, ...]) -> None:
    """ValueError where a parameter of these parts ("router", "experts", "shared") is missing or has another shape or dtype.

    The dtype must be that of x, except under autocast and for the buffers. Under MOEBIUS_CHECK=1 the values must be finite.
    """
    free = torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)
    for name, shape in parameter_shapes(config).items():
        if name.split(".")[0] in parts:
            require(name in params, f"params has no {name!r}; this config needs {', '.join(parameter_shapes(config))}")
            tensor = params[name]
            require(tuple(tensor.shape) == shape, f"{name} has shape {tuple(tensor.shape)}; this config needs {shape}")
            fits = free or name in BUFFERS or tensor.dtype == x.dtype
            require(fits, f"{name} has dtype {tensor.dtype} but x has {x.dtype}; convert one of them, or use autocast")
            if checks_values():
                require(bool(tensor.detach().isfinite().all()), f"{name} holds NaN or infinity")


def check_previous(previous: Any, tokens: int, config: MoEConfig) -> None:
    """ValueError unless the logits of the layer before are absent or a float [T, E] that the config reads; under MOEBIUS_CHECK=1 finite."""
    if previous is None:
        return
    needed = (tokens, config.experts.count)
    require(config.scores.residual, "previous_logits are given, but scores.residual is False: this router does not read them")
    kind = getattr(previous, "dtype", type(previous).__name__)
    require(isinstance(previous, Tensor) and previous.is_floating_point(), f"previous_logits must be a float tensor, got {kind}")
    require(tuple(previous.shape) == needed, f"previous_logits has shape {tuple(previous.shape)}; this layer needs {needed}")
    if checks_values():
        broken = (~previous.detach().isfinite()).any(1).nonzero().flatten()
        require(len(broken) == 0, f"previous_logits holds NaN or infinity, in tokens {broken[:5].tolist()}")


def check_replay(replay: Any, tokens: TokenInfo, config: MoEConfig) -> None:
    """ValueError unless the recorded choices fit this pass; under MOEBIUS_CHECK=1 also for an id of no expert, or padding that is kept."""
    experts = config.experts.count
    needed = (len(tokens.real_T), slots(config.gating, experts))
    expert_TK, keep_TK = torch.as_tensor(replay.expert), torch.as_tensor(replay.keep)
    require(tuple(expert_TK.shape) == needed, f"replay.expert has shape {tuple(expert_TK.shape)}; this pass needs {needed}")
    integer = not (expert_TK.is_floating_point() or expert_TK.is_complex() or expert_TK.dtype == torch.bool)
    require(integer, f"replay.expert has dtype {expert_TK.dtype}; it must be integer")
    require(tuple(keep_TK.shape) == needed, f"replay.keep has shape {tuple(keep_TK.shape)}, replay.expert {needed}")
    require(keep_TK.dtype == torch.bool, f"replay.keep has dtype {keep_TK.dtype}; it must be bool")
    require(tuple(replay.load.shape) == (experts,), f"replay.load has shape {tuple(replay.load.shape)}; the layer has {experts} experts")
    if checks_values() and expert_TK.numel():
        low, high = int(expert_TK.min()), int(expert_TK.max())
        require(low >= 0 and high < experts, f"replay.expert has ids {low} … {high}; the layer has {experts} experts")
        kept_pads = (keep_TK.to(tokens.real_T.device).any(1) & ~tokens.real_T).nonzero().flatten()
        require(len(kept_pads) == 0, f"replay keeps assignments of padding, in tokens {kept_pads[:5].tolist()}")


def router_logits_forward(
    x_TD: Tensor, params: Params, config: ScoresConfig, draws: Draws, *, training: bool, previous_TE: Tensor | None = None
) -> tuple[Tensor, Noisy]:
    """(logits [T, E], with their noise): norm → input noise → linear → residual → softcap → logit noise; noise in training only."""
    input_noise, logit_noise = (config.noise, config.logit_noise) if training else ("none", "none")
    noisy_TD = INPUT_NOISE[input_noise](INPUT_NORMS[config.input_norm](x_TD), config.noise_scale, draws)
    raw_TE = logits_forward(noisy_TD, params["router.weight"], params.get("router.bias"))
    if previous_TE is not None:
        raw_TE = residual_forward(raw_TE, previous_TE, params["router.residual_weight"])
    logits_TE = softcap_forward(raw_TE, config.softcap)
    return logits_TE, LOGIT_NOISE[logit_noise](logits_TE, noisy_TD, params.get("router.noise_weight"), draws)


class Decision(NamedTuple):
    """All discrete results of a pass: what the router chose and which of it exists, where each went after the drop, and the load chosen."""

    chosen_TK: Tensor
    picked_TK: Tensor
    expert_TK: Tensor
    keep_TK: Tensor
    load_E: Tensor


def keep_wanted(
    chosen_TK: Tensor, gate_TK: Tensor, picked_TK: Tensor, room: Tensor | None, config: MoEConfig, tokens: TokenInfo, *,
    draws: Draws, training: bool,
) -> Placed:  # fmt: skip
    """What follows a choice: second choice, drop (room None: there is enough for all), recycling."""
    rule = config.gating.second_choice if training else "always"
    wanted_TK = picked_TK & SECOND_CHOICES[rule](gate_TK, config.gating, draws)
    if room is None:
        return Placed(chosen_TK, wanted_TK)
    order_N = queue_order(gate_TK, config.capacity.order, draws, training=training)
    placed = Placed(chosen_TK, keep_within_capacity(chosen_TK, wanted_TK, room, order_N, tokens))
    return recycle(placed, wanted_TK, room, config, tokens, draws) if training else placed


def _decide(scores_TE: Tensor, bias: Tensor | None, config: MoEConfig, tokens: TokenInfo, context: ChoiceContext) -> Decision:
    """Choice, second choice, drop, recycling."""
    training, draws = context.training, context.draws
    limited = config.capacity.formula != "none"  # else a queue never outgrows its group: nothing to count and no size to ask for
    room = expert_capacity(config, tokens, training=training) if limited else None
    chosen_TK, picked_TK = choose(scores_TE, bias, config.gating, tokens, context._replace(slots_B=room))
    gate_TK = gates_forward(scores_TE, chosen_TK, config.gating)
    expert_TK, keep_TK = keep_wanted(chosen_TK, gate_TK, picked_TK, room, config, tokens, draws=draws, training=training)
    load_E = tokens.total(count_load(chosen_TK, picked_TK, config.experts.count))
    return Decision(chosen_TK, picked_TK, expert_TK, keep_TK, load_E)


def _replayed(
    replay: Any, scores_TE: Tensor, bias: Tensor | None, config: MoEConfig, tokens: TokenInfo, context: ChoiceContext
) -> Decision:
    """The decisions of an earlier pass, whose arrays may be NumPy's or tensors."""
    check_replay(replay, tokens, config)
    device = tokens.real_T.device
    expert_TK, keep_TK, load_E = (torch.as_tensor(field, device=device) for field in (replay.expert, replay.keep, replay.load))
    if config.capacity.recycle != "none":  # the record holds where a token went, not what the router had chosen for it
        return Decision(*choose(scores_TE, bias, config.gating, tokens, context), expert_TK, keep_TK, load_E)
    picked_TK = keep_TK if NUMPY_CHOICES[config.gating.choice].every_expert else tokens.real_T[:, None].expand(expert_TK.shape)
    return Decision(expert_TK, picked_TK, expert_TK, keep_TK, load_E)


def sparse_route_forward(
    x_TD: Tensor, params: Params, config: MoEConfig, tokens: TokenInfo, *,
    training: bool = False, rng: torch.Generator | None = None, replay: Any = None,
) -> tuple[Routing, dict[str, Tensor]]:  # fmt: skip
    """`route_forward` where tokens are sent: x → logits → scores → choice → gates → drops, all in fp32 or better, autocast or not.

    In a replay the decisions and draws are those of the earlier pass; everything continuous is computed anew and has its gradient.
    """
    gating = config.gating
    with without_autocast(x_TD.device):
        draws = Draws(rng, None if replay is None else replay.draws)
        given = {"training": training, "previous_TE": tokens.previous_TE}
        logits_TE, noise = router_logits_forward(x_TD, params, config.scores, draws, **given)
        function = SCORE_FUNCTIONS[config.scores.function]
        scores_TE = function.forward(noise.noisy_TE)
        probability_TE = function.probability_forward(scores_TE)
        bias = params.get("router.correction_bias") if gating.correction_bias else None
        seen = (noise.noisy_TE.detach(), probability_TE.detach())
        context = ChoiceContext(*seen, None, params.get("router.hash_table"), draws, training)
        decided = (scores_TE.detach(), bias, config, tokens, context)
        decision = _decide(*decided) if replay is None else _replayed(replay, *decided)
        chosen_TK, picked_TK, expert_TK, keep_TK, load_E = decision
        gate_TK = gates_forward(scores_TE, expert_TK, gating, survivors(keep_TK) if gating.after_drop else None)
        if gating.expert_scale:
            gate_TK = expert_scale_forward(gate_TK, expert_TK, params["router.expert_scale"])
        sizes = (gating.top_k, gating.groups, gating.top_groups, config.experts.networks, config.experts.network_share)
        inputs = LossInputs(logits_TE, scores_TE, probability_TE, chosen_TK, picked_TK, tokens, gate_TK, noise, *sizes)
        losses = {name: LOSSES[name](inputs) for name, _ in config.balance.losses} if training else {}
        importance_E = mean_probability(probability_TE, tokens)
        gate_TK = gate_TK.masked_fill(~keep_TK, 0)
        taken = draw_dropout(expert_TK, gate_TK.detach(), config.experts, draws, training=training)
    return Routing(expert_TK, gate_TK, keep_TK, load_E, importance_E, logits_TE, scores_TE, taken), losses


def soft_route_forward(
    x_TD: Tensor, params: Params, config: MoEConfig, tokens: TokenInfo, *,
    training: bool = False, rng: torch.Generator | None = None, replay: Any = None,
) -> tuple[Routing, dict[str, Tensor]]:  # fmt: skip
    """`route_forward` where tokens are mixed: logits → shares. Neither noise nor a decision is there to be replayed."""
    if replay is not None:
        check_replay(replay, tokens, config)
    with without_autocast(x_TD.device):
        logits_TEC = slot_logits_forward(x_TD, params)
        mix = soft_mix(logits_TEC, tokens)
        gate_TE = mix.combine.sum(2)
        expert_TE, keep_TE = choose_all(gate_TE, config.gating, tokens, ChoiceContext())
        load_E = tokens.total(count_load(expert_TE, keep_TE, config.experts.count))
        importance_E = mean_probability(gate_TE, tokens)
    return Routing(expert_TE, gate_TE, keep_TE, load_E, importance_E, logits_TEC, mix.dispatch, {}, mix), {}


ROUTES: dict[bool, Callable[..., tuple[Routing, dict[str, Tensor]]]] = {False: sparse_route_forward, True: soft_route_forward}
"""By whether the router mixes tokens instead of sending them (`reference.choices.Choice.mixes`)."""


def route_forward(
    x_TD: Tensor, params: Params, config: MoEConfig, tokens: TokenInfo, *,
    training: bool = False, rng: torch.Generator | None = None, replay: Any = None,
) -> tuple[Routing, dict[str, Tensor]]:  # fmt: skip
    """(routing, the unweighted losses by name), by the way of the config's rule."""
    route_by = ROUTES[NUMPY_CHOICES[config.gating.choice].mixes]
    return route_by(x_TD, params, config, tokens, training=training, rng=rng, replay=replay)


def check_mix(routing: Routing, config: MoEConfig) -> None:
    """ValueError where a router that mixes has recorded no mix, or one that sends has."""
    mixes = NUMPY_CHOICES[config.gating.choice].mixes
    found = "None" if routing.mix is None else "a mix"
    require(mixes == (routing.mix is not None), f"gating.choice is {config.gating.choice!r}, but routing.mix is {found}")


def mixed(x_TD: Tensor, routing: Routing, apply: Callable[[Tensor, Routing], Tensor]) -> Tensor:
    """What `apply` makes of the tokens x and their routing, or of Soft MoE's slots as tokens, and of these the tokens' means (soft-moe)."""
    if routing.mix is None:
        return apply(x_TD, routing)

    def apply_to_slots(rows_ND: Tensor, expert_N: Tensor) -> Tensor:
        gate_N1 = torch.ones(len(rows_ND), 1, device=rows_ND.device, dtype=routing.gate.dtype)
        nothing = gate_N1.new_zeros(0)
        slots = Routing(expert_N[:, None], gate_N1, gate_N1.bool(), nothing, nothing, nothing, nothing, {})
        return apply(rows_ND, slots)

    return mix_forward(x_TD, routing.mix, apply_to_slots)


def route(
    x_TD: Tensor, params: Params, config: MoEConfig, *,
    training: bool = False, rng: torch.Generator | None = None, token_ids: Tensor | None = None,
    group_ids: Tensor | None = None, pad_mask: Tensor | None = None, replay: Any = None, previous_logits: Tensor | None = None,
) -> Routing:  # fmt: skip
    """The first seam: which experts every token goes to, and with what gates. Arguments as in `reference.route`, with tensors.

    Without rng the default generator draws. Raises ValueError for a wrong shape or dtype, or a replay that does not fit.
    """
    check_input(x_TD, config)
    check_params(x_TD, params, config, ("router",))
    check_previous(previous_logits, len(x_TD), config)
    tokens = token_info(x_TD.shape[:-1], token_ids, group_ids, pad_mask, previous_logits, device=x_TD.device)
    return route_forward(x_TD, params, config, tokens, training=training, rng=rng, replay=replay)[0]


def apply_experts_forward(x_TD: Tensor, routing: Routing, params: Params, config: MoEConfig) -> Tensor:
    """Dispatch, routed experts, combine, for a given routing: y [T, D] in the dtype of x, summed in the gates' fp32 or better."""
    rows_ND, dispatch = dispatch_forward(x_TD, routing.expert, routing.keep, config.experts.count)
    gate_TK = routing.gate
    if config.experts.gate_inputs:
        rows_ND, gate_TK = gate_rows_forward(rows_ND, gate_TK, dispatch), torch.ones_like(gate_TK)
    factor = dropout_factors(routing.draws, dispatch, config.experts, rows_ND.dtype)
    out_ND = experts_forward(rows_ND, dispatch.bounds_P, params, config.experts, factor)
    return combine_forward(out_ND, gate_TK, dispatch).to(x_TD.dtype)


def apply_experts(x_TD: Tensor, routing: Routing, params: Params, config: MoEConfig) -> Tensor:
    """The second seam: y [T, D] of the routed experts for a given routing (no shared experts)."""
    check_input(x_TD, config)
    check_params(x_TD, params, config, ("experts",))
    check_mix(routing, config)
    return mixed(x_TD, routing, lambda rows, own: apply_experts_forward(rows, own, params, config))


def loss_weights(config: MoEConfig, penalty: Tensor | None) -> dict[str, Any]:
    """The weight of each loss in the total, by name: those of the config, gate_l1's multiplied by the penalty [1]."""
    return {name: weight * penalty[0].double() if name == "gate_l1" else weight for name, weight in config.balance.losses}


def update_penalty(penalty: Tensor, load_E: Tensor, tokens: int, config: MoEConfig) -> Tensor:
    """The penalty [1] after one optimizer step (penalty-update): load [E] and tokens over all micro-batches and ranks."""
    experts = config.experts.count
    require(tuple(load_E.shape) == (experts,), f"load has shape {tuple(load_E.shape)}; the layer has {experts} experts")
    step = torch.sign(load_E.sum() - tokens * config.gating.top_k).double()
    return (penalty * config.balance.penalty_rate**step).to(penalty.dtype)


def update_bias(correction_bias: Tensor, load_E: Tensor, config: MoEConfig) -> Tensor:
    """The correction bias [E] after one optimizer step, by config.balance's rule; load [E] summed over micro-batches and ranks.

    The biases of zero-computation experts stay.
    """
    require(load_E.shape == correction_bias.shape, f"load has shape {tuple(load_E.shape)}; the bias has {tuple(correction_bias.shape)}")
    networks = config.experts.networks
    moved = BIAS_RULES[config.balance.bias_rule](correction_bias, load_E, config.balance.bias_rate)
    return torch.cat([moved[:networks], correction_bias[networks:]])


class Part(nn.Module):
    """The tensors of one part of the layer. Its buffers keep their dtype whatever the parameters are cast to: a bias moves by 0.001."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Part:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = torch.empty_like(new, dtype=old.dtype) if old.is_meta else old.to(new.device, old.dtype)
        return self


class MoE(nn.Module):
    """A Mixture-of-Experts layer (moe): `reference.moe_forward` as a module.

    Parameters are named and shaped by `reference.parameter_shapes`, so a state dict loads strictly into any other track.
    A subclass with a faster path replaces `route_tokens` or `apply_experts`.
    """

    def __init__(self, config: MoEConfig, *, device: Any = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        require(isinstance(config, MoEConfig), f"config must be a MoEConfig, got {config!r}")
        require(dtype is None or dtype.is_floating_point, f"dtype is {dtype}; parameters must be floating point")
        self.config = config
        for name, shape in parameter_shapes(config).items():
            part, leaf = name.split(".")
            if not hasattr(self, part):
                self.add_module(part, Part())
            if name in BUFFERS:
                self.get_submodule(part).register_buffer(leaf, torch.empty(shape, device=device, dtype=BUFFER_DTYPES[STARTS[name].dtype]))
            else:
                self.get_submodule(part).register_parameter(leaf, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh parameters by the rule of `reference.init_params`: matrices from N(0, 1/fan-in), biases 0, and its exceptions."""
        for name, tensor in self.tensors().items():
            if name in STARTS:
                seed = int(torch.randint(2**31, (), generator=generator)) if name in DRAWN else 0
                array = STARTS[name].draw(tuple(tensor.shape), self.config, np.random.default_rng(seed))
                tensor.copy_(torch.from_numpy(array))
            elif name.endswith("bias"):
                tensor.zero_()
            else:
                tensor.normal_(0, tensor.shape[-1] ** -0.5, generator=generator)

    def tensors(self) -> dict[str, Tensor]:
        """Parameters and buffers by name: the `params` of the functions of this file."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}

    def route_tokens(self, x_TD: Tensor, tokens: TokenInfo, replay: Any = None) -> tuple[Routing, dict[str, Tensor]]:
        """`route_forward` with the module's parameters and mode."""
        return route_forward(x_TD, self.tensors(), self.config, tokens, training=self.training, replay=replay)

    def apply_experts(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """`apply_experts_forward` with the module's parameters."""
        return apply_experts_forward(x_TD, routing, self.tensors(), self.config)

    def apply_all_experts(self, x_TD: Tensor, routing: Routing, real_T: Tensor) -> Tensor:
        """The routed and the shared experts together, y [T, D]; the shared ones' output is 0 where real [T] is False."""
        y_TD = self.apply_experts(x_TD, routing)
        return self.add_shared(y_TD, self.apply_shared(x_TD), real_T) if self.config.experts.shared else y_TD

    def apply_shared(self, x_TD: Tensor) -> Shared:
        """`weighed_shared` with the module's parameters."""
        return weighed_shared(x_TD, self.tensors(), self.config.experts)

    @staticmethod
    def add_shared(y_TD: Tensor, shared: Shared, real_T: Tensor) -> Tensor:
        """The sum in the dtype of y; padding gets nothing."""
        routed_TD = y_TD if shared.routed_T is None else y_TD * shared.routed_T.masked_fill(~real_T, 0)[:, None]
        return (routed_TD + shared.out_TD.masked_fill(~real_T[:, None], 0)).to(y_TD.dtype)

    def forward(
        self, x: Tensor, *, token_ids: Tensor | None = None, group_ids: Tensor | None = None,
        pad_mask: Tensor | None = None, replay: Any = None, previous_logits: Tensor | None = None,
    ) -> tuple[Tensor, Aux]:  # fmt: skip
        """(y, aux) of x (…, S, D): y has the shape and dtype of x, the tensors of aux.routing count tokens as x.flatten(0, -2).

        Shapes: token_ids, group_ids int and pad_mask bool (True: padding), of x.shape[:-1]. Without group_ids each leading index of x is a
        group, and an x of two dimensions is one, whose tokens all compete for places. replay: an earlier `aux.routing`, of this or of
        another track, whose decisions and draws are used again. previous_logits [T, E]: the `aux.routing.logits` of the MoE layer before,
        where the config has scores.residual; without them, as in the first layer, the term is absent.
        The training mode switches noise, random second choices, the training capacity and the losses on.
        Raises: ValueError for a wrong shape or dtype, or a replay that does not fit; under MOEBIUS_CHECK=1 also for NaN and infinity.
        """
        check_input(x, self.config)
        check_params(x, self.tensors(), self.config, ("router", "experts", "shared"))
        x_TD = x.flatten(0, -2)
        check_previous(previous_logits, x_TD.shape[0], self.config)
        tokens = token_info(x.shape[:-1], token_ids, group_ids, pad_mask, previous_logits, device=x.device)
        routing, losses = self.route_tokens(x_TD, tokens, replay)
        y_TD = mixed(x_TD, routing, lambda rows, own: self.apply_all_experts(rows, own, tokens.real_T))
        weights = loss_weights(self.config, self.tensors().get("router.penalty"))
        weighted = [(weights[name] * value).to(value.dtype) for name, value in losses.items()]
        loss = torch.stack(weighted).sum() if weighted else routing.gate.new_zeros(())
        return y_TD.reshape(x.shape), Aux(loss, losses, routing)

    @torch.no_grad()
    def update_bias(self, load: Tensor) -> None:
        """Move the correction bias by config.balance's rule, once per optimizer step; nothing happens where the layer has no bias.

        load [E]: aux.routing.load, summed over the micro-batches and ranks of the step. Raises ValueError for another shape.
        """
        experts = self.config.experts.count
        require(tuple(load.shape) == (experts,), f"load has shape {tuple(load.shape)}; the layer has {experts} experts")
        if self.config.gating.correction_bias:
            bias = self.get_buffer("router.correction_bias")
            bias.copy_(update_bias(bias, load.to(bias.device), self.config))

    @torch.no_grad()
    def update_penalty(self, load: Tensor, tokens: int) -> None:
        """Move the penalty of the loss gate_l1, once per optimizer step; nothing happens where the layer has none.

        load [E]: aux.routing.load, summed over the micro-batches and ranks of the step; tokens: how many real tokens these had.
        Raises ValueError for a load of another shape.
        """
        if "gate_l1" in dict(self.config.balance.losses):
            penalty = self.get_buffer("router.penalty")
            penalty.copy_(update_penalty(penalty, load.to(penalty.device), tokens, self.config))

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        config = self.config
        return f"d_model={config.d_model}, experts={config.experts.count}, top_k={config.gating.top_k}, width={config.experts.width}"
