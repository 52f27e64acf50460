"""`backend="triton"`: routing and experts on the kernels of `optimized.kernels`, on a GPU, or in Triton's interpreter.

In the interpreter (TRITON_INTERPRET=1 before the first import of Triton) the same launchers take CPU tensors: that is for tests, and
"auto" never chooses it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from reference.autograd import Routing
from reference.autograd.balancing import LOSSES, LossInputs, mean_probability
from reference.autograd.capacity import expert_capacity
from reference.autograd.gating import expert_scale_forward
from reference.autograd.layer import keep_wanted, route_forward, router_logits_forward
from reference.autograd.scores import SCORE_FUNCTIONS
from reference.autograd.tokens import Draws, TokenInfo, without_autocast
from reference.config import GatingConfig, MoEConfig

from .backends import Backend, register
from .contracts import contract
from .operators import apply_operator, experts_operator, lacks_derivative

HAS_TRITON = find_spec("triton") is not None
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROUTE_SCHEMA = (
    "(Tensor logits, Tensor? correction_bias, Tensor real, str function, int top_k, int groups, int top_groups, "
    "str group_score, str normalize, float eps, float scale) -> (Tensor scores, Tensor expert, Tensor gate, Tensor load)"
)
ROUTE_BACKWARD_SCHEMA = (
    "(Tensor? dscores, Tensor? dgate, Tensor scores, Tensor expert, str function, int top_k, int groups, int top_groups, "
    "str group_score, str normalize, float eps, float scale) -> Tensor"
)
SETTINGS = ("top_k", "groups", "top_groups", "group_score", "normalize", "eps", "scale")


def _gating(settings: tuple[Any, ...]) -> GatingConfig:
    return GatingConfig(**dict(zip(SETTINGS, settings, strict=True)))


def _route(logits: Tensor, correction_bias: Tensor | None, real: Tensor, function: str, *settings: Any) -> Any:
    from .kernels import launch

    return launch.route(logits, correction_bias, real, function, _gating(settings))


def _route_backward(dscores: Tensor | None, dgate: Tensor | None, scores: Tensor, expert: Tensor, function: str, *settings: Any) -> Tensor:
    from .kernels import launch

    return launch.route_backward(dscores, dgate, scores, expert, function, _gating(settings))


def _route_shapes(logits: Tensor, correction_bias: Any, real: Any, function: str, top_k: int, *settings: Any) -> Any:
    tokens, experts = logits.shape
    chosen, load = (logits.new_empty(shape, dtype=torch.int64) for shape in ((tokens, top_k), (experts,)))
    return logits.new_empty(tokens, experts), chosen, logits.new_empty(tokens, top_k), load


def _save_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scores, expert, _, load = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(expert, load)
    ctx.save_for_backward(scores, expert)
    ctx.settings = inputs[3:]


def _run_route_backward(ctx: Any, dscores: Tensor | None, _: Any, dgate: Tensor | None, *__: Any) -> tuple[Any, ...]:
    nothing = (None,) * (2 + len(ctx.settings))
    if dscores is None and dgate is None:
        return (None, *nothing)
    return (ROUTE_BACKWARD(dscores, dgate, *ctx.saved_tensors, *ctx.settings), *nothing)


ROUTE = torch.library.custom_op("moebius::triton_route", _route, mutates_args=(), schema=ROUTE_SCHEMA)
ROUTE_BACKWARD = torch.library.custom_op("moebius::triton_route_backward", _route_backward, mutates_args=(), schema=ROUTE_BACKWARD_SCHEMA)
ROUTE.register_fake(_route_shapes)
ROUTE_BACKWARD.register_fake(lambda dscores, dgate, scores, *_: torch.empty_like(scores))
ROUTE.register_autograd(_run_route_backward, setup_context=_save_route)


def _experts_forward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from .kernels import launch

    return launch.experts_forward(*arguments)


def _experts_backward(*arguments: Any) -> tuple[Tensor, ...]:
    from .kernels import launch

    return launch.experts_backward(*arguments)


OPERATOR = experts_operator("triton", _experts_forward, _experts_backward)


# What `route` reads of these parts of a config; a field that is not here must have its default value.
READ: dict[str, frozenset[str]] = {
    "gating": frozenset({"correction_bias", "expert_scale", "second_choice", "second_threshold", *SETTINGS}),
    "capacity": frozenset({"formula", "factor", "eval_factor", "minimum", "order"}),
}


def why_not_route(config: MoEConfig) -> str | None:
    """Why the router's kernel does not make this configuration's choice, so that `route` takes the reference's way, or None."""
    from .kernels import launch, routing

    for part, known in READ.items():
        settings = getattr(config, part)
        for field in dataclasses.fields(settings):
            if field.name not in known and (value := getattr(settings, field.name)) != field.default:
                return f"the router's kernel does not know {part}.{field.name} = {value!r}"
    tables = (
        ("score function", config.scores.function, routing.SCORES),
        ("normalizer", config.gating.normalize, routing.NORMALIZERS),
        ("group score", config.gating.group_score, routing.GROUP_SCORES),
    )
    for what, name, table in tables:
        if name not in table:
            return f"the router's kernel has no {what} {name!r}, only {', '.join(table)}"
    if config.experts.dropout:
        return f"the router's kernel draws no numbers for experts.dropout = {config.experts.dropout}"
    if config.gating.top_k > launch.MOST_SLOTS:
        return f"the router's kernel chooses at most {launch.MOST_SLOTS} experts, not {config.gating.top_k}"
    return None


