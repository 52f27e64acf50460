"""What the interpreter does not notice: accesses out of bounds, programs that race, results that depend on the order of programs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl
from kernel_checks import INTERPRETED, shuffled_programs, watched

from optimized.kernels import launch
from optimized.kernels.blocks import Blocks, using
from reference.config import GatingConfig
from reference.experts import ffn_keys
from reference.proof.cases import draw, get

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="looks into Triton's interpreter; on a GPU there is compute-sanitizer")

KERNELS = {
    "route_kernel", "histogram_kernel", "scan_kernel", "scatter_kernel", "project_up_kernel", "expert_product_kernel", "combine_kernel",
    "restore_kernel", "activation_gradient_kernel", "weight_gradient_kernel", "route_backward_kernel",
}  # fmt: skip
GATING = {
    "plain": GatingConfig(top_k=2),
    "grouped": GatingConfig(top_k=2, groups=2, top_groups=1, group_score="top2_sum", normalize="sum", correction_bias=True),
}


def whole_pass(name: str, gating: GatingConfig, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Router, forward and backward of a case on tensors of exactly the size that is needed; all that they return."""
    case = get(name)
    inputs = draw(case)
    up, down, up_bias, down_bias = ffn_keys("experts", inputs.config.experts)
    make: Callable[[Any], Any] = lambda array: None if array is None else torch.from_numpy(np.ascontiguousarray(array)).to(dtype)  # noqa: E731
    x, dy, *weights = map(make, (inputs.x, inputs.dy, *(inputs.params.get(key) for key in (up, down, up_bias, down_bias))))
    experts = case.E - case.E % gating.groups
    logits = torch.from_numpy(inputs.routing.logits[:, :experts].copy()).float()
    bias = torch.linspace(-1, 1, experts) if gating.correction_bias else None
    scores, expert, gate, load = launch.route(logits, bias, torch.from_numpy(~inputs.pad_mask), "softmax", gating)
    keep = torch.from_numpy(inputs.routing.keep[:, : gating.top_k].copy())
    y, pre, order, bounds = launch.experts_forward(x, expert, gate, keep, *weights, case.activation, True)
    gradients = launch.experts_backward(dy, x, gate, *weights, pre, order, bounds, case.activation, True)
    dlogits = launch.route_backward(scores, gradients[1], scores, expert, "softmax", gating)
    return [scores, expert, gate, load, y, pre, order, bounds, *gradients, dlogits]


@pytest.mark.parametrize("gating", GATING, ids=str)
@pytest.mark.parametrize("name", ["one-token", "off-tile-widths", "drops", "gelu-bias"])
def test_every_access_lies_inside_and_no_two_programs_meet(name: str, gating: str) -> None:
    small = Blocks(16, 16, 16, group=2)
    with (
        using(up=small, product=Blocks(32, 16, 16, group=2), activation=small, weight=small, combine=Blocks(16, 16), route=Blocks(8, 0)),
        watched() as seen,
    ):
        whole_pass(name, GATING[gating])
    assert {one.kernel for one in seen} == KERNELS
    assert name == "one-token" or sum(len({access.program for access in one.writes}) > 1 for one in seen) >= 9, "races need two programs"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["drops", "swiglu-bias"])
def test_two_runs_and_any_order_of_programs_give_the_same_bits(name: str, dtype: torch.dtype) -> None:
    first = whole_pass(name, GATING["grouped"], dtype)
    second = whole_pass(name, GATING["grouped"], dtype)
    with shuffled_programs():
        third = whole_pass(name, GATING["grouped"], dtype)
    for one, two, three in zip(first, second, third, strict=True):
        assert torch.equal(one, two)
        assert torch.equal(one, three)


@triton.jit
def reads_past_the_end(X, Y, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(Y + at, tl.load(X + at), mask=at < N - 2)


@triton.jit
def adds_without_an_atomic(INDEX, X, Y):
    program = tl.program_id(0)
    at = Y + tl.load(INDEX + program)
    tl.store(at, tl.load(at) + tl.load(X + program))


@triton.jit
def reads_its_neighbour(Y):
    program = tl.program_id(0)
    if program > 0:
        tl.store(Y + program, tl.load(Y + program - 1) + 1)


@triton.jit
def writes_twice(Y, N: tl.constexpr):
    tl.store(Y + tl.arange(0, N) // 2, tl.arange(0, N))


PLANTED = {
    "reads_past_the_end": (reads_past_the_end, 1, lambda: (torch.ones(30), torch.zeros(30), 32), "out of bounds"),
    "adds_without_an_atomic": (
        adds_without_an_atomic, 4, lambda: (torch.tensor([0, 0, 1, 1]), torch.ones(4), torch.zeros(2)), "written by several programs"
    ),
    "reads_its_neighbour": (reads_its_neighbour, 8, lambda: (torch.zeros(8),), "both read and written"),
    "writes_twice": (writes_twice, 1, lambda: (torch.zeros(4, dtype=torch.int32), 4), "two lanes write one element"),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_the_watch_sees_a_planted_fault(name: str) -> None:
    kernel, programs, arguments, message = PLANTED[name]
    with pytest.raises(AssertionError, match=message), watched():
        kernel[(programs,)](*arguments())


def test_shuffling_shows_a_kernel_that_needs_its_order() -> None:
    in_order, shuffled = torch.zeros(8), torch.zeros(8)
    reads_its_neighbour[(8,)](in_order)
    with shuffled_programs():
        reads_its_neighbour[(8,)](shuffled)
    assert in_order.tolist() == list(range(8))
    assert not torch.equal(in_order, shuffled)
