"""What is read from machine code is what is there, every rule about it bites, and the committed table keeps them all."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY
from static_sample import readings

pytest.importorskip("triton")

from optimized.commands.kernels import ROWS
from optimized.kernels.blocks import ELEMENTWISE, HALF, IEEE, TF32, TF32_OF, Blocks
from optimized.kernels.choices import ALTERNATIVES, REJECTED
from optimized.static import sweep, verdicts
from optimized.static.capture import MODELS, TILED
from optimized.static.figures import AMD, NVIDIA, arithmetic_loop, count, instructions
from optimized.static.sweep import DTYPE_NAMES, MODEL_NAMES, TARGET_NAMES, Plan
from optimized.static.targets import TARGETS
from optimized.static.work import uniform_load
from reference import presets
from reference.autograd.checkpoints import record_text

TESTED, OTHERS = "3.7.1", ("3.6.0", "3.9.0")
TABLES = {version: REPOSITORY / "docs" / "results" / f"kernels-{version}.json" for version in (TESTED, *OTHERS)}
SASS = """
\t.text.kernel:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R2 ;
.L_x_1:
        /*0020*/                   IADD3 R4, R4, 0x1, RZ ;
        /*0030*/               @P0 BRA `(.L_x_1) ;
.L_x_2:
        /*0040*/                   LDGSTS.E.BYPASS.128 [R5], [R2.64] ;
        /*0050*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*0060*/                   LDL R7, [R1+0x4] ;
        /*0070*/                   FFMA R1, R2, R3, R4 ;
        /*0080*/               @P1 BRA `(.L_x_2) ;
        /*0090*/                   HMMA.16816.F32.BF16 R8, R4, R6, R8 ;
        /*00a0*/                   EXIT ;
"""
ASSEMBLY = """
kernel:
\ts_load_dwordx2 s[0:1], s[2:3], 0x0
.LBB0_1:
\tbuffer_load_dwordx4 v[0:3], v4, s[4:7], 0 offen
\tv_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
\tscratch_load_dword v9, off, off
\ts_cbranch_scc1 .LBB0_1
\ts_branch .LBB0_2
.LBB0_2:
\tv_mfma_f32_16x16x16_bf16 a[0:3], v[0:1], v[2:3], a[0:3]
\ts_endpgm
"""


@pytest.mark.parametrize("text, code, length, total", [(SASS, NVIDIA, 5, 2), (ASSEMBLY, AMD, 4, 2)], ids=["nvidia", "amd"])
def test_the_loop_around_the_arithmetic_is_found(text: str, code: Any, length: int, total: int) -> None:
    found, labels = instructions(text, code)
    loop = arithmetic_loop(found, labels, code)
    assert len(loop) == length and count(found, code.matrix) == total
    assert (count(loop, code.matrix), count(loop, code.local)) == (1, 1)
    assert count(loop, code.copies) == (code is NVIDIA)


def test_without_matrix_instructions_the_loop_is_that_of_the_multiplications() -> None:
    found, labels = instructions(SASS.replace("HMMA.16816.F32.BF16", "IADD3"), NVIDIA)
    assert len(arithmetic_loop(found, labels, NVIDIA)) == 5
    assert arithmetic_loop(["EXIT"], {}, NVIDIA) == []


@pytest.mark.parametrize("number", [3, pytest.param(45, marks=pytest.mark.slow)])
def test_the_figures_need_no_analysis_of_the_flow_of_data(number: int) -> None:
    """The disassembler is asked not to make it, which saves about a third of its time."""
    plan = Plan(targets=("sm80", "sm90", "sm100"), models=("OLMoE-1B-7B", "gpt-oss-20b"))
    with sweep.compiling_processes(1) as pool:
        found = pool.submit(readings, plan, number).result()
    assert len(found) == number and [name for name, same in found if not same] == []


def test_occupancy_of_known_kernels() -> None:
    """From NVIDIA's occupancy tables: 255 registers leave one program of 8 warps, 128 two, 32 as many as there are warps for."""
    assert [TARGETS["sm90"].resident(registers, 0, 8) for registers in (255, 128, 64, 32)] == [1, 2, 4, 8]
    assert TARGETS["sm80"].resident(64, 48 * 1024, 4) == 3 and TARGETS["sm80"].resident(64, 170_000, 4) == 0
    assert [TARGETS["gfx942"].resident(registers, 0, 4) for registers in (128, 64, 256)] == [4, 8, 2]
    assert TARGETS["sm90"].occupancy(128, 0, 8) == 0.25


