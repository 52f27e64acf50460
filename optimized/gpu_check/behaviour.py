"""What only a device can show beside numbers: the same bits twice, alone and in a batch, and from a recorded graph."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..benchmarks.shapes import Problem, Shape
from .device import Device
from .peers import ours
from .problems import forward_and_backward, problem
from .results import Step

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def _pass(given: Problem) -> list[Tensor]:
    y = forward_and_backward(given, ours(given))()
    return [y.detach().clone(), *(leaf.grad.clone() for leaf in given.leaves.values() if leaf.grad is not None)]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return len(first) == len(second) and all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


def twice(device: Device, given: Problem) -> bool:
    """Output and every gradient of two passes have the same bits."""
    return _same(_pass(given), _pass(given))


def alone(device: Device, given: Problem) -> bool:
    """A token's output has the bits that it has in the batch."""
    with torch.no_grad():
        everybody = ours(given).call()
        for token in (0, given.tokens // 2, given.tokens - 1):
            own = slice(token, token + 1)
            single = given._replace(x=given.x[own], gate=given.gate[own], expert=given.expert[own], dy=given.dy[own])
            if not torch.equal(ours(single).call(), everybody[own]):
                return False
    return True


def recorded(device: Device, given: Problem) -> bool:
    """A recorded graph gives the bits of the launches themselves, forward and backward, on inputs that changed after the recording."""
    step = forward_and_backward(given, ours(given))

    def call() -> list[Tensor]:
        return [step(), *(leaf.grad for leaf in given.leaves.values() if leaf.grad is not None)]

    replay = device.replayed(call)
    with torch.no_grad():
        given.x.mul_(-1.5)
    return _same([tensor.detach().clone() for tensor in replay()], _pass(given))


CHECKS: dict[str, Any] = {"two passes": twice, "a token alone": alone, "a recorded graph": recorded}


def steps(device: Device, shape: Shape, tokens: int) -> Iterator[Step]:
    """Every check in every dtype."""
    for name, check in CHECKS.items():
        for dtype in DTYPES:
            label = str(dtype).removeprefix("torch.")
            yield (
                f"{name}, {label}",
                lambda check=check, dtype=dtype: {"good": check(device, problem(device.name, shape, tokens, dtype))},
            )
