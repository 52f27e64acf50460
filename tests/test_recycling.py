"""Memory that is used again: never while anybody can still see it, and never more of it than was said."""

from __future__ import annotations

import gc
import threading

import pytest
import torch

from optimized import backends
from optimized.layer import MoE
from optimized.operators import weight_gradients
from optimized.recycling import POOL, SMALLEST, Recycler
from reference.config import ExpertsConfig, GatingConfig, MoEConfig

LARGE = SMALLEST // 4  # so many fp32 numbers are recycled
LIKE = torch.zeros(1)


def test_memory_comes_back_when_the_last_tensor_that_shares_it_is_gone() -> None:
    recycler = Recycler()
    first = recycler.empty((2, LARGE), LIKE)
    place, row = first.data_ptr(), first[1]
    del first
    gc.collect()
    other = recycler.empty((2, LARGE), LIKE)
    assert other.data_ptr() != place, "a row of it is still there"
    del row
    gc.collect()
    assert recycler.waiting_bytes() == 2 * SMALLEST
    assert recycler.empty((LARGE, 2), LIKE).data_ptr() == place


def test_a_tensor_that_autograd_keeps_keeps_its_memory() -> None:
    weight = torch.ones(LARGE, requires_grad=True)

    class Fill(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, weight: torch.Tensor) -> torch.Tensor:
            return weight.sum()

        @staticmethod
        def backward(ctx: object, dout: torch.Tensor) -> torch.Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
            return recycler.empty((LARGE,), LIKE).fill_(dout.item())

    recycler = Recycler()
    Fill.apply(weight).backward()
    gc.collect()
    recycler.empty((LARGE,), LIKE).fill_(7.0)
    assert weight.grad is not None
    assert torch.equal(weight.grad, torch.ones(LARGE))
    Fill.apply(weight).backward()
    assert torch.equal(weight.grad, torch.full((LARGE,), 2.0))
    weight.grad = None
    gc.collect()
    assert recycler.waiting_bytes() >= SMALLEST


def test_no_more_waits_than_was_said() -> None:
    recycler = Recycler(most=2 * SMALLEST)
    held = [recycler.empty((LARGE,), LIKE) for _ in range(5)]
    held.clear()
    gc.collect()
    assert recycler.waiting_bytes() == 2 * SMALLEST
    recycler.release()
    assert recycler.waiting_bytes() == 0


def test_memory_that_nobody_asks_for_again_makes_room() -> None:
    recycler = Recycler(most=3 * SMALLEST)
    older = recycler.empty((2 * LARGE,), LIKE)
    del older
    gc.collect()
    other = recycler.empty((2, LARGE + 1), LIKE)
    place = other.data_ptr()
    del other
    gc.collect()
    assert recycler.waiting_bytes() == 2 * SMALLEST + 8, "the older block went"
    assert recycler.empty((2, LARGE + 1), LIKE).data_ptr() == place


def test_small_tensors_and_those_without_numbers_are_the_allocators() -> None:
    recycler = Recycler()
    assert recycler.empty((LARGE - 1,), LIKE).untyped_storage().resizable()
    assert recycler.empty((LARGE,), torch.empty(1, device="meta")).is_meta
    assert recycler.empty((0, 3), LIKE).shape == (0, 3)
    assert recycler.empty((LARGE,), LIKE.bfloat16()).dtype == torch.bfloat16


def test_threads_get_memory_of_their_own() -> None:
    recycler, wrong = Recycler(), []

    def fill(number: int) -> None:
        for _ in range(50):
            tensor = recycler.empty((LARGE,), LIKE).fill_(number)
            if not bool((tensor == number).all()):
                wrong.append(number)

    threads = [threading.Thread(target=fill, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("kind", [torch.nn.Parameter, torch.Tensor.detach])
def test_weight_gradients_are_recycled(kind: type) -> None:
    weights = (kind(torch.zeros(3, LARGE)), kind(torch.zeros(3, LARGE, 1)), None, None)
    places = [tensor.data_ptr() for tensor in weight_gradients(weights, True)[:2]]
    gc.collect()
    assert POOL.waiting_bytes() >= 6 * SMALLEST
    again = weight_gradients(weights, True)
    assert {tensor.data_ptr() for tensor in again[:2]} == set(places)
    assert [tuple(tensor.shape) for tensor in again] == [(3, LARGE), (3, LARGE, 1), (0,), (0,)]


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_what_a_forward_saves_is_recycled(backend: str) -> None:
    config = MoEConfig(32, gating=GatingConfig(top_k=2), experts=ExpertsConfig(count=4, width=128))
    if reason := backends.why_not(backend, torch.device("cpu"), torch.float32, config):
        pytest.skip(reason)
    moe, x = MoE(config, backend=backend), torch.randn(1024, 32)
    saved = 2 * 128 * 2 * 1024 * 4  # bytes of [T·K, 2F], larger than any other tensor of the layer
    POOL.release()
    moe(x)[0].sum().backward()
    gc.collect()
    assert POOL.waiting_bytes() == saved
    before = moe(x)[0]
    assert POOL.waiting_bytes() == 0
    del before
    gc.collect()
    assert POOL.waiting_bytes() == saved
