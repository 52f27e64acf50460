"""Who is compared: ours, and everybody who computes the same function (combine) from the same routing, at their best settings.

Left out because they compute something else: packages that drop tokens at a fixed capacity or bring a router of their own. GShard's einsum
takes part with a capacity that drops nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reference.autograd import apply_experts as reference_apply_experts

from .. import backends, huggingface
from .shapes import MODES, Problem

OURS, RIVAL = "moebius", "transformers grouped_mm"
MOST_BYTES = 1 << 29  # a peer that would copy or fill more than this is not run
QUADRATIC_EXPERTS = 64  # from here on a gradient of the whole stack for every expert is not run


class Runnable(NamedTuple):
    """call: the forward. up, down: the weights it trains, stacked (one tensor) or one for each expert."""

    call: Callable[[], Tensor]
    up: Sequence[Tensor]
    down: Sequence[Tensor]


class Peer(NamedTuple):
    """name; build: problem → Runnable; refuse: (problem, mode) → why it is not run, or None; near: may be the best;
    comparable: computes (combine) itself.
    """

    name: str
    build: Callable[[Problem], Runnable]
    refuse: Callable[[Problem, str], str | None]
    ours: bool = False
    near: bool = False
    comparable: bool = True


def _never(problem: Problem, mode: str) -> str | None:
    return None


def _gibibytes(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _ours(name: str) -> Callable[[Problem], Runnable]:
    def build(problem: Problem) -> Runnable:
        routing = problem.routing
        config, params = problem.shape.config, {"experts.gate_up_proj": problem.up, "experts.down_proj": problem.down}
        apply_experts = backends.resolve(name, problem.x.device, problem.x.dtype, config).apply_experts

        def call() -> Tensor:
            return apply_experts(problem.x, routing._replace(gate=problem.gate.float()), params, config)

        return Runnable(call, (problem.up,), (problem.down,))

    return build


def _cannot(name: str) -> Callable[[Problem, str], str | None]:
    def refuse(problem: Problem, mode: str) -> str | None:
        where = problem.x.device, problem.x.dtype, problem.shape.config
        reason = backends.why_not(name, *where)
        return reason or (f"it is what {OURS} runs" if backends.resolve(backends.AUTO, *where).name == name else None)

    return refuse


def _reference(problem: Problem) -> Runnable:
    config, params = problem.shape.config, {"experts.gate_up_proj": problem.up, "experts.down_proj": problem.down}
    return Runnable(lambda: reference_apply_experts(problem.x, problem.routing, params, config), (problem.up,), (problem.down,))


def _no_quadratic_gradient(problem: Problem, mode: str) -> str | None:
    if mode == MODES[0] or problem.shape.experts < QUADRATIC_EXPERTS:
        return None
    return f"its backward fills a gradient of all {problem.shape.experts} experts for every expert"


def _transformers(implementation: str) -> Callable[[Problem], Runnable]:
    def build(problem: Problem) -> Runnable:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralExperts

        huggingface.register()
        shape = problem.shape
        config = MixtralConfig(hidden_size=shape.d_model, intermediate_size=shape.width, num_local_experts=shape.experts)
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = MixtralExperts(config)
        up, down = (nn.Parameter(weight.detach()) for weight in (problem.up, problem.down))
        experts._parameters.update(gate_up_proj=up, down_proj=down)
        call: Callable[[], Tensor] = lambda: experts(problem.x, problem.expert, problem.gate)  # noqa: E731
        return Runnable(call, (up,), (down,))

    return build


def _needs_transformers(further: Callable[[Problem, str], str | None] = _never) -> Callable[[Problem, str], str | None]:
    def refuse(problem: Problem, mode: str) -> str | None:
        if find_spec("transformers") is None:
            return "transformers is not installed"
        return further(problem, mode)

    return refuse


def _copies_weights(problem: Problem, mode: str) -> str | None:
    size = problem.rows * problem.shape.expert_elements * problem.up.element_size()
    return f"it would copy {_gibibytes(size)} of weights" if size > MOST_BYTES else None


class _OneExpert(nn.Module):
    def __init__(self, up: Tensor, down: Tensor) -> None:
        super().__init__()
        self.up, self.down = nn.Parameter(up), nn.Parameter(down)

    def forward(self, x_ND: Tensor) -> Tensor:
        gate_proj_NF, up_NF = F.linear(x_ND, self.up).chunk(2, dim=1)
        return F.linear(F.silu(gate_proj_NF) * up_NF, self.down)


def _loop(problem: Problem) -> Runnable:
    """The loop of many tutorials: every expert's module on the tokens that a mask selects."""
    experts = [_OneExpert(up, down) for up, down in zip(problem.up.detach(), problem.down.detach(), strict=True)]

    def call() -> Tensor:
        y_TD = torch.zeros_like(problem.x)
        for number, expert in enumerate(experts):
            token_N, slot_N = torch.where(problem.expert == number)
            if len(token_N):
                y_TD = y_TD.index_add(0, token_N, expert(problem.x[token_N]) * problem.gate[token_N, slot_N, None])
        return y_TD

    return Runnable(call, [expert.up for expert in experts], [expert.down for expert in experts])


