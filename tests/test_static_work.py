"""Bytes and FLOPs that the tables state are what kernels in the interpreter read, write and multiply; and what a training pass keeps."""

from __future__ import annotations

import dataclasses

import pytest
import torch

pytest.importorskip("triton")
from kernel_checks import INTERPRETED, Launch, watched

from optimized.benchmarks.measure import saved_bytes
from optimized.benchmarks.peers import RIVAL, everybody
from optimized.benchmarks.shapes import Shape
from optimized.gpu_check.peers import ours
from optimized.gpu_check.problems import problem
from optimized.kernels import launch
from optimized.kernels.blocks import Blocks, using
from optimized.static.capture import ROLES
from optimized.static.work import WORK, Sizes, work
from reference import presets
from reference.config import BalanceConfig, MoEConfig

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter")
BLOCKS = {
    "up": Blocks(32, 32, 16), "product": Blocks(16, 32, 32), "activation": Blocks(16, 32, 16), "weight": Blocks(32, 64, 16),
    "route": Blocks(8, 0), "combine": Blocks(8, 32),
}  # fmt: skip


def small(preset: str, *, width: int, hidden: int, experts: int, top_k: int) -> MoEConfig:
    config = presets.get(preset)
    groups = {"groups": 2, "top_groups": 1} if config.gating.groups > 1 else {}
    gating = dataclasses.replace(config.gating, top_k=top_k, **groups)
    sizes = dataclasses.replace(config.experts, count=experts, width=hidden, shared=0, shared_width=None)
    return dataclasses.replace(config, d_model=width, gating=gating, experts=sizes, balance=BalanceConfig())


def whole_pass(config: MoEConfig, tokens: int, dtype: torch.dtype) -> tuple[list[int], dict[str, Launch]]:
    """(load, what was counted by role) of one layer's forward and backward; the fourth expert gets no token."""
    experts, gating, generator = config.experts, config.gating, torch.Generator().manual_seed(0)
    normal = lambda *size: torch.randn(size, generator=generator).to(dtype)  # noqa: E731
    up, down = normal(experts.count, 2 * experts.width, config.d_model), normal(experts.count, config.d_model, experts.width)
    biases = [normal(experts.count, size) if experts.bias else None for size in (2 * experts.width, config.d_model)]
    logits = torch.randn(tokens, experts.count, generator=generator)
    logits[:, 3] = -50
    correction = torch.zeros(experts.count) if gating.correction_bias else None
    x, real, keep = normal(tokens, config.d_model), torch.ones(tokens, dtype=torch.bool), torch.ones(tokens, gating.top_k, dtype=torch.bool)
    with using(**BLOCKS), watched() as seen:
        scores, expert, gate, load = launch.route(logits, correction, real, config.scores.function, gating)
        _, pre, order, bounds = launch.experts_forward(x, expert, gate, keep, up, down, *biases, experts.activation, True)
        first = len(seen)
        dy = normal(tokens, config.d_model)
        gradients = launch.experts_backward(dy, x, gate, up, down, *biases, pre, order, bounds, experts.activation, True)
        launch.route_backward(scores.clone(), gradients[1], scores, expert, config.scores.function, gating)
    return load.tolist(), by_role(seen[:first], 0) | by_role(seen[first:], 1)


def by_role(launches: list[Launch], backward: int) -> dict[str, Launch]:
    found: dict[str, Launch] = {}
    for number, one in enumerate(launches):
        roles, before = ROLES[one.kernel], sum(other.kernel == one.kernel for other in launches[:number])
        found[roles[backward if one.kernel in ("expert_product_kernel", "combine_kernel") else before]] = one
    return found


@pytest.mark.parametrize(
    "preset, dtype, sizes",
    [
        ("gpt-oss-20b", torch.bfloat16, {"width": 48, "hidden": 40, "experts": 5, "top_k": 2}),
        ("deepseek-v3", torch.float32, {"width": 40, "hidden": 48, "experts": 8, "top_k": 3}),
    ],
)
def test_every_byte_and_every_product_is_accounted_for(preset: str, dtype: torch.dtype, sizes: dict[str, int]) -> None:
    config, tokens = small(preset, **sizes), 36
    load, found = whole_pass(config, tokens, dtype)
    stated = work(Sizes(config, tokens, load, dtype.itemsize, BLOCKS))
    assert found.keys() >= WORK.keys() == stated.keys()
    for role, done in stated.items():
        assert (found[role].bytes, found[role].flops) == (done.touched, done.executed), role
        assert done.least <= done.touched and done.useful <= done.executed


def test_the_count_sees_a_byte_more() -> None:
    config, tokens = small("mixtral-8x7b", width=16, hidden=16, experts=4, top_k=2), 8
    load, found = whole_pass(config, tokens, torch.float32)
    stated = work(Sizes(config, tokens + 1, load, 4, BLOCKS))
    assert any(found[role].bytes != done.touched for role, done in stated.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "shape", [Shape("Qwen3 / 32", 64, 24, 16, 8), Shape("Mixtral / 64", 64, 224, 8, 2), Shape("square", 32, 32, 4, 2)], ids=lambda s: s.name
)
def test_half_of_what_grouped_mm_keeps_for_the_backward(shape: Shape, dtype: torch.dtype) -> None:
    pytest.importorskip("transformers")
    given = problem("cpu", shape, 32, dtype)
    rival = next(peer for peer in everybody() if peer.name == RIVAL)
    kept = saved_bytes(given, ours(given))
    rows = given.rows * 2 * shape.width * dtype.itemsize
    assert rows <= kept <= rows + 4 * given.rows + 4 * (shape.experts + 1) + 4 * given.rows  # pre, order, bounds, and the gates in fp32
    assert kept <= 0.5 * saved_bytes(given, rival.build(given))
