"""Building and finding the C library: once, whole, beside other processes, and with a reason where it cannot be."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, needs_tool

from optimized import native_backend
from optimized.contracts import CONTRACTS
from optimized.native import build
from optimized.native.build import FLAGS, UnavailableError
from optimized.native.library import Library, load
from optimized.proofs import experts_outputs, prove
from optimized.yardstick import farthest
from reference.autograd import apply_experts as eager_apply_experts
from reference.experts import ffn_keys
from reference.proof.cases import Inputs, draw, get
from reference.proof.equal import round_to
from reference.proof.parity import assert_experts_equal, experts_truth

QUICK = (*(flag for flag in FLAGS if flag != "-O3"), "-O0")  # what is built here is loaded and not timed
LAYER = """
import torch
from optimized.layer import MoE, MoEConfig

moe = MoE(MoEConfig(4))
print(moe.backend, *(tuple(moe(torch.ones(2, 4))[0].shape) for _ in range(2)))
try:
    MoE(MoEConfig(4), backend="native")(torch.ones(2, 4))
except ValueError as error:
    print(error)
"""


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a temporary directory that is nobody else's."""
    needs_tool("cc")
    monkeypatch.setenv("MOEBIUS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build.tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The compiler runs that made a library."""
    made: list[list[str]] = []

    def run(command: list[str], original: Callable = build._run) -> str:
        if "-o" in command:
            made.append(command)
        return original(command)

    monkeypatch.setattr(build, "_run", run)
    return made


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=REPOSITORY, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_a_library_is_built_once(cache: Path, compilations: list) -> None:
    path = build.library_path(QUICK)
    assert path.parent == cache and os.listdir(cache) == [path.name]
    assert build.library_path(QUICK) == path and len(compilations) == 1
    Library(path)


@pytest.mark.parametrize("content", [b"", b"\x7fELF not a library", None], ids=["empty", "garbage", "truncated"])
def test_a_damaged_library_is_built_again(content: bytes | None, cache: Path, compilations: list) -> None:
    path = build.library_path(QUICK)
    whole = path.read_bytes()
    path.unlink()  # writing into the file would change what another test has loaded
    path.write_bytes(whole[: len(whole) // 2] if content is None else content)
    again = build.library_path(QUICK)
    assert len(compilations) == 2
    Library(again)
    assert build.library_path(QUICK) == again and len(compilations) == 2


def test_the_name_depends_on_everything_that_is_compiled(cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = build.compiler()
    names = {build.key(command, QUICK), build.key(command, (*QUICK, "-DMOEBIUS_PLAIN"))}
    monkeypatch.setattr(build, "cpu_features", lambda: "flags: none")
    names.add(build.key(command, QUICK))
    monkeypatch.setattr(build, "_run", lambda command: "another compiler")
    names.add(build.key(command, QUICK))
    sources = tmp_path / "sources"
    shutil.copytree(build.SOURCES, sources)
    monkeypatch.setattr(build, "SOURCES", sources)
    assert build.key(command, QUICK) in names
    with (sources / "simd.h").open("a") as file:
        file.write("\n")
    names.add(build.key(command, QUICK))
    assert len(names) == 5


def test_processes_that_build_at_once_all_get_a_library(cache: Path) -> None:
    code = f"import ctypes; from optimized.native.build import library_path as path; print(ctypes.CDLL(str(path({QUICK!r})))._name)"
    running = [
        subprocess.Popen([sys.executable, "-c", code], cwd=REPOSITORY, env=dict(os.environ), stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=120)[0].strip() for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert all(Path(output).parent == cache for output in outputs)
    assert set(outputs) == {str(cache / name) for name in os.listdir(cache)}  # and nothing half-made is left


def test_a_cache_that_cannot_be_written_is_replaced_by_a_private_directory(cache: Path, tmp_path: Path, compilations: list) -> None:
    cache.write_text("a file where the directory should be")  # permissions would not stop root
    path = build.library_path(QUICK)
    assert path.parent == tmp_path / f"moebius-{os.getuid()}"
    assert path.parent.stat().st_mode & 0o077 == 0
    assert build.library_path(QUICK) == path and len(compilations) == 1


@pytest.mark.skipif(os.getuid() == 0, reason="root writes anywhere")
def test_a_cache_without_write_permission(cache: Path, tmp_path: Path) -> None:
    cache.mkdir(mode=0o500)
    assert build.library_path(QUICK).parent == tmp_path / f"moebius-{os.getuid()}"


def test_a_read_only_cache_that_holds_the_library_is_used(cache: Path, compilations: list, monkeypatch: pytest.MonkeyPatch) -> None:
    path = build.library_path(QUICK)
    monkeypatch.setattr(build.tempfile, "mkstemp", lambda **_: pytest.fail("nothing has to be written"))
    assert build.library_path(QUICK) == path and len(compilations) == 1


def test_a_temporary_directory_that_others_can_write_to_is_not_trusted(cache: Path, tmp_path: Path) -> None:
    cache.write_text("")
    open_to_all = tmp_path / f"moebius-{os.getuid()}"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    path = build.library_path(QUICK)
    assert path.parent != open_to_all and path.parent.stat().st_mode & 0o077 == 0


def test_a_file_that_is_not_our_library_is_refused(tmp_path: Path) -> None:
    compiler = needs_tool("cc")
    (tmp_path / "garbage.so").write_bytes(b"no library")
    with pytest.raises(UnavailableError, match="cannot be loaded"):
        Library(tmp_path / "garbage.so")
    for name, source, reason in (
        ("empty", "int other;", "cannot be loaded"),
        ("old", "long moebius_abi(void) { return 7; }", "interface 7, not"),
    ):
        (tmp_path / f"{name}.c").write_text(source)
        subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / f"{name}.so", tmp_path / f"{name}.c"], check=True)
        with pytest.raises(UnavailableError, match=reason):
            Library(tmp_path / f"{name}.so")


def test_without_a_compiler_another_backend_runs_and_one_warning_says_why(tmp_path: Path) -> None:
    done = run_python(LAYER, CC="no-such-compiler", MOEBIUS_CACHE=str(tmp_path))
    assert done.returncode == 0, done.stderr
    automatic, named = done.stdout.splitlines()
    assert automatic == "torch (2, 4) (2, 4)"
    assert "'native' cannot run" in named and "no-such-compiler" in named
    assert done.stderr.count("no-such-compiler") == 1 and "UserWarning" in done.stderr


def test_the_reason_names_what_fails(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "broken-cc"
    broken.write_text('#!/bin/sh\ncase "$1" in --version) echo 1;; *) echo "no header today" >&2; exit 3;; esac\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CC", str(broken))
    with pytest.raises(UnavailableError, match="no header today"):
        build.tuned_library_path()
    assert os.listdir(cache) == []
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(UnavailableError, match="no C compiler"):
        build.tuned_library_path()


def test_a_compiler_with_arguments_is_understood(cache: Path, monkeypatch: pytest.MonkeyPatch, compilations: list) -> None:
    monkeypatch.setenv("CC", f"{needs_tool('cc')} -DMOEBIUS_PLAIN")
    assert Library(build.library_path(QUICK)).instruction_set == "plain"
    assert "-DMOEBIUS_PLAIN" in compilations[0]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_clang_builds_it_too(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", needs_tool("clang"))
    library = Library(build.tuned_library_path())
    monkeypatch.setattr(native_backend, "load", lambda: library)
    for case in NEON_CASES:
        assert prove(CONTRACTS["optimized.native_backend.apply_experts"], get(case), dtype), case


# ---- NEON, which this machine does not have: the same source under an emulator, file to file ----

DRIVER = r"""
#include <stdio.h>
#include "moe.c"

static void *take(FILE *from, int64_t bytes) {
    char *at = calloc(1, bytes + 64);
    if (fread(at, 1, bytes, from) != (size_t)bytes) exit(3);
    return at;
}

int main(int count, char **names) {
    FILE *in = fopen(names[1], "rb"), *out = fopen(names[2], "wb");
    int64_t sizes[9];
    if (count != 3 || fread(sizes, 8, 9, in) != 9) return 3;
    struct moebius_call c = {sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5], sizes[6], sizes[7]};
    const int64_t T = c.tokens, K = c.slots, E = c.experts, D = c.d_model, F = c.width, size = c.bf16 ? 2 : 4;
    const int64_t M = activations[c.activation].gated ? 2 * F : F, biased = sizes[8];
    c.x = take(in, T * D * size), c.expert = take(in, T * K * 8), c.gate = take(in, T * K * 4), c.keep = take(in, T * K);
    c.up = take(in, E * M * D * size), c.down = take(in, E * D * F * size);
    if (biased) c.up_bias = take(in, E * M * size), c.down_bias = take(in, E * D * size);
    c.dy = NULL;
    c.order = calloc(T * K + 1, 4), c.bounds = calloc(E + 1, 4), c.pre = calloc(T * K * M + 1, size), c.y = calloc(T * D + 1, size);
    void *dy = take(in, T * D * size);
    int64_t packed[2];
    moebius_packed_elements(&c, packed);
    c.packed_up = calloc(packed[0], size), c.packed_down = calloc(packed[1], size);
    if (moebius_pack(&c) || moebius_forward(&c)) return 4;
    c.dy = dy, c.dx = calloc(T * D + 1, size), c.dgate = calloc(T * K + 1, 4);
    c.dup = calloc(E * M * D, size), c.ddown = calloc(E * D * F, size);
    if (biased) c.dup_bias = calloc(E * M, size), c.ddown_bias = calloc(E * D, size);
    if (moebius_backward(&c)) return 4;
    fwrite(c.y, size, T * D, out), fwrite(c.dx, size, T * D, out), fwrite(c.dgate, 4, T * K, out);
    fwrite(c.dup, size, E * M * D, out), fwrite(c.ddown, size, E * D * F, out);
    if (biased) fwrite(c.dup_bias, size, E * M, out), fwrite(c.ddown_bias, size, E * D, out);
    puts(moebius_instruction_set());
    return fclose(out);
}
"""
NEON_CASES = (
    "no-tokens",
    "one-token",
    "few-tokens",
    "empty-experts",
    "off-tile-widths",
    "wide",
    "drops",
    "relu",
    "gelu-bias",
    "swiglu-bias",
)


@pytest.fixture(scope="module")
def neon(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The command that runs the driver for 64-bit ARM."""
    compiler, emulator = needs_tool("aarch64-linux-gnu-gcc"), needs_tool("qemu-aarch64-static")
    directory = tmp_path_factory.mktemp("neon")
    (directory / "driver.c").write_text(DRIVER)
    flags = [flag for flag in FLAGS if flag not in ("-shared", "-fPIC")]
    subprocess.run(
        [compiler, *flags, "-static", f"-I{build.SOURCES}", "-o", directory / "driver", directory / "driver.c", "-lm"],
        check=True,
        timeout=120,
    )
    return [emulator, str(directory / "driver")]


def as_bytes(array: np.ndarray, dtype: str) -> bytes:
    tensor = torch.from_numpy(np.ascontiguousarray(array)).to(getattr(torch, dtype))
    return tensor.view(torch.int16).numpy().tobytes() if dtype == "bfloat16" else tensor.numpy().tobytes()


def emulated(command: list[str], directory: Path, inputs: Inputs, dtype: str) -> dict[str, np.ndarray]:
    """What the driver computes, under the names of `experts_truth`."""
    experts, routing = inputs.config.experts, inputs.routing
    keys = ffn_keys("experts", experts)[: 4 if experts.bias else 2]
    sizes = (*routing.expert.shape, experts.count, inputs.config.d_model, experts.width)
    numbers = (*sizes, dtype == "bfloat16", load().activations[experts.activation], 2, experts.bias)
    parts = [np.array(numbers, np.int64).tobytes(), as_bytes(inputs.x, dtype), routing.expert.astype(np.int64).tobytes()]
    parts += [routing.gate.astype(np.float32).tobytes(), routing.keep.astype(np.uint8).tobytes()]
    parts += [as_bytes(inputs.params[key], dtype) for key in keys] + [as_bytes(inputs.dy, dtype)]
    (directory / "in").write_bytes(b"".join(parts))
    done = subprocess.run([*command, directory / "in", directory / "out"], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "neon\n"), done
    data, outputs = (directory / "out").read_bytes(), {}
    shapes = {"y": inputs.x.shape, "dx": inputs.x.shape, "dgate": routing.gate.shape, **{key: inputs.params[key].shape for key in keys}}
    for name, shape in shapes.items():
        kind = torch.float32 if name == "dgate" or dtype == "float32" else torch.bfloat16
        count = int(np.prod(shape))
        own, data = data[: count * kind.itemsize], data[count * kind.itemsize :]
        tensor = torch.frombuffer(bytearray(own), dtype=kind) if count else torch.zeros(0)
        outputs[name] = tensor.double().numpy().reshape(shape)
    assert not data
    return outputs


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", NEON_CASES)
def test_neon_keeps_the_contract(case: str, dtype: str, neon: list[str], tmp_path: Path) -> None:
    inputs = draw(get(case)).rounded(partial(round_to, dtype=dtype))
    inputs = replace(inputs, x=np.ascontiguousarray(inputs.x), dy=np.ascontiguousarray(inputs.dy))
    eager = farthest(lambda turned, _: experts_outputs(eager_apply_experts, turned, dtype), inputs, experts_truth(inputs))
    assert assert_experts_equal(inputs, emulated(neon, tmp_path, inputs, dtype), eager, dtype)
