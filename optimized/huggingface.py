"""The fast path inside transformers: `register("moebius")`, then `model.set_experts_implementation("moebius")`.

transformers hands every experts module with stacked weights to a registered function. What such a module computes is found out and not
listed: its gate function is recognised by its values, its own eager forward is the judge of the rest, and what does not fit runs that
forward, with the reason in `explain(model)`. So a class that did not exist when this was written is either right or eager.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from reference.autograd import Routing
from reference.config import ExpertsConfig, GatingConfig, MoEConfig, require
from reference.experts import ACTIVATIONS as GATED
from reference.experts import ffn_keys

from . import backends
from .experts import ACTIVATIONS, Activation
from .operators import compute_dtype
from .torch_backend import experts_backward, experts_forward

FALLBACK = "transformers' eager"
WEIGHTS = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "up_proj_bias", "down_proj_bias")
FLAGS = ("has_gate", "has_bias", "has_post_expert_norm", "is_transposed", "is_concatenated")
SIGNATURE = "_moebius_plans"  # an attribute of a planned module that says what its plans are
PROBE_ELEMENTS = 1 << 16
# A gate function that is recognised agrees to this at every probe; the closest two that are in use, GELU and its tanh form, differ by 1e-4.
SAME_FUNCTION: dict[str, Any] = dict(rtol=1e-6, atol=1e-12)


class _UnfitError(Exception):
    """Why a module cannot run on the fast path."""


@dataclass(frozen=True)
class Plan:
    """How one experts module runs on one device in one dtype.

    backend     a row of the backend table, or None: the module's own eager forward
    activation  the recognised gate function, a key of `experts.ACTIVATIONS`; None: the module's own, differentiated by autograd
    note        why it falls back, or what is not fused
    config      sizes and activation for the backend; where the activation is not recognised only its sizes count
    """

    backend: str | None
    activation: str | None
    note: str
    config: MoEConfig | None = None


class Explanation(NamedTuple):
    """A line of `explain`, and as text one to print.

    module, experts_class   the module's name, and its class
    backend                 what runs it, or None
    note                    why it falls back, or what is not fused
    """

    module: str
    experts_class: str
    backend: str | None
    note: str

    def __str__(self) -> str:
        how = f"on {self.backend}" if self.backend else f"falls back to {FALLBACK}"
        return f"{self.module} ({self.experts_class}): {how}" + (f": {self.note}" if self.note else "")


_plans: WeakKeyDictionary[nn.Module, dict[tuple[Any, ...], Plan]] = WeakKeyDictionary()
_warned: set[tuple[str, str]] = set()


def register(name: str = "moebius") -> None:
    """Enter the fast path into transformers' table of experts implementations under this name; a second call changes nothing.

    Raises ValueError where the name is another implementation's, and ImportError without a transformers that has such a table.
    """
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    taken = name == "eager" or (name in ALL_EXPERTS_FUNCTIONS and ALL_EXPERTS_FUNCTIONS[name] is not run_experts)
    require(not taken, f"name is {name!r}, which is transformers' own implementation or another package's")
    ALL_EXPERTS_FUNCTIONS.register(name, run_experts)


def is_experts(module: nn.Module) -> bool:
    """Whether transformers dispatches this module's forward to the registered implementations."""
    return all(hasattr(module, flag) for flag in FLAGS) and hasattr(type(module).forward, "__wrapped__")


def explain(model: nn.Module) -> list[Explanation]:
    """For every experts module inside a model (or the module itself): which backend runs it as it is now, or why it falls back.

    Raises ValueError where there is none: this model's experts are not among those that transformers dispatches.
    """
    found = {name: module for name, module in model.named_modules() if is_experts(module)}
    require(bool(found), f"{type(model).__name__} holds no experts module that transformers dispatches")
    plans = {name: _plan(module, _weight_dtype(module)) for name, module in found.items()}
    return [Explanation(name, type(found[name]).__name__, plan.backend, plan.note) for name, plan in plans.items()]


def run_experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """An experts module's forward (combine): [T, D], expert ids [T, K], gates [T, K] → [T, D], in the dtype of the hidden states.

    Gradient: hidden states, gates and every parameter; that of an expert without tokens is exactly 0. An id of no expert, which expert
    parallelism gives to what other ranks compute, adds nothing. Compiles without a graph break where the activation is recognised.
    """
    dtype = compute_dtype(hidden_states)
    plan = _known_plan(module, dtype if dtype != hidden_states.dtype else _weight_dtype(module))
    if torch.compiler.is_compiling():
        getattr(module, SIGNATURE)  # read so that the compiled program is not used for a module with other plans
    if plan.backend is None:
        return _fall_back(plan, module, hidden_states, top_k_index, top_k_weights)  # pyright: ignore[reportCallIssue]
    return _run(plan, module, hidden_states, top_k_index, top_k_weights)