GOOD = {
    "target": "sm90", "origin": "default", "role": "up", "kernel": "project_up_kernel", "identity": "0", "dtypes": ["bfloat16"],
    "models": ["OLMoE-1B-7B"], "blocks": {"rows": 64, "columns": 128, "depth": 64, "warps": 8, "stages": 4}, "registers": 128,
    "spilled": 0, "shared": 163840, "resident": 1, "occupancy": 0.125, "matrix": "wgmma", "matrix_count": 8, "async_copies": 40,
    "loop": 125, "loop_matrix": 8, "loop_async": 10, "loop_local": 0,
}  # fmt: skip
FAULTY: dict[str, tuple[dict[str, Any], str]] = {
    "a spill": ({"spilled": 4}, "spills 4 bytes"),
    "local memory in the loop": ({"loop_local": 1}, "local memory in the loop"),
    "too much shared memory": ({"shared": 233_000}, "bytes of shared memory"),
    "no room for one program": ({"resident": 0}, "bytes of shared memory"),
    "the older instruction": ({"matrix": "mma"}, "mma instead of wgmma"),
    "no matrix instruction": ({"matrix": ""}, "no matrix instruction instead of wgmma"),
    "none in the loop": ({"loop_matrix": 0}, "no matrix instruction in its loop"),
    "loads that wait": ({"loop_async": 0}, "no asynchronous load"),
    "fp32 on tensor cores": ({"dtypes": ["float32"]}, "wgmma instead of none"),
    "a refusal": ({"error": "PTXASError: too much"}, "does not compile"),
    "tcgen05 missing": ({"target": "sm100"}, "wgmma instead of tcgen05"),
}


def test_a_good_row_has_no_fault() -> None:
    assert verdicts.faults(GOOD) == [] and verdicts.broken_rows([GOOD]) == []
    low = {**GOOD, "blocks": {**GOOD["blocks"], "rows": 16}, "matrix": "mma"}
    assert verdicts.faults(low) == [], "wgmma begins at 64 rows"


@pytest.mark.parametrize("name", FAULTY)
def test_every_fault_is_seen(name: str) -> None:
    change, message = FAULTY[name]
    assert any(message in fault for fault in verdicts.faults({**GOOD, **change}))
    assert verdicts.broken_rows([{**GOOD, **change}]) and not verdicts.broken_rows([{**GOOD, **change, "origin": "rejected"}])


def test_a_rejection_needs_a_fault() -> None:
    refused = {**GOOD, "origin": "rejected"}
    assert verdicts.unfounded_rejections([refused]) and not verdicts.unfounded_rejections([refused, {**refused, "spilled": 8}])


@pytest.mark.parametrize("registers, bad", [(128, False), (144, False), (112, False), (145, True), (111, True)])
def test_registers_are_compared_with_the_recorded_ones(registers: int, bad: bool) -> None:
    assert bool(verdicts.changed_registers([{**GOOD, "registers": registers}], [GOOD])) is bad
    assert verdicts.changed_registers([{**GOOD, "identity": "new"}], [GOOD])


def test_waste_is_seen() -> None:
    work = {"least": 1000, "touched": 1010, "useful": 100, "executed": 120, "bound": 1.25}
    layer = {"target": "sm90", "model": "m", "launches": {"forward": 7, "backward": 7, "inference": 6}, "work": {"up": work}}
    assert verdicts.wasteful_layers([layer]) == []
    for change in ({"touched": 1021}, {"executed": 126}):
        assert verdicts.wasteful_layers([{**layer, "work": {"up": {**work, **change}}}])
    assert verdicts.wasteful_layers([{**layer, "launches": {"forward": 8}}])
    router = {**work, "touched": 1101, "useful": 0, "executed": 0}
    assert verdicts.wasteful_layers([{**layer, "work": {"route": router}}])


