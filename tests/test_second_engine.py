"""What the second engine shows beside the parity tests that it runs (`make second-triton`): it agrees with the interpreter on every
decision, Triton's lowering keeps every bit, and it sees planted faults on its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

from conftest import REPOSITORY
from kernel_checks import INTERPRETED

if INTERPRETED or torch.cuda.is_available() or find_spec("ttsem") is None:
    pytest.skip("runs on compiled IR, in the environment of `make second-triton`", allow_module_level=True)

import test_kernels_memory as memory_tests
from decisions import decisions
from faults.plant import planted
from faults.table import FAULTS
from test_kernels_memory import KERNELS
from ttsem import harness, sanitize

from optimized.kernels import launch
from optimized.kernels.blocks import Blocks, using

SMALL = Blocks(16, 16, 16, group=2)
# Rows that the matrix instructions of 9.0 and 10.0 need.
TALL = {name: Blocks(64, 64, 32) for name in ("up", "product", "activation", "weight")}
INSTRUCTIONS = {80: "tt.dot", 90: "ttng.warp_group_dot", 100: "ttng.tc_gen5_mma"}


def test_choices_and_permutations_are_the_interpreters(tmp_path: Path) -> None:
    path = tmp_path / "interpreted.npz"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tests/decisions.py"), str(path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    own, interpreted = decisions(), np.load(path)
    assert set(own) == set(interpreted.files) and len(own) > 100
    for name, array in own.items():
        np.testing.assert_array_equal(array, interpreted[name], err_msg=name)


@pytest.fixture
def executed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any]]:
    """Every launch from here on, as (record, execution of its TTIR)."""
    seen: list[tuple[Any, Any]] = []
    stock = harness.execute

    def execute(record: Any, ir: str, **options: Any) -> Any:
        execution = stock(record, ir, **options)
        seen.append((record, execution))
        return execution

    monkeypatch.setattr(harness, "execute", execute)
    return seen


def test_memory_ends_where_tensors_end_and_launches_have_several_programs(executed: list[tuple[Any, Any]], monkeypatch: Any) -> None:
    """Else an access past the end would be inside somebody's memory, and no two programs could meet."""
    monkeypatch.setattr(launch, "sort_block", lambda buckets: 16)
    experts, several = set(), set()
    for name, gating in (("drops", "grouped"), ("gelu-bias", "grouped"), ("off-tile-widths", "plain")):
        with using(up=SMALL, product=SMALL, activation=SMALL, weight=SMALL, combine=Blocks(16, 16), route=Blocks(8, 0)):
            experts.add(memory_tests.whole_pass(name, memory_tests.GATING[gating])[3].numel())
    for record, _ in executed:
        for argument, value in record.bound.items():
            if isinstance(value, torch.Tensor) and value.numel():
                last = sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
                assert value.storage_offset() == 0 and (1 + last) * value.element_size() == value.untyped_storage().nbytes(), argument
        if np.prod(record.grid) > 1:
            several.add(record.fn_name)
    assert len(experts) > 1 and several == KERNELS - {"scan_kernel"}, "one program sums up what the others counted"


@pytest.mark.parametrize("dtype", [torch.bfloat16], ids=str)
def test_the_lowered_ir_gives_the_same_bits(executed: list[tuple[Any, Any]], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """After pipelining and the choice of matrix instructions, for three generations: Triton's passes kept the kernels' meaning.

    (fp32 is not asked: a sum across lanes takes the order of the layout that a target chooses, and nothing rounds it afterwards.)
    """
    with using(**TALL):
        memory_tests.whole_pass("gelu-bias", memory_tests.GATING["grouped"], dtype)
    monkeypatch.undo()
    assert {record.fn_name for record, _ in executed} == KERNELS
    try:
        for capability, instruction in INSTRUCTIONS.items():
            harness._install_fake_driver(capability)
            target = harness.target_for("cpu", capability)
            used = 0
            for record, before in executed:
                ir = harness.ir_for_launch(record, "ttgir", target)
                used += instruction in ir
                after = harness.execute(record, ir)
                assert after.failure is None, (capability, record.fn_name, after.failure)
                for name in record.bases:
                    one, other = (np.ascontiguousarray(run.buffer(record, name)).view(np.uint8) for run in (before, after))
                    np.testing.assert_array_equal(one, other, err_msg=f"sm_{capability}: {record.fn_name}, {name}")
            assert used >= 4, f"{instruction} in {used} kernels for sm_{capability}"
    finally:
        harness._install_fake_driver(90)


# Two programs that write one and the same value are no race to this engine.
HARMLESS = {"every column tile writes the gate's gradient"}
SEEN_BY_ITSELF = [fault for fault in FAULTS if fault.check == "memory" and fault.name not in HARMLESS]


@pytest.mark.parametrize("fault", SEEN_BY_ITSELF, ids=lambda fault: fault.name)
def test_the_engine_sees_a_planted_fault(fault: Any) -> None:
    """It stops at an access that must not be; or what nobody wrote, or several programs wrote, is left as NaN."""
    name, gating = fault.on.split()
    blocks = {"up": SMALL, "product": Blocks(32, 16, 16, group=2), "activation": SMALL, "weight": SMALL, "combine": Blocks(16, 16)}
    try:
        with planted(fault), using(**blocks):
            tensors = memory_tests.whole_pass(name, memory_tests.GATING[gating])
    except sanitize.KernelFault as stop:
        assert stop.fault.kind in ("oob_read", "oob_write", "race", "poison")
    else:
        assert any(tensor.isnan().any() for tensor in tensors)


def test_the_engine_is_content_with_the_kernels_as_they_are() -> None:
    for name, gating in sorted({tuple(fault.on.split()) for fault in SEEN_BY_ITSELF}):
        assert not any(tensor.isnan().any() for tensor in memory_tests.whole_pass(name, memory_tests.GATING[gating]))
