"""The project's own checks of its kernels, each as a question to a (possibly faulty) set of kernels: by which means is it caught?

Most of them call the very functions of `tests/test_kernels_*.py`; what counts is that those tests would fail.
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import test_kernels_layer as layer_tests
import test_kernels_memory as memory_tests
import test_kernels_routing as routing_tests
import test_kernels_schedule as schedule_tests
import torch
from kernel_checks import shuffled_programs, watched
from torch import Tensor

from optimized.kernels import launch
from optimized.kernels.blocks import Blocks, using
from optimized.proofs import prove
from reference.proof.cases import get

# What a failure is called, by what its message says; the first row that fits. The rest is the means of the check itself.
MEANS = {
    "bounds": "out of bounds",
    "race": "several programs|both read and written|two lanes",
    "exact zero": "must be exactly 0|is 0$",
    "poison": r" is -?(nan|inf) at|2147483647",
    "integers": "Arrays are not equal",
}
SMALL = Blocks(16, 16, 16, group=2)
BLOCKS = {
    "up": SMALL, "product": Blocks(32, 16, 16, group=2), "activation": SMALL._replace(group=8), "weight": SMALL, "combine": Blocks(16, 16),
    "route": Blocks(8, 0),
}  # fmt: skip
Findings = dict[str, str]


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside the block fresh memory is NaN, or the largest integer."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def means_of(message: str, otherwise: str) -> str:
    """By which means a failure was found."""
    return next((means for means, pattern in MEANS.items() if re.search(pattern, message, re.MULTILINE)), otherwise)


def findings(otherwise: str, run: Callable[[], object]) -> Findings:
    """means → the first line that reports it, of everything that a check complains about; empty where it is content."""
    try:
        run()
    except Exception as error:
        found: Findings = {}
        inside = re.search(r"\w+Error\(['\"](.*)['\"]\)", str(error), re.DOTALL)  # the interpreter wraps what a kernel raises
        lines = [line for line in (inside[1] if inside else str(error)).splitlines() if line.strip()]
        for line in lines or [type(error).__name__]:
            found.setdefault(means_of(line, otherwise), line.strip(" '\")"))
        return found
    return {}


def experts(on: str) -> Findings:
    """The contract of the experts on a case, in several small tiles: output and every gradient. on: "case dtype"."""
    name, dtype = on.split()

    def run() -> None:
        with poisoned(), using(**BLOCKS), watched(halt=True):
            prove(layer_tests.PROMISE, get(name), dtype)

    return findings("parity", run)


def memory(on: str) -> Findings:
    """Every access of a whole pass. on: "case gating"."""
    name, gating = on.split()

    def run() -> None:
        with poisoned(), using(**BLOCKS), watched(halt=True):
            memory_tests.whole_pass(name, memory_tests.GATING[gating])

    return findings("refused", run)


def order(on: str) -> Findings:
    """Two runs, and the programs in any order. on: a case."""

    def run() -> None:
        with poisoned(), using(**BLOCKS):
            first, second = (memory_tests.whole_pass(on, memory_tests.GATING["grouped"]) for _ in range(2))
            with shuffled_programs():
                third = memory_tests.whole_pass(on, memory_tests.GATING["grouped"])
        for one, two, three in zip(first, second, third, strict=True):  # a NaN is the poison's to find
            assert torch.equal(one.nan_to_num(0.5), two.nan_to_num(0.5)), "another run gives other bits"
            assert torch.equal(one.nan_to_num(0.5), three.nan_to_num(0.5)), "another order of programs gives other bits"

    return findings("order", run)


def batch(on: str) -> Findings:
    """A token's bits alone and in a batch. on: "experts" or "router"."""
    tests: dict[str, Callable[[], object]] = {
        "experts": partial(layer_tests.test_a_token_gets_the_same_bits_alone_and_in_any_batch, torch.float32),
        "router": routing_tests.test_a_token_is_routed_the_same_in_any_batch,
    }
    return _under_watch("batch invariance", tests[on])