def _most_rows(problem: Problem) -> int:
    return int(torch.bincount(problem.expert.flatten(), minlength=problem.shape.experts).max())


def _einsum(problem: Problem) -> Runnable:
    """Dispatch and combine as products with a tensor [T, E, C], with the capacity C of the fullest expert."""
    shape, capacity = problem.shape, _most_rows(problem)

    def call() -> Tensor:
        flat_A = problem.expert.flatten()
        chosen_AE = F.one_hot(flat_A, shape.experts)
        place_A = (chosen_AE.cumsum(0) - 1).gather(1, flat_A[:, None]).view_as(problem.expert)
        empty_TC = problem.x.new_zeros(problem.tokens, shape.experts * capacity)
        combine_TEC = empty_TC.scatter(1, problem.expert * capacity + place_A, problem.gate).view(-1, shape.experts, capacity)
        rows_ECD = torch.einsum("tec,td->ecd", (combine_TEC != 0).to(problem.x.dtype), problem.x)
        gate_proj_ECF, up_ECF = torch.bmm(rows_ECD, problem.up.transpose(1, 2)).chunk(2, dim=2)
        out_ECD = torch.bmm(F.silu(gate_proj_ECF) * up_ECF, problem.down.transpose(1, 2))
        return torch.einsum("tec,ecd->td", combine_TEC, out_ECD)

    return Runnable(call, (problem.up,), (problem.down,))


def _fills_dispatch(problem: Problem, mode: str) -> str | None:
    size = problem.tokens * problem.shape.experts * _most_rows(problem) * problem.x.element_size()
    return f"its dispatch tensor would hold {_gibibytes(size)}" if size > MOST_BYTES // 4 else None


def _dense(experts: Callable[[Problem], int]) -> Callable[[Problem], Runnable]:
    """A dense gated network over all tokens, as wide as some experts together."""

    def build(problem: Problem) -> Runnable:
        count = experts(problem)
        gate_proj, up = (half.flatten(0, 1) for half in problem.up.detach()[:count].chunk(2, dim=1))
        expert = _OneExpert(torch.cat([gate_proj, up]), problem.down.detach()[:count].transpose(1, 2).flatten(0, 1).T.contiguous())
        return Runnable(lambda: expert(problem.x), (expert.up,), (expert.down,))

    return build


def _too_dense(problem: Problem, mode: str) -> str | None:
    flops = (2 if mode == MODES[0] else 6) * problem.tokens * problem.shape.experts * problem.shape.expert_elements
    return f"it takes {flops / 1e9:.0f} GFLOP" if flops > 60e9 else None


def everybody() -> list[Peer]:
    """Ours by the best backend, by each backend, and inside transformers; then the others."""
    on_cpu = [name for name in backends.names() if "cpu" in (backends.BACKENDS[name].devices or ("cpu",))]
    fast = [Peer(f"{OURS} {name}", _ours(name), _cannot(name), ours=True) for name in on_cpu]
    inside = Peer(f"{OURS} in transformers", _transformers("moebius"), _needs_transformers(), ours=True)
    return [
        Peer(OURS, _ours(backends.AUTO), _never, ours=True),
        *fast,
        inside,
        Peer("reference.autograd", _reference, _no_quadratic_gradient),
        Peer("transformers eager", _transformers("eager"), _needs_transformers(_no_quadratic_gradient), near=True),
        Peer("transformers batched_mm", _transformers("batched_mm"), _needs_transformers(_copies_weights)),
        Peer(RIVAL, _transformers("grouped_mm"), _needs_transformers(), near=True),
        Peer("loop over experts", _loop, _never, near=True),
        Peer("GShard einsum", _einsum, _fills_dispatch),
        Peer("dense, equal active parameters", _dense(lambda p: p.shape.top_k), _never, comparable=False),
        Peer("dense, equal total parameters", _dense(lambda p: p.shape.experts), _too_dense, comparable=False),
    ]
