"""The interpreter's arithmetic: what the stock one gets wrong, and that the repaired one equals PyTorch."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import REPOSITORY

pytest.importorskip("triton")

# Runs in a process of its own, since a repair lasts as long as its process. It prints what the interpreter computes before and after.
PROBE = """
import importlib.util, json, sys
import torch, triton, triton.language as tl
from triton.runtime import JITFunction

@triton.jit
def elementwise(A, B, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    a, b = tl.load(A + at), tl.load(B + at)
    tl.store(OUT + at, a + b)
    tl.store(OUT + N + at, a * b)
    tl.store(OUT + 2 * N + at, tl.maximum(a, b))
    tl.store(OUT + 3 * N + at, tl.where(a < b, a, b))
    tl.store(OUT + 4 * N + at, -a)
    tl.store(OUT + 5 * N + at, a - b)

@triton.jit
def narrow(A, OUT, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(OUT + at, tl.load(A + at).to(tl.bfloat16))

@triton.jit
def add_up(A, OUT, M: tl.constexpr, N: tl.constexpr):
    a = tl.load(A + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(OUT + tl.arange(0, M), tl.max(a, 1))
    tl.store(OUT + M + tl.arange(0, M), tl.sum(a, 1))

@triton.jit
def multiply(A, B, OUT, N: tl.constexpr, PRECISION: tl.constexpr):
    i, j = tl.arange(0, N)[:, None], tl.arange(0, N)[None, :]
    out = tl.dot(tl.load(A + i * N + j), tl.load(B + i * N + j), input_precision=PRECISION)
    tl.store(OUT + i * N + j, out)

def probe():
    torch.manual_seed(0)
    found = {}
    n = 1024
    a, b = torch.randn(2, n).bfloat16()
    out = torch.zeros(6, n, dtype=torch.bfloat16)
    elementwise[(1,)](a, b, out, n)
    want = torch.stack([a + b, a * b, torch.maximum(a, b), torch.where(a < b, a, b), -a, a - b])
    for name, got, exact in zip(("add", "multiply", "maximum", "compare", "negate", "subtract"), out, want):
        found[name] = float((got == exact).float().mean())
    values = torch.cat([torch.randn(n - 4) * 3, torch.tensor([1.99999, 3.4e38, float("inf"), -0.0])])
    got = torch.zeros(n, dtype=torch.bfloat16)
    narrow[(1,)](values, got, n)
    found["cast"] = float((got.view(torch.int16) == values.bfloat16().view(torch.int16)).float().mean())
    rows, out = torch.randn(32, 32).bfloat16(), torch.zeros(2, 32)
    add_up[(1,)](rows, out, 32, 32)
    found["max"] = float((out[0] == rows.float().amax(1)).float().mean())
    total = rows.double().sum(1)
    found["sum_error"] = float(((out[1] - total).norm() / total.norm()).nan_to_num(9e9, 9e9, 9e9))
    kinds = {"bf16": torch.bfloat16, "fp16": torch.float16, "ieee": torch.float32, "tf32": torch.float32}
    for name, dtype in kinds.items():
        precision = "tf32" if name == "tf32" else "ieee"
        x, y = torch.randn(2, 32, 32).to(dtype)
        out = torch.zeros(32, 32)
        multiply[(1,)](x, y, out, 32, precision)
        exact = x.double() @ y.double()
        found["dot_" + name] = float(((out - exact).norm() / exact.norm()).nan_to_num(9e9, 9e9, 9e9))
    return found

spec = importlib.util.spec_from_file_location("repairs", sys.argv[1])
repairs = importlib.util.module_from_spec(spec)
spec.loader.exec_module(repairs)
assert repairs.is_interpreting()
stock = probe()
repairs.repair()
repairs.repair()
print(json.dumps({"stock": stock, "repaired": probe()}))
"""


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    script = tmp_path_factory.mktemp("probe") / "probe.py"
    script.write_text(PROBE)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, str(script), str(REPOSITORY / "optimized/kernels/interpreter.py")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_stock_interpreter_is_wrong_in_bfloat16(probed: dict[str, dict[str, float]]) -> None:
    # If this fails, Triton was repaired upstream, and ours may go.
    stock = probed["stock"]
    assert max(stock["add"], stock["multiply"], stock["subtract"]) < 0.1
    assert stock["compare"] < 0.9
    assert stock["cast"] < 0.9
    assert stock["dot_bf16"] > 1
    assert stock["dot_tf32"] < 1e-5, "the stock interpreter does not round the operands of a tf32 product"


def test_the_repaired_interpreter_equals_pytorch(probed: dict[str, dict[str, float]]) -> None:
    repaired = probed["repaired"]
    for name in ("add", "multiply", "maximum", "compare", "negate", "subtract", "cast", "max"):
        assert repaired[name] == 1.0, name
    for name in ("dot_bf16", "dot_fp16", "dot_ieee"):
        assert repaired[name] < 5e-7, name
    assert repaired["sum_error"] < 1e-2
    assert 5e-5 < repaired["dot_tf32"] < 1e-3


def test_every_bfloat16_is_read_and_rounded_as_pytorch_does() -> None:
    from optimized.kernels.interpreter import bfloat16_of, float32_of

    bits = np.arange(1 << 16, dtype=np.uint16)
    values = float32_of(bits)
    theirs = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16).float().numpy()
    np.testing.assert_array_equal(values, theirs)
    numbers = ~np.isnan(values)
    np.testing.assert_array_equal(bfloat16_of(values)[numbers], bits[numbers])
    between = (np.arange(0, 1 << 32, 104729, dtype=np.uint64)).astype(np.uint32).view(np.float32)
    ours = float32_of(bfloat16_of(between))
    np.testing.assert_array_equal(ours, torch.from_numpy(between).bfloat16().float().numpy())


def test_tf32_keeps_ten_bits() -> None:
    from optimized.kernels.interpreter import tf32_of

    values = np.array([1.0, 1 + 2.0**-10, 1 + 2.0**-11, 1 + 1.9 * 2.0**-10, -1 - 2.0**-11, np.inf, 0.0], np.float32)
    expected = np.array([1.0, 1 + 2.0**-10, 1.0, 1 + 2.0**-10, -1.0, np.inf, 0.0], np.float32)
    np.testing.assert_array_equal(tf32_of(values), expected)


def test_a_row_of_a_product_has_the_same_bits_wherever_it_lies() -> None:
    from optimized.kernels.interpreter import ordered_product

    rng = np.random.default_rng(0)
    for m, k, n in ((16, 16, 16), (16, 64, 32), (64, 32, 128)):
        left, right = (rng.standard_normal(shape).astype(np.float32) for shape in ((m, k), (k, n)))
        whole = ordered_product(left, right, np.float32)
        np.testing.assert_allclose(whole, left.astype(np.float64) @ right, rtol=0, atol=1e-5 * k)
        moved = rng.permutation(m)
        np.testing.assert_array_equal(ordered_product(left[moved], right, np.float32), whole[moved])
        np.testing.assert_array_equal(ordered_product(np.asfortranarray(left), np.asfortranarray(right), np.float32), whole)
