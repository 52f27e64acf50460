"""The sizes that are measured, the inputs of one measurement, and the goals."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from reference.autograd import Routing
from reference.config import ExpertsConfig, GatingConfig, MoEConfig, require


@dataclass(frozen=True)
class Shape:
    """Sizes of a layer: D, F, E, K."""

    name: str
    d_model: int
    width: int
    experts: int
    top_k: int

    @cached_property
    def config(self) -> MoEConfig:
        """The plainest layer of this shape, gated by SiLU."""
        return MoEConfig(self.d_model, gating=GatingConfig(top_k=self.top_k), experts=ExpertsConfig(count=self.experts, width=self.width))

    @property
    def expert_elements(self) -> int:
        """Parameters of one expert."""
        return 3 * self.d_model * self.width


# Few large experts, many middle ones, very many tiny ones; the proportions of Mixtral, DeepSeek-V2 and the finest-grained models.
SHAPES = {
    shape.name: shape
    for shape in (
        Shape("mixtral-mini", 512, 1792, 8, 2),
        Shape("deepseek-mini", 512, 256, 64, 6),
        Shape("fine", 256, 128, 256, 8),
    )
}
# Equal FLOPs per token at every number of experts.
EXPERT_COUNTS = {f"{count} experts": Shape(f"{count} experts", 256, 128, count, 8) for count in (8, 16, 32, 64, 128, 256, 512)}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
TOKENS = (1, 16, 128, 1024, 4096)
MODES = ("forward", "forward + backward")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Problem(NamedTuple):
    """The inputs of one measurement; every candidate gets these tensors.

    x, dy [T, D], expert [T, K], gate [T, K] in the dtype of x, up [E, 2F, D], down [E, D, F]. x, gate and the weights are leaves.
    """

    shape: Shape
    load: str
    x: Tensor
    dy: Tensor
    expert: Tensor
    gate: Tensor
    up: Tensor
    down: Tensor

    @property
    def tokens(self) -> int:
        """T."""
        return len(self.x)

    @property
    def rows(self) -> int:
        """N = T·K."""
        return self.expert.numel()

    @property
    def touched(self) -> int:
        """How many experts have a token."""
        return len(self.expert.unique())

    @property
    def routing(self) -> Routing:
        """The routing as the seam `apply_experts` takes it; the gates in fp32."""
        keep = torch.ones_like(self.expert, dtype=torch.bool)
        return Routing(self.expert, self.gate.float(), keep, *(None,) * 4, {})  # type: ignore[arg-type]

    @property
    def leaves(self) -> dict[str, Tensor]:
        """The tensors that get gradients."""
        return {"x": self.x, "gate": self.gate, "experts.gate_up_proj": self.up, "experts.down_proj": self.down}


def _uniform(logits_TE: Tensor) -> Tensor:
    return logits_TE


def _zipf(logits_TE: Tensor) -> Tensor:
    """The expert of rank r is chosen about in proportion to 1/r."""
    return logits_TE - torch.arange(1, logits_TE.shape[1] + 1).log()


def _one_takes_all(logits_TE: Tensor) -> Tensor:
    """The first K experts are everybody's choice."""
    return logits_TE - 1e3 * torch.arange(logits_TE.shape[1]).float()


LOADS = {"uniform": _uniform, "zipf": _zipf, "one takes all": _one_takes_all}


def weights(shape: Shape, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(up [E, 2F, D], down [E, D, F]), scaled so that every layer's output has a size near 1."""
    generator = torch.Generator().manual_seed(0)
    up = torch.randn(shape.experts, 2 * shape.width, shape.d_model, generator=generator) * shape.d_model**-0.5
    down = torch.randn(shape.experts, shape.d_model, shape.width, generator=generator) * shape.width**-0.5
    return up.to(dtype).requires_grad_(), down.to(dtype).requires_grad_()


def problem(shape: Shape, tokens: int, stacks: tuple[Tensor, Tensor], load: str = "uniform") -> Problem:
    """Random inputs of a shape, in the dtype of the given `weights`, always the same. Raises ValueError for an unknown load or T < 1."""
    require(load in LOADS, f"load is {load!r}; known: {', '.join(LOADS)}")
    require(tokens >= 1, f"tokens is {tokens}; there must be at least 1")
    generator, dtype = torch.Generator().manual_seed(tokens), stacks[0].dtype
    x_TD, dy_TD = torch.randn(2, tokens, shape.d_model, generator=generator).to(dtype)
    expert_TK = LOADS[load](torch.randn(tokens, shape.experts, generator=generator)).topk(shape.top_k).indices
    gate_TK = torch.rand(expert_TK.shape, generator=generator) + 0.5
    gate_TK = (gate_TK / gate_TK.sum(-1, keepdim=True)).to(dtype)
    return Problem(shape, load, x_TD.requires_grad_(), dy_TD, expert_TK, gate_TK.requires_grad_(), *stacks)


class Goal(NamedTuple):
    """What one number has to reach: `must`, and the `goal` beyond it, where there is one."""

    mode: str
    measure: str
    must: float
    goal: float | None


LIMIT, PEER = "fraction of the limit", "times the best peer"
_NAMES = tuple(SHAPES)
# (mode, measure) → for T = 1, T = 16 … 128, T ≥ 1024: the musts of the three shapes, and the goals.
_GOALS: dict[tuple[str, str], tuple[tuple[tuple[float, ...], tuple[float, ...]] | None, ...]] = {
    (MODES[0], LIMIT): (
        ((0.60, 0.40, 0.30), (0.75, 0.50, 0.40)),
        ((0.75, 0.65, 0.55), (0.85, 0.75, 0.70)),
        ((0.95, 0.90, 0.80), (1.00, 0.95, 0.90)),
    ),
    (MODES[0], PEER): (((1.5, 1.5, 1.5), ()), ((1.6, 2.5, 3.0), ()), ((1.2, 1.5, 2.0), ())),
    (MODES[1], LIMIT): (None, None, ((0.88, 0.78, 0.60), (0.92, 0.85, 0.70))),
    (MODES[1], PEER): (None, ((1.2, 1.2, 1.2), ()), ((1.1, 1.2, 1.3), ())),
}
BF16_ALLOWANCE = 0.1  # bf16 must come within this of fp32's fractions of the limit
EXPERTS_RATIO = 1.3  # 512 experts may cost this much more than 8
SAVED_RATIO = 0.45  # of what transformers' grouped_mm saves for the backward
SCALING = 1.7  # two threads against one, T ≥ 1024


def goals(shape: str, tokens: int, mode: str, dtype: str) -> list[Goal]:
    """The goals of one measurement; none for a shape that is not in the table above."""
    if shape not in _NAMES:
        return []
    place, column = 0 if tokens < 16 else 1 if tokens < 1024 else 2, _NAMES.index(shape)
    found = []
    for (of_mode, measure), columns in _GOALS.items():
        entry = columns[place]
        if of_mode == mode and entry is not None:
            musts, beyond = entry
            allowance = BF16_ALLOWANCE if dtype == "bfloat16" and measure == LIMIT else 0.0
            goal = round(beyond[column] - allowance, 2) if beyond else None
            found.append(Goal(mode, measure, round(musts[column] - allowance, 2), goal))
    return found