@torch.compiler.disable
def _fall_back(plan: Plan, module: nn.Module, *arguments: Tensor) -> Tensor:
    _warn_once(type(module).__name__, plan.note)
    return _eager(module)(module, *arguments)


def _eager(module: nn.Module) -> Callable[..., Tensor]:
    return type(module).forward.__wrapped__  # type: ignore[attr-defined]


def _warn_once(experts_class: str, reason: str) -> None:
    if (experts_class, reason) not in _warned:
        _warned.add((experts_class, reason))
        warnings.warn(f"{experts_class} runs in {FALLBACK} code: {reason}", stacklevel=4)


def _weight(module: nn.Module) -> Tensor | None:
    """One of the weights. Every call asks, and `named_parameters` would take longer than some experts do."""
    own = module._parameters
    return next((weight for name in WEIGHTS if (weight := own.get(name)) is not None), None)


def _weight_dtype(module: nn.Module) -> torch.dtype:
    return torch.float32 if (weight := _weight(module)) is None else weight.dtype


@torch.compiler.assume_constant_result  # what is asked and tried here is not for a traced program
def _known_plan(module: nn.Module, dtype: torch.dtype) -> Plan:
    return _plan(module, dtype)


def _plan(module: Any, dtype: torch.dtype) -> Plan:
    """The plan of a module for a compute dtype, made once and judged by the module's own forward."""
    device = torch.device("cpu") if (weight := _weight(module)) is None else weight.device
    key = (device, dtype, *(getattr(module, flag) for flag in FLAGS), id(getattr(module, "act_fn", None)))
    known = _plans.setdefault(module, {})
    if key in known:
        return known[key]
    try:
        plan = _fit(module, device, dtype)
        judged = _judge(plan, module)
    except _UnfitError as reason:
        plan, judged = Plan(None, None, str(reason)), True
    if judged:
        known[key] = plan
    setattr(module, SIGNATURE, repr([*known.values(), plan]))
    return plan


def _check_weights(module: Any) -> tuple[int, int, int, int]:
    """(E, M, D, F) of a module whose parameters are what its flags say. Raises _UnfitError."""
    params = dict(module.named_parameters())
    for name, tensor in params.items():
        if type(tensor) not in (nn.Parameter, Tensor):
            raise _UnfitError(f"{name} is a {type(tensor).__name__}, no plain tensor")
        if name not in WEIGHTS and not (module.has_post_expert_norm and name.startswith("post_expert_norm.")):
            raise _UnfitError(f"it has a parameter {name}, which the fast path would not train")
    names = _names(module)
    shapes = [tuple(params[name].shape) if name in params else () for name in names]
    up, down = (shape[:1] + shape[:0:-1] if module.is_transposed else shape for shape in shapes[:2])  # (E, out, in)
    experts, d_model, width = down if len(down) == 3 else (0, 0, 0)
    rows = (2 if module.has_gate else 1) * width
    expected = [(experts, rows, d_model), (experts, d_model, width)] + (
        [(experts, rows), (experts, d_model)] if module.has_bias else [(), ()]
    )
    if [up, down, *shapes[2:]] != expected or not experts:
        listed = ", ".join(f"{name} {shape}" for name, shape in zip(names, shapes, strict=True))
        raise _UnfitError(f"{listed} are no experts as its flags say")
    if len({params[name].dtype for name in names if name in params}) > 1 or not params[names[0]].is_floating_point():
        raise _UnfitError("its weights are not of one floating-point dtype")
    return experts, rows, d_model, width


def _fit(module: Any, device: torch.device, dtype: torch.dtype) -> Plan:
    """The plan that the module's flags and shapes suggest. Raises _UnfitError."""
    if device.type == "meta":
        raise _UnfitError("its weights are on the meta device")
    experts, rows, d_model, width = _check_weights(module)
    activation = _recognise(module, rows)
    notes = [] if activation else ["its gate function is its own and runs in PyTorch, differentiated by autograd"]
    stand_in = "swiglu" if module.has_gate else "relu"
    sizes = ExpertsConfig(count=experts, width=width, activation=activation or stand_in, bias=module.has_bias)
    config = MoEConfig(d_model=d_model, experts=sizes, gating=GatingConfig(top_k=1))
    if module.has_post_expert_norm:
        notes.append("the norm after the expert runs in PyTorch")
    plain = activation and not module.is_transposed and module.is_concatenated
    if activation and not plain:
        notes.append("its weights are stored as (in, out), which only this backend reads without a copy")
    try:
        backend = backends.resolve(backends.AUTO if plain else "torch", device, dtype, config).name
    except ValueError as error:
        raise _UnfitError(str(error)) from None
    return Plan(backend, activation, "; ".join(notes), config)


