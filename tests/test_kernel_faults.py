"""Every line of defence in the kernels is taken away once, and a check must notice; `make kernel-faults` writes by which means."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("triton")

from kernel_checks import INTERPRETED
from test_kernels_memory import KERNELS

if not INTERPRETED:
    pytest.skip("plants faults in Triton's interpreter; on a GPU a fault could take the driver with it", allow_module_level=True)

from faults import checks, plant
from faults.plant import Fault
from faults.report import RESULTS, digest
from faults.table import FAULTS

from optimized.kernels import launch, products


@pytest.fixture(autouse=True)
def _uninitialised_memory_is_nan() -> None:
    """Not here: `checks.poisoned` does it where a check asks for it, and gigabytes that are only addressed must not be touched."""


@pytest.mark.parametrize("fault", [pytest.param(fault, id=fault.name, marks=[] if fault.fast else [pytest.mark.slow]) for fault in FAULTS])
def test_a_planted_fault_is_caught(fault: Fault) -> None:
    with plant.planted(fault):
        found = checks.ask(fault.check, fault.on)
    assert fault.means in found, found


FAST_CONTROLS = {("experts", "swiglu-bias float32"), ("memory", "drops grouped"), ("far", "rows"), ("integers", "many-tokens")}


@pytest.mark.parametrize(
    "check, on",
    [
        pytest.param(*question, marks=[] if question in FAST_CONTROLS else [pytest.mark.slow])
        for question in sorted({(fault.check, fault.on) for fault in FAULTS})
    ],
)
def test_the_kernels_as_they_are_give_no_check_a_reason(check: str, on: str) -> None:
    assert checks.ask(check, on) == {}


def test_there_are_enough_faults_and_every_kernel_has_its_own() -> None:
    names = [fault.name for fault in FAULTS]
    assert len(set(names)) == len(names) >= 30
    assert {fault.kernel for fault in FAULTS} >= KERNELS - {"histogram_kernel", "route_backward_kernel"}
    assert {fault.means for fault in FAULTS} >= {
        "bounds", "race", "parity", "poison", "exact zero", "integers", "batch invariance", "NaN isolation", "far addresses",
    }  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_each_fault_fits_the_source_as_it_is(fault: Fault) -> None:
    patched = plant.patched_source(plant.source_of(fault.module), fault.old, fault.new, fault.module)
    compile(patched, fault.module, "exec")


def test_a_fault_that_no_longer_fits_is_refused() -> None:
    with pytest.raises(ValueError, match=r"occurs 2 times in x\.py, not once"):
        plant.patched_source("a a", "a", "b", "x.py")
    with pytest.raises(ValueError, match=r"occurs 0 times in x\.py, not once"):
        plant.patched_source("a a", "c", "b", "x.py")


def test_a_fault_is_gone_when_its_block_ends() -> None:
    kernel = launch.expert_product_kernel
    fault = next(fault for fault in FAULTS if fault.module == "products")
    with pytest.raises(KeyError), plant.planted(fault):
        assert launch.expert_product_kernel is not kernel and products.expert_product_kernel is not kernel
        raise KeyError
    assert launch.expert_product_kernel is kernel and products.expert_product_kernel is kernel


def test_the_committed_report_is_that_of_these_faults() -> None:
    report = json.loads(RESULTS.read_text(encoding="utf-8"))
    assert [(row["name"], row["digest"]) for row in report["faults"]] == [(fault.name, digest(fault)) for fault in FAULTS]
    assert report["caught"] == report["planted"] == len(FAULTS)
    assert all(fault.means in row["means"] for fault, row in zip(FAULTS, report["faults"], strict=True))
