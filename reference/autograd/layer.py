"""The whole layer in PyTorch: `route` and `apply_experts` on plain dicts of tensors, and `MoE`, the module around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import MoEConfig, require
from ..layer import BUFFERS, parameter_shapes
from .balancing import BIAS_RULES, LOSSES, LossInputs, count_load, mean_probability
from .capacity import group_capacity, keep_within_capacity
from .dispatch import combine_forward, dispatch_forward
from .experts import Params, experts_forward, shared_forward
from .gating import SECOND_CHOICES, choose, gates_forward
from .scores import INPUT_NOISE, SCORE_FUNCTIONS, logits_forward
from .tokens import Draws, TokenInfo, checks_values, token_info, without_autocast


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


class Aux(NamedTuple):
    """loss, the losses weighted by config.balance (0 in evaluation); losses by name, unweighted (empty in evaluation); the routing."""

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


def check_replay(replay: Any, tokens: int, config: MoEConfig) -> None:
    """ValueError unless the recorded choices fit this pass; under MOEBIUS_CHECK=1 also where an id names no expert."""
    shape, experts = tuple(replay.expert.shape), config.experts.count
    require(len(shape) == 2 and shape[0] == tokens, f"replay.expert has shape {shape}; x has {tokens} tokens")
    require(tuple(replay.keep.shape) == shape, f"replay.keep has shape {tuple(replay.keep.shape)}, replay.expert {shape}")
    require(tuple(replay.load.shape) == (experts,), f"replay.load has shape {tuple(replay.load.shape)}; the layer has {experts} experts")
    if checks_values() and shape[0]:
        low, high = int(replay.expert.min()), int(replay.expert.max())
        require(low >= 0 and high < experts, f"replay.expert has ids {low} … {high}; the layer has {experts} experts")


def _decide(
    scores_TE: Tensor, correction_bias: Tensor | None, config: MoEConfig, tokens: TokenInfo, draws: Draws, *, training: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """All discrete decisions of a pass: (expert [T, K], picked before the drop [T, K], kept after it [T, K])."""
    expert_TK, picked_TK = choose(scores_TE, correction_bias, config.gating, tokens)
    gate_TK = gates_forward(scores_TE, expert_TK, config.gating)
    rule = config.gating.second_choice if training else "always"
    wanted_TK = picked_TK & SECOND_CHOICES[rule](gate_TK, draws)
    if config.capacity.formula == "none":  # a queue never outgrows its group, so there is nothing to count and no size to ask for
        return expert_TK, picked_TK, wanted_TK
    slots_B = group_capacity(config.capacity, config.gating.top_k, config.experts.count, tokens, training=training)
    return expert_TK, picked_TK, keep_within_capacity(expert_TK, gate_TK, wanted_TK, slots_B, config.capacity.order, tokens)


def _replayed(replay: Any, tokens: TokenInfo, config: MoEConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(expert, picked, keep, load) of an earlier pass, whose arrays may be NumPy's or tensors."""
    check_replay(replay, len(tokens.real_T), config)
    device = tokens.real_T.device
    expert_TK, keep_TK, load_E = (torch.as_tensor(field, device=device) for field in (replay.expert, replay.keep, replay.load))
    return expert_TK, tokens.real_T[:, None].expand(expert_TK.shape), keep_TK, load_E


def route_forward(
    x_TD: Tensor, params: Params, config: MoEConfig, tokens: TokenInfo, *,
    training: bool = False, rng: torch.Generator | None = None, replay: Any = None,
) -> tuple[Routing, dict[str, Tensor]]:  # fmt: skip
    """(routing, the unweighted losses by name): x → logits → scores → choice → gates → drops, all in fp32 or better, autocast or not.

    In a replay the decisions and draws are those of the earlier pass; everything continuous is computed anew and has its gradient.
    """
    with without_autocast(x_TD.device):
        draws = Draws(rng, None if replay is None else replay.draws)
        noisy_TD = INPUT_NOISE[config.scores.noise if training else "none"](x_TD, config.scores.noise_scale, draws)
        logits_TE = logits_forward(noisy_TD, params["router.weight"], params.get("router.bias"))
        function = SCORE_FUNCTIONS[config.scores.function]
        scores_TE = function.forward(logits_TE)
        probability_TE = function.probability_forward(scores_TE)
        if replay is None:
            bias = params.get("router.correction_bias") if config.gating.correction_bias else None
            expert_TK, picked_TK, keep_TK = _decide(scores_TE.detach(), bias, config, tokens, draws, training=training)
            load_E = count_load(expert_TK, picked_TK, config.experts.count)
        else:
            expert_TK, picked_TK, keep_TK, load_E = _replayed(replay, tokens, config)
        gate_TK = gates_forward(scores_TE, expert_TK, config.gating).masked_fill(~keep_TK, 0)
        inputs = LossInputs(logits_TE, scores_TE, probability_TE, expert_TK, picked_TK, tokens)
        losses = {name: LOSSES[name](inputs) for name, _ in config.balance.losses} if training else {}
        importance_E = mean_probability(probability_TE, tokens)
    return Routing(expert_TK, gate_TK, keep_TK, load_E, importance_E, logits_TE, scores_TE, draws.taken), losses