def isolation(on: str) -> Findings:
    """What one NaN may spoil. on: "token", "gate" (of a dropped assignment), "logits" or "saved"."""
    tests: dict[str, Callable[[], object]] = {
        "token": layer_tests.test_a_nan_token_spoils_no_other_token,
        "gate": layer_tests.test_the_gate_of_a_dropped_assignment_is_not_read,
        "logits": routing_tests.test_a_nan_token_spoils_itself_alone_and_still_chooses_different_experts,
        "saved": _saved,
    }
    return _under_watch("NaN isolation", tests[on])


def _saved() -> None:
    _, _, _, _, _, pre, _, bounds, *_ = memory_tests.whole_pass("drops", memory_tests.GATING["plain"])
    assert not pre[int(bounds[-1]) :].any(), "what is saved for a dropped assignment is 0"


def integers(on: str) -> Findings:
    """The sort and its tables, exactly. on: a case; "wild" (ids that name no expert), "long" (many blocks), or "restored"."""

    def long() -> None:
        with pytest.MonkeyPatch.context() as monkeypatch:
            schedule_tests.test_many_blocks_of_few_assignments(monkeypatch)

    tests: dict[str, Callable[[], object]] = {
        "wild": schedule_tests.test_an_id_that_names_no_expert_is_a_dropped_assignment,
        "long": long,
        "restored": partial(schedule_tests.test_restored_schedule, "many-tokens"),
    }
    return _under_watch("integers", tests[on] if on in tests else lambda: schedule_tests.test_sort_and_tiles(get(on)))


def router(on: str) -> Findings:
    """Choices exactly, scores, gates and gradients by the policy. on: a router of `test_kernels_routing`, "ties" or "padded"."""
    tests: dict[str, Callable[[], object]] = {
        "ties": routing_tests.test_ties_go_to_the_lowest_id,
        "padded": routing_tests.test_lanes_beyond_the_last_expert_are_never_chosen,
    }
    means = "integers" if on in tests else "parity"
    return _under_watch(means, tests[on] if on in tests else lambda: routing_tests.test_route_and_its_backward(on))


def _under_watch(means: str, test: Callable[[], object]) -> Findings:
    def run() -> None:
        with poisoned(), watched(halt=True):
            test()

    return findings(means, run)