@contract(
    equals="reference.autograd.layer.route_forward",
    backend="triton",
    grads=("x", "params"),
    dtypes=("float32", "bfloat16", "float16"),
    limits="fp32 throughout; a replay, K > 16 and what `why_not_route` names take the reference's way; a capacity waits for the device",
)
def route(
    x_TD: Tensor, params: Mapping[str, Tensor], config: MoEConfig, tokens: TokenInfo, *,
    training: bool = False, rng: torch.Generator | None = None, replay: Any = None,
) -> tuple[Routing, dict[str, Tensor]]:  # fmt: skip
    """(routing, the unweighted losses by name): scores, choice, gates and load in one kernel, the rest as in the reference.

    Shapes, arguments, gradient and errors: those of `reference.autograd.layer.route_forward`.
    """
    if replay is not None or why_not_route(config) is not None or lacks_derivative():
        return route_forward(x_TD, params, config, tokens, training=training, rng=rng, replay=replay)
    function, gating, draws = config.scores.function, config.gating, Draws(rng)
    with without_autocast(x_TD.device):
        given = {"training": training, "previous_TE": tokens.previous_TE}
        logits_TE, noise = router_logits_forward(x_TD, params, config.scores, draws, **given)
        bias = params["router.correction_bias"] if gating.correction_bias else None
        settings = (getattr(gating, name) for name in SETTINGS)
        scores_TE, expert_TK, gate_TK, load_E = ROUTE(noise.noisy_TE, bias, tokens.real_T, function, *settings)
        picked_TK = tokens.real_T[:, None].expand(expert_TK.shape)
        limited = config.capacity.formula != "none"
        room = expert_capacity(config, tokens, training=training) if limited else None
        keep_TK = keep_wanted(expert_TK, gate_TK.detach(), picked_TK, room, config, tokens, draws=draws, training=training)[1]
        if gating.expert_scale:
            gate_TK = expert_scale_forward(gate_TK, expert_TK, params["router.expert_scale"])
        probability_TE = SCORE_FUNCTIONS[function].probability_forward(scores_TE)
        seen = (logits_TE, scores_TE, probability_TE, expert_TK, picked_TK, tokens, gate_TK, noise)
        inputs = LossInputs(*seen, gating.top_k, gating.groups, gating.top_groups, config.experts.networks, config.experts.network_share)
        losses = {name: LOSSES[name](inputs) for name, _ in config.balance.losses} if training else {}
        importance_E = mean_probability(probability_TE, tokens)
        gate_TK = gate_TK.masked_fill(~keep_TK, 0)
    return Routing(expert_TK, gate_TK, keep_TK, tokens.total(load_E), importance_E, logits_TE, scores_TE, draws.taken), losses


@contract(
    equals="reference.layer.apply_experts",
    backend="triton",
    grads=("x", "gate", "params"),
    dtypes=("float32", "tf32", "bfloat16", "float16"),
    limits="E ≤ 2048, T·K < 2³¹; no second derivative; with fixed block sizes a token's y and dx are bit-equal in any batch",
)
def apply_experts(x_TD: Tensor, routing: Routing, params: Mapping[str, Tensor], config: MoEConfig) -> Tensor:
    """The second seam on the kernels (combine): y_t = Σ_k g_tk FFN_{e_tk}(x_t), without a host synchronisation.

    Shapes: x [T, D] → y [T, D], params as `reference.parameter_shapes` names them, fp32 (tf32 where torch's matmul precision is not
    "highest"), bf16 or fp16; every sum runs in fp32. An expert id that names no expert is a dropped assignment.
    Gradient: x, routing.gate and every expert parameter; an unused expert's is exactly 0. Nothing is added atomically: two runs are
    bit-equal.
    """
    return apply_operator(OPERATOR, x_TD, routing, params, config)


def _unavailable(device: torch.device, dtype: torch.dtype, config: MoEConfig) -> str | None:
    if not HAS_TRITON:
        return "there is no Triton; install it, or use the backend 'torch'"
    from .kernels import activations, launch

    name = config.experts.activation
    if name not in activations.ACTIVATIONS:
        return f"it has no activation {name!r}, only {', '.join(activations.ACTIVATIONS)}"
    if config.experts.networks > launch.MOST_EXPERTS:
        return f"it sorts into at most {launch.MOST_EXPERTS} experts, not {config.experts.networks}"
    return None


def _interprets() -> bool:
    if not HAS_TRITON:
        return False
    from .kernels import is_interpreting

    return is_interpreting()


# Interpreted it ranks below all others, so that "auto" never takes the slow way.
RANK, DEVICES = (-1, ("cuda", "cpu")) if _interprets() else (30, ("cuda",))
NOTE = "Triton takes CPU tensors in its interpreter alone: set TRITON_INTERPRET=1 before Triton is imported"
register(Backend("triton", RANK, DEVICES, DTYPES, _unavailable, apply_experts, route, NOTE))