def test_a_plan_names_what_it_does_not_know() -> None:
    for field, known in (("targets", "sm80"), ("models", "Mixtral"), ("dtypes", "tf32"), ("origins", "default")):
        with pytest.raises(ValueError, match=known):
            Plan(**{field: ("nothing",)})
        with pytest.raises(ValueError, match="is empty"):
            Plan(**{field: ()})
    assert tuple(MODELS) == MODEL_NAMES and tuple(TARGETS) == TARGET_NAMES
    assert {presets.get(name).d_model for name in MODELS.values()} == {2048, 2880, 4096, 7168}


def test_the_quick_plan_is_a_part_of_the_whole_one() -> None:
    quick = Plan(quick=True)
    assert quick.models_of("bfloat16", "default") == MODEL_NAMES
    assert all(len(quick.models_of(dtype, "default")) == 1 for dtype in DTYPE_NAMES[1:])


def test_a_uniform_load_counts_every_assignment() -> None:
    load = uniform_load(100, 8, 3)
    assert sum(load) == 300 and max(load) <= 100 and load == uniform_load(100, 8, 3)


@pytest.mark.parametrize("change, code", [({}, 0), ({"spilled": 4}, 1), ({"registers": 145}, 1)], ids=["good", "spills", "registers"])
def test_the_command_judges_and_writes_a_line_for_each_row(
    change: dict[str, Any], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from optimized.cli import run

    data = {"triton": TESTED, "rows": [GOOD, {**GOOD, "role": "down", **change}], "layers": [], "seconds": 1.0}
    monkeypatch.setattr(sweep, "run", lambda *_, **__: data)
    before, written = tmp_path / "before.json", tmp_path / "written.json"
    before.write_text(json.dumps({**data, "rows": [GOOD]}))
    assert run(["kernels", "--json", str(written), "--against", str(before)]) == code
    text = written.read_text()
    assert json.loads(text) == {**data, "problems": json.loads(text)["problems"]}
    assert [json.loads(line.rstrip(",")) for line in text.splitlines() if line.startswith('{"target"')] == data["rows"]


def read(version: str) -> dict[str, Any]:
    return json.loads(TABLES[version].read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return read(TESTED)


@pytest.mark.parametrize("version", TABLES)
def test_a_committed_table_has_no_problem(version: str) -> None:
    table = read(version)
    assert table["triton"] == version
    assert verdicts.problems(table) == table["problems"] == []
    assert TABLES[version].read_text(encoding="utf-8") == record_text(table, ROWS), "it is not as the command writes it"
    worse = copy.deepcopy(table["rows"][:1])
    worse[0]["spilled"] = 1
    assert verdicts.broken_rows(worse)


def _measured(recorded: dict[str, Any]) -> dict[tuple[str, str, str, str], set[tuple[int, ...]]]:
    found: dict[tuple[str, str, str, str], set[tuple[int, ...]]] = {}
    for row in recorded["rows"]:
        if row["role"] in TILED:
            sizes = tuple(row["blocks"][part] for part in ("rows", "columns", "depth", "warps", "stages"))
            for dtype in row["dtypes"]:
                found.setdefault((row["origin"], row["target"], TILED[row["role"]], dtype), set()).add(sizes)
    return found


def test_the_committed_table_holds_every_block_size_that_is_kept_or_refused(recorded: dict[str, Any]) -> None:
    found = _measured(recorded)
    seen = {(row["target"], model) for row in recorded["rows"] for model in row["models"]}
    assert seen == {(target, model) for target in TARGET_NAMES for model in MODEL_NAMES}

    def there(origin: str, target: str, kernel: str, dtype: str, blocks: Blocks) -> bool:
        return blocks[:5] in found.get((origin, target, kernel, dtype), ())

    for name, target in TARGETS.items():
        for kernel in ("up", "product", "activation", "weight"):
            for dtype in ("bfloat16", "float16"):
                assert there("default", name, kernel, dtype, HALF[target.family][kernel])
                for origin, table in (("alternative", ALTERNATIVES), ("rejected", REJECTED)):
                    for blocks in table[target.family].get(kernel, ()):
                        assert there(origin, name, kernel, dtype, blocks), (origin, name, kernel, dtype, blocks)
            assert there("default", name, kernel, "tf32", TF32_OF.get(name, TF32)[kernel]) and there(
                "default", name, kernel, "float32", IEEE[kernel]
            )
    assert ELEMENTWISE["route"].rows < 256, "a block's load is counted in bytes"


@pytest.mark.parametrize("version", OTHERS)
def test_the_other_versions_compile_everything_that_is_kept_in_bfloat16(version: str, recorded: dict[str, Any]) -> None:
    def compiled(rows: list[dict[str, Any]]) -> set[tuple[Any, ...]]:
        return {(*verdicts.key(row), row["origin"], model) for row in rows if "bfloat16" in row["dtypes"] for model in row["models"]}

    table = read(version)
    assert compiled(table["rows"]) == compiled([row for row in recorded["rows"] if row["origin"] != "rejected"])
    assert {(row["target"], row["role"]) for row in table["rows"]} == {(row["target"], row["role"]) for row in recorded["rows"]}


def test_there_is_a_table_of_every_version_that_is_tested() -> None:
    second = (REPOSITORY / ".ci" / "second-triton").read_text(encoding="utf-8")
    pinned = [
        re.findall(r"^triton==([\d.]+)", (REPOSITORY / name).read_text(), re.MULTILINE)
        for name in ("constraints.txt", "constraints-triton39.txt")
    ]
    assert {*pinned[0], *pinned[1], *re.findall(r"^oldest=(.*)", second, re.MULTILINE)} == set(TABLES)
    assert {path.stem for path in TABLES[TESTED].parent.glob("kernels-*.json")} == {path.stem for path in TABLES.values()}


def test_alternatives_are_not_what_they_stand_beside() -> None:
    for family, table in ALTERNATIVES.items():
        for kernel, tried in table.items():
            everything = [HALF[family][kernel], *tried, *REJECTED[family].get(kernel, ())]
            assert len(set(everything)) == len(everything), (family, kernel)


def test_launches_are_compiled_as_the_launcher_asks_for_them() -> None:
    """One kernel of one layer, compiled here and now, is the recorded one."""
    import triton

    plan = Plan(targets=("sm90",), models=("OLMoE-1B-7B",), dtypes=("bfloat16",), origins=("default",))
    with sweep.compiling_processes(1) as pool:
        total = pool.submit(sweep.count, plan).result()
        row = pool.submit(sweep.measure, plan, 4, False).result()
    assert total == 15 and row["role"] == "up" and verdicts.faults(row) == []
    if triton.__version__ in TABLES:
        assert verdicts.changed_registers([row], read(triton.__version__)["rows"]) == []


@pytest.mark.slow
def test_the_share_of_continuous_integration(tmp_path: Any) -> None:
    """`moebius kernels --quick`: bf16 at every shape, the other dtypes at one, against the recorded table where the version is its own."""
    import triton

    from optimized.cli import run

    against = ["--against", str(TABLES[TESTED])] if triton.__version__ == TESTED else []
    assert run(["kernels", "--quick", "--json", str(tmp_path / "quick.json"), *against]) == 0
    data = json.loads((tmp_path / "quick.json").read_text())
    assert {dtype for row in data["rows"] for dtype in row["dtypes"]} >= set(DTYPE_NAMES) and data["problems"] == []


def test_bad_options_are_named(capsys: pytest.CaptureFixture, tmp_path: Any) -> None:
    from optimized.cli import run

    other = tmp_path / "other.json"
    other.write_text("[]")
    for arguments, message in (
        (["--target", "sm75"], "sm75"), (["--processes", "0"], "--processes is 0"), (["--against", str(other)], "no result of"),
        (["--against", str(tmp_path / "missing")], "missing"),
    ):  # fmt: skip
        assert run(["kernels", *arguments]) == 2
        assert message in capsys.readouterr().err