def _names(module: Any) -> tuple[str, str, str, str]:
    up = "gate_up_proj" if module.has_gate else "up_proj"
    return up, "down_proj", f"{up}_bias", "down_proj_bias"


def _own_gate(module: Any) -> Callable[[Tensor], Tensor]:
    return module._apply_gate if module.has_gate else module.act_fn  # type: ignore[return-value]


def _recognise(module: Any, columns: int) -> str | None:
    """The known activation with the values of the module's own on inputs of every magnitude (a clamp may sit anywhere), or None."""
    generator = torch.Generator().manual_seed(0)
    shape = (max(4, PROBE_ELEMENTS // columns), columns)
    magnitude = 10 ** (torch.rand(shape, generator=generator, dtype=torch.float64) * 10 - 4)
    probe = torch.randn(shape, generator=generator, dtype=torch.float64) * magnitude
    interleaved = module.has_gate and not module.is_concatenated
    with torch.no_grad():
        try:
            values = _own_gate(module)(_interleave(probe) if interleaved else probe.clone())
        except Exception as error:
            raise _UnfitError(f"its gate function raises {type(error).__name__}: {error}") from None
        for name, activation in ACTIVATIONS.items():
            if GATED[name].gated == module.has_gate:
                expected = activation.forward(probe)
                if expected.shape == values.shape and torch.allclose(values.double(), expected, **SAME_FUNCTION):
                    return name
    return None


def _interleave(pre_NM: Tensor) -> Tensor:
    """[gate | up] → gate, up, gate, up, …"""
    return torch.stack(pre_NM.chunk(2, dim=1), dim=2).flatten(1)


def _concatenate(pre_NM: Tensor) -> Tensor:
    """The inverse of `_interleave`."""
    return torch.cat([pre_NM[:, ::2], pre_NM[:, 1::2]], dim=1)


def _judge(plan: Plan, module: Any) -> bool:
    """Whether there was something to judge by: weights that are all 0, or not finite yet, tell nothing.

    A few random tokens go through the plan and through the module's own forward. Raises _UnfitError where they differ.
    """
    assert plan.config is not None
    up = getattr(module, _names(module)[0])
    experts, generator = plan.config.experts.count, torch.Generator().manual_seed(0)
    x = torch.randn(4, plan.config.d_model, generator=generator).to(up.device, up.dtype)
    expert = torch.stack([torch.randperm(experts, generator=generator)[: min(experts, 2)] for _ in range(4)]).to(up.device)
    gate = (torch.rand(expert.shape, generator=generator) + 0.5).to(up.device, up.dtype)
    with torch.no_grad(), torch.autocast(up.device.type, enabled=False):
        try:
            expected = _eager(module)(module, x, expert, gate).double()
        except Exception as error:
            raise _UnfitError(f"its own forward raises {type(error).__name__}: {error}") from None
        if not (expected.isfinite().all() and expected.any()):
            return False
        try:
            found = _run(plan, module, x, expert, gate).double()
        except Exception as error:
            raise _UnfitError(f"the fast path raises {type(error).__name__}: {error}") from None
    error = float((found - expected).square().mean().sqrt() / expected.square().mean().sqrt())
    limit = max(8 * torch.finfo(up.dtype).eps, 1e-4)
    if not error <= limit:
        raise _UnfitError(f"its own forward computes something else than its flags say (relative error {error:.1e} > {limit:.1e})")
    return True


def _run(plan: Plan, module: Any, hidden_states: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """The plan on tokens; a norm after the expert makes each assignment a token of its own, so that it sees unweighted outputs."""
    tokens, slots = expert_TK.shape
    gate_TK = gate_TK.to(torch.promote_types(gate_TK.dtype, torch.float32))
    dtype = compute_dtype(hidden_states)
    x_TD = hidden_states.to(dtype if dtype != hidden_states.dtype else _weight_dtype(module))
    if not module.has_post_expert_norm:
        return _experts(plan, module, x_TD, expert_TK, gate_TK).to(hidden_states.dtype)
    rows_AD = _experts(plan, module, x_TD.repeat_interleave(slots, 0), expert_TK.reshape(-1, 1), torch.ones_like(gate_TK).view(-1, 1))
    assert plan.config is not None
    out_TKD = module.post_expert_norm(rows_AD).view(tokens, slots, -1)
    gate_TK = gate_TK.masked_fill(expert_TK >= plan.config.experts.count, 0)
    return (out_TKD * gate_TK.unsqueeze(-1)).sum(1).to(hidden_states.dtype)


def _experts(plan: Plan, module: Any, x_TD: Tensor, expert_TK: Tensor, gate_TK: Tensor) -> Tensor:
    """Weighted sums of expert outputs [T, D], in the dtype of x."""
    assert plan.backend is not None and plan.config is not None
    weights: list[Tensor | None] = [module._parameters.get(name) for name in _names(module)]
    if module.is_transposed:
        weights[:2] = [None if weight is None else weight.transpose(1, 2) for weight in weights[:2]]
    keep_TK = torch.ones_like(expert_TK, dtype=torch.bool)
    if plan.activation and module.is_concatenated:
        params: Mapping[str, Any] = dict(zip(ffn_keys("experts", plan.config.experts), weights, strict=True))
        params = {name: weight for name, weight in params.items() if weight is not None}
        routing = Routing(expert_TK, gate_TK, keep_TK, *(None,) * 4, {})  # type: ignore[arg-type]
        return backends.BACKENDS[plan.backend].apply_experts(x_TD, routing, params, plan.config)
    activation = _interleaved(ACTIVATIONS[plan.activation]) if plan.activation else _by_autograd(_own_gate(module))
    weights = [None if weight is None else weight.to(x_TD.dtype) for weight in weights]
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x_TD, gate_TK, *weights))
    return _in_pytorch(x_TD, gate_TK, *weights, expert_TK, keep_TK, activation, save)  # pyright: ignore[reportCallIssue]


def _interleaved(activation: Activation) -> Activation:
    """The activation of rows whose gate and up columns alternate."""

    def backward(dhidden_NF: Tensor, pre_NM: Tensor) -> tuple[Tensor, Tensor]:
        hidden_NF, dpre_NM = activation.backward(dhidden_NF, _concatenate(pre_NM))
        return hidden_NF, _interleave(dpre_NM)

    return Activation(lambda pre_NM: activation.forward(_concatenate(pre_NM)), backward)


def _by_autograd(function: Callable[[Tensor], Tensor]) -> Activation:
    """A module's own gate function, recomputed and differentiated in the backward."""

    def forward(pre_NM: Tensor) -> Tensor:
        return function(pre_NM.clone()).to(pre_NM.dtype)  # the caller writes to the result, and a function may return its argument

    def backward(dhidden_NF: Tensor, pre_NM: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            leaf = pre_NM.detach().clone().requires_grad_()
            hidden_NF = function(leaf)
            (dpre_NM,) = torch.autograd.grad(hidden_NF, leaf, dhidden_NF.to(hidden_NF.dtype))
        return hidden_NF.detach().to(pre_NM.dtype).clone(), dpre_NM

    return Activation(forward, backward)


@torch.compiler.disable
def _in_pytorch(*arguments: Any) -> Tensor:
    return _Experts.apply(*arguments)  # type: ignore[return-value]


class _Experts(torch.autograd.Function):
    """`backend="torch"` with an activation that has no name; what is saved is what the registered operators save."""

    @staticmethod
    def forward(ctx: Any, x, gate, up, down, up_bias, down_bias, expert, keep, activation, save):  # type: ignore[override]
        y, pre, order, bounds = experts_forward(x, expert, gate, keep, up, down, up_bias, down_bias, activation, save)
        ctx.save_for_backward(x, gate, up, down, up_bias, down_bias, pre, order, bounds)
        ctx.activation = activation
        return y

    @staticmethod
    def backward(ctx: Any, dy):  # type: ignore[override]
        needs = ctx.needs_input_grad
        x, gate, up, down, up_bias, down_bias, pre, order, bounds = ctx.saved_tensors
        weights = (up, down, up_bias, down_bias)
        gradients = experts_backward(dy, x, gate, *weights, pre, order, bounds, ctx.activation, any(needs[2:6]))
        return *(value if need else None for value, need in zip(gradients, needs, strict=False)), None, None, None, None