def sparse(shape: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """fp16 zeros whose elements lie as far apart as the strides say; only the pages that are touched take memory."""
    reach = 1 + sum((size - 1) * step for size, step in zip(shape, stride, strict=True))
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return torch.frombuffer(mmap.mmap(-1, 2 * reach, flags=flags), dtype=torch.float16).as_strided(shape, stride)


FAR, FEW, WIDTH = 2**30, 4, 32


def _filled(shape: tuple[int, ...], *, far: bool) -> Tensor:
    """Random numbers, the same near and far."""
    stride = (FAR, *torch.empty(shape, device="meta").stride()[1:])
    out = sparse(shape, stride) if far else torch.zeros(shape, dtype=torch.float16)
    return out.copy_(torch.from_numpy(np.random.default_rng(0).normal(size=shape)).half())


def _far_products(*, far: bool) -> list[Tensor]:
    """Tokens, and experts, whose distance in memory is more than 2³¹ elements."""
    schedule = launch.sort_by_expert(torch.arange(FEW)[:, None], torch.ones(FEW, 1, dtype=torch.bool), FEW, 16)
    x, square = _filled((FEW, WIDTH), far=far), _filled((FEW, WIDTH, WIDTH), far=far)
    gate, pre = torch.ones(FEW, 1), torch.ones(FEW, WIDTH, dtype=torch.float16)
    hidden, saved = launch.project_up(x, square, None, schedule, "relu", slots=1, save=True)
    assert saved is not None
    rows = launch.expert_product(hidden, square.mT, None, schedule)
    gradient = launch.activation_gradient(x, gate, square, None, pre, schedule, "relu", weights=True)
    near = torch.empty(square.shape, dtype=square.dtype)
    dup, _ = launch.weight_gradient(gradient.dpre, x, near, None, schedule, gather="right", slots=1)
    ddown, _ = launch.weight_gradient(x, hidden, near, None, schedule, gather="left", slots=1)
    return [hidden, saved, rows, gradient.dpre, gradient.parts, dup, ddown]


def _far_rows(*, far: bool) -> list[Tensor]:
    """A tile of rows whose place times the width is more than 2³¹: everything that is written and read by place."""
    width, first = (2048, 2**20) if far else (2048, 0)
    order, tiles = torch.arange(first + FEW, dtype=torch.int32) % FEW, torch.tensor([[1, 1], [0, first]], dtype=torch.int32)
    bounds = torch.tensor([0, first + FEW], dtype=torch.int32)
    place = torch.arange(first, first + FEW, dtype=torch.int32)
    schedule = launch.Schedule(order, place, bounds, {16: tiles})
    rng = torch.Generator().manual_seed(0)
    x, square = (torch.randn(*shape, generator=rng).half() for shape in ((FEW, 16), (1, width, 16)))
    hidden, pre = launch.project_up(x, square, None, schedule, "relu", slots=1, save=True)
    assert pre is not None
    gradient = launch.activation_gradient(x, torch.ones(first + FEW, 1), square.mT.contiguous(), None, pre, schedule, "relu", weights=True)
    assert gradient.weighted is not None
    wide = launch.expert_product(x.repeat(first // FEW + 1, 1), square.mT, None, schedule)
    y, _ = launch.combine(wide, torch.ones(FEW, 1), schedule, torch.float16)
    return [hidden[first:], pre[first:], gradient.dpre[first:], gradient.weighted[first:], wide[first:], y]


def far(on: str) -> Findings:
    """The same numbers where an offset does not fit into 32 bits. on: "products" or "rows"."""
    build = {"products": _far_products, "rows": _far_rows}[on]
    wide = Blocks(16, 1024, 16)

    def run() -> None:
        with using(**({"up": wide, "product": wide, "activation": wide, "combine": wide} if on == "rows" else BLOCKS | {"product": SMALL})):
            near = build(far=False)
            with watched(halt=True):
                away = build(far=True)
        for one, other in zip(near, away, strict=True):
            assert torch.equal(one, other), "another result beyond 2³¹ elements"

    found = findings("far addresses", run)
    return {"far addresses": next(iter(found.values()))} if found else {}


CHECKS: dict[str, Callable[[str], Findings]] = {
    "experts": experts, "memory": memory, "order": order, "batch": batch, "isolation": isolation, "integers": integers,
    "router": router, "far": far,
}  # fmt: skip
# What the report asks of every fault, beside the fault's own question.
EVERYTHING = {
    "memory": ("drops plain", "gelu-bias grouped"),
    "integers": ("many-tokens", "drops", "wild", "long", "restored"),
    "experts": ("drops float32", "gelu-bias float32"),
    "router": ("deepseek-v3", "gshard", "ties", "padded"),
    "isolation": ("gate", "logits", "saved"),
    "batch": ("router",),
}  # fmt: skip


def ask(check: str, on: str) -> Findings:
    """One check on one of its inputs: means → message. Raises ValueError for an unknown check."""
    if check not in CHECKS:
        raise ValueError(f"no check is called {check!r}; known: {', '.join(CHECKS)}")
    return CHECKS[check](on)


def ask_everything() -> dict[str, tuple[str, str, str]]:
    """means → (check, its input, message), over EVERYTHING; each check stops at the first input with which it finds something.

    After an access out of bounds nothing more is asked: what a kernel does then is not defined.
    """
    found: dict[str, tuple[str, str, str]] = {}
    for check, inputs in EVERYTHING.items():
        for on in inputs:
            if answers := ask(check, on):
                for means, message in answers.items():
                    found.setdefault(means, (check, on, message))
                break
        if "bounds" in found:
            break
    return found