def route(
    x_TD: Tensor, params: Params, config: MoEConfig, *,
    training: bool = False, rng: torch.Generator | None = None, token_ids: Tensor | None = None,
    group_ids: Tensor | None = None, pad_mask: Tensor | None = None, replay: Any = None,
) -> Routing:  # fmt: skip
    """The first seam: which experts every token goes to, and with what gates. Arguments as in `reference.route`, with tensors.

    Without rng the default generator draws. Raises ValueError for a wrong shape or dtype, or a replay that does not fit.
    """
    check_input(x_TD, config)
    check_params(x_TD, params, config, ("router",))
    tokens = token_info(x_TD.shape[:-1], token_ids, group_ids, pad_mask, device=x_TD.device)
    return route_forward(x_TD, params, config, tokens, training=training, rng=rng, replay=replay)[0]


def apply_experts_forward(x_TD: Tensor, routing: Routing, params: Params, config: MoEConfig) -> Tensor:
    """Dispatch, routed experts, combine, for a given routing: y [T, D] in the dtype of x, summed in the gates' fp32 or better."""
    rows_ND, dispatch = dispatch_forward(x_TD, routing.expert, routing.keep, config.experts.count)
    out_ND = experts_forward(rows_ND, dispatch.bounds_P, params, config.experts)
    return combine_forward(out_ND, routing.gate, dispatch).to(x_TD.dtype)


def apply_experts(x_TD: Tensor, routing: Routing, params: Params, config: MoEConfig) -> Tensor:
    """The second seam: y [T, D] of the routed experts for a given routing (no shared experts)."""
    check_input(x_TD, config)
    check_params(x_TD, params, config, ("experts",))
    return apply_experts_forward(x_TD, routing, params, config)


def update_bias(correction_bias: Tensor, load_E: Tensor, config: MoEConfig) -> Tensor:
    """The correction bias [E] after one optimizer step, by config.balance's rule; load [E] summed over micro-batches and ranks."""
    require(load_E.shape == correction_bias.shape, f"load has shape {tuple(load_E.shape)}; the bias has {tuple(correction_bias.shape)}")
    return BIAS_RULES[config.balance.bias_rule](correction_bias, load_E, config.balance.bias_rate)


class Part(nn.Module):
    """The tensors of one part of the layer. Its buffers stay fp32 whatever the parameters are cast to: a bias moves by steps of 0.001."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Part:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != torch.float32:
                self._buffers[name] = torch.empty_like(new, dtype=torch.float32) if old.is_meta else old.to(new.device, torch.float32)
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
                self.get_submodule(part).register_buffer(leaf, torch.empty(shape, device=device, dtype=torch.float32))
            else:
                self.get_submodule(part).register_parameter(leaf, nn.Parameter(torch.empty(shape, device=device, dtype=dtype)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw fresh parameters by the rule of `reference.init_params`: matrices from N(0, 1/fan-in), biases 0."""
        for name, tensor in self.tensors().items():
            if name.endswith("bias"):
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

    def forward(
        self, x: Tensor, *, token_ids: Tensor | None = None, group_ids: Tensor | None = None,
        pad_mask: Tensor | None = None, replay: Any = None,
    ) -> tuple[Tensor, Aux]:  # fmt: skip
        """(y, aux) of x (…, S, D): y has the shape and dtype of x, the tensors of aux.routing count tokens as x.flatten(0, -2).

        Shapes: token_ids, group_ids int and pad_mask bool (True: padding), of x.shape[:-1]. Without group_ids each leading index of x
        is a group, and an x of two dimensions is one. replay: an earlier `aux.routing`, of this or of another track, whose decisions
        and draws are used again. The training mode switches noise, random second choices, the training capacity and the losses on.
        Raises: ValueError for a wrong shape or dtype, or a replay that does not fit; under MOEBIUS_CHECK=1 also for NaN and infinity.
        """
        check_input(x, self.config)
        check_params(x, self.tensors(), self.config, ("router", "experts", "shared"))
        tokens = token_info(x.shape[:-1], token_ids, group_ids, pad_mask, device=x.device)
        x_TD = x.flatten(0, -2)
        routing, losses = self.route_tokens(x_TD, tokens, replay)
        y_TD = self.apply_experts(x_TD, routing)
        if self.config.experts.shared:
            shared_TD = shared_forward(x_TD, self.tensors(), self.config.experts)
            y_TD = (y_TD + shared_TD.masked_fill(~tokens.real_T[:, None], 0)).to(x.dtype)
        weighted = [weight * losses[name] for name, weight in self.config.balance.losses if name in losses]
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

    def extra_repr(self) -> str:
        """Sizes for `print(model)`."""
        config = self.config
        return f"d_model={config.d_model}, experts={config.experts.count}, top_k={config.gating.top_k}, width={config.experts.width}"
