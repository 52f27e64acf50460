"""pytest -p second_engine: kernels are compiled by Triton's real front end and its IR is executed by `ttsem`, on CPU tensors.

`ttsem` is somebody else's engine with semantics of its own: where it and the interpreter agree, neither is the reason. It bounds every
access by the tensor's memory and looks for races between the programs of every launch. Needs TRITON_INTERPRET=0 and Triton 3.9
(`make second-triton`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction
from ttsem import harness, mlir, sanitize
from ttsem._fakedriver import unstub_torch_cuda

CAPABILITY = 90


def generic_ir(record: Any, stage: str, target: Any, *_: Any) -> str:
    """The IR of a launch after "ttir" or "ttgir", made by Triton's own passes up to there: no machine code is generated."""
    options, signature, constexprs, attributes = harness._specialize(record.fn, record.args, record.kwargs, target)
    key = (record.fn.cache_key, stage, str(target), str(options), str(signature), str(constexprs), str(attributes))
    if key not in _ir:
        mlir.enable_generic_printing()
        _ir[key] = mlir.to_generic(harness._stage_text(record, stage, target), None)
    return _ir[key]


_ir: dict[tuple[str, ...], str] = {}


@contextmanager
def engine() -> Iterator[sanitize.Session]:
    """Inside the block every launch is executed and checked, fresh memory is NaN, and `backend="triton"` takes CPU tensors."""
    from optimized import backends
    from optimized.kernels.blocks import INTERPRETED, INTERPRETED_ELEMENTWISE, using

    stock_ir, row = harness.ir_for_launch, backends.BACKENDS["triton"]
    deterministic = torch.are_deterministic_algorithms_enabled()
    harness.ir_for_launch = generic_ir
    torch.use_deterministic_algorithms(True, warn_only=True)
    backends.BACKENDS["triton"] = dataclasses.replace(row, devices=("cpu",))
    try:
        with using(**INTERPRETED, **INTERPRETED_ELEMENTWISE), sanitize.session(CAPABILITY, cuda_is_cpu=False) as state:
            unstub_torch_cuda()
            yield state
    finally:
        harness.ir_for_launch, backends.BACKENDS["triton"] = stock_ir, row
        torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="session", autouse=True)
def second_engine() -> Iterator[sanitize.Session]:
    """One engine for all tests, so that the fixtures of modules run on it too."""
    with engine() as state:
        yield state
    assert JITFunction.run.__module__.startswith("triton"), "the engine was left in place"


@pytest.fixture(autouse=True)
def _every_launch_is_checked(second_engine: sanitize.Session) -> Iterator[None]:
    """A launch whose accesses were too many to be looked through for races is a failure, not a success."""
    before = second_engine.races_unchecked
    yield
    assert second_engine.races_unchecked == before, "a launch was too large to be checked for races"
