"""What is timed: one layer of the published models, as much of it as the device has room for, drawn on the device itself."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..benchmarks.peers import Runnable
from ..benchmarks.shapes import LOADS, Problem, Shape

# D, F, E, K as published; DeepSeek-V3's layer holds 32 of its 256 experts, as on one of eight ranks.
SHAPES = tuple(
    Shape(*sizes)
    for sizes in (
        ("Mixtral-8x7B", 4096, 14336, 8, 2), ("DeepSeekMoE-16B", 2048, 1408, 64, 6), ("Qwen3-30B-A3B", 2048, 768, 128, 8),
        ("OLMoE-1B-7B", 2048, 1024, 64, 8), ("gpt-oss-20b", 2880, 2880, 32, 4), ("DeepSeek-V3, 32 experts", 7168, 2048, 32, 8),
    )
)  # fmt: skip
TINY = (Shape("tiny", 32, 32, 4, 2),)
TOKENS, TINY_TOKENS = (16, 1024, 8192, 32768), (8,)


def problem(device: str, shape: Shape, tokens: int, dtype: torch.dtype, load: str = "uniform") -> Problem:
    """Random inputs on a device, always the same there. Weights are scaled so that outputs have a size near 1."""
    generator = torch.Generator(device).manual_seed(tokens)

    def normal(*size: int, scale: float = 1.0) -> Tensor:
        return torch.empty(size, device=device, dtype=dtype).normal_(0, scale, generator=generator)

    up = normal(shape.experts, 2 * shape.width, shape.d_model, scale=shape.d_model**-0.5).requires_grad_()
    down = normal(shape.experts, shape.d_model, shape.width, scale=shape.width**-0.5).requires_grad_()
    x_TD, dy_TD = normal(tokens, shape.d_model).requires_grad_(), normal(tokens, shape.d_model)
    logits_TE = torch.randn(tokens, shape.experts, device=device, generator=generator)
    with torch.device(device):
        expert_TK = LOADS[load](logits_TE).topk(shape.top_k).indices
    gate_TK = torch.rand(expert_TK.shape, device=device, generator=generator) + 0.5
    gate_TK = (gate_TK / gate_TK.sum(-1, keepdim=True)).to(dtype).requires_grad_()
    return Problem(shape, load, x_TD, dy_TD, expert_TK, gate_TK, up, down)


def needed_bytes(shape: Shape, tokens: int, size: int = 2) -> int:
    """What a layer takes with its gradients and the rows of a few candidates, generously."""
    weights = shape.experts * shape.expert_elements
    return size * (5 * weights + 8 * tokens * shape.top_k * (3 * shape.width + 2 * shape.d_model))


def forward_and_backward(given: Problem, runnable: Runnable) -> Callable[[], Tensor]:
    """One training pass; gradients are dropped before each."""
    leaves = (given.x, given.gate, *runnable.up, *runnable.down)

    def step() -> Tensor:
        for leaf in leaves:
            leaf.grad = None
        y = runnable.call()
        y.backward(given.dy)
        return y

    return step
