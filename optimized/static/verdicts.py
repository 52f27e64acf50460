"""What the figures must be. Every function returns what is wrong, in words; nothing is good that was not looked at."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from .targets import TARGETS

Row = Mapping[str, Any]

PRODUCTS = ("up", "down", "rows' gradient", "activation's gradient", "up's gradient", "down's gradient")
LARGE_TILE = 64  # rows from which on wgmma and tcgen05 exist
REGISTERS = 16  # how far from the recorded number a compiler of the same version may be
MOST_LAUNCHES = {"forward": 7, "backward": 7, "inference": 7}
MOST_BYTES = {role: 1.02 for role in PRODUCTS} | {
    "route": 1.10, "combine": 1.10, "input's gradient": 1.10, "router's gradient": 1.10
}  # fmt: skip


def name(row: Row) -> str:
    """A row in a few words."""
    sizes = "×".join(str(row["blocks"][part]) for part in ("rows", "columns", "depth", "block") if part in row["blocks"])
    options = f"{row['blocks']['warps']} warps, {row['blocks']['stages']} stages"
    return f"{row['target']}, {row['role']}, {'/'.join(row['dtypes'])}, {sizes}, {options} ({', '.join(row['models'])})"


def matrix_kind(row: Row) -> str:
    """The matrix instruction that a row must use, "" for none."""
    target = TARGETS[row["target"]]
    if row["role"] not in PRODUCTS or (row["dtypes"] == ["float32"] and target.backend == "cuda"):
        return ""
    return target.matrix if target.backend != "cuda" or row["blocks"]["rows"] >= LARGE_TILE else "mma"


def faults(row: Row) -> list[str]:
    """Why this compiled kernel must not be kept; empty for a good one."""
    if "error" in row:
        return [f"does not compile: {row['error']}"]
    target, wanted, found = TARGETS[row["target"]], matrix_kind(row), []
    if row["spilled"]:
        found.append(f"spills {row['spilled']} {'bytes' if target.backend == 'cuda' else 'registers or bytes'}")
    if row["loop_local"]:
        found.append(f"{row['loop_local']} accesses to local memory in the loop")
    if row["shared"] > target.program_shared or not row["resident"]:
        found.append(f"needs {row['shared']} bytes of shared memory and {row['registers']} registers, of which no core has so many")
    if row["matrix"] != wanted:
        found.append(f"multiplies with {row['matrix'] or 'no matrix instruction'} instead of {wanted or 'none'}")
    if wanted and not row["loop_matrix"]:
        found.append("has no matrix instruction in its loop")
    if row["role"] in PRODUCTS and target.backend == "cuda" and not row["loop_async"]:
        found.append("has no asynchronous load in its loop")
    return found


def broken_rows(rows: Iterable[Row]) -> list[str]:
    """Kept rows that must not be kept."""
    return [f"{name(row)}: {fault}" for row in rows if row["origin"] != "rejected" for fault in faults(row)]


def unfounded_rejections(rows: Iterable[Row]) -> list[str]:
    """Refused blocks of which every specialisation is good after all."""
    refused: dict[tuple[Any, ...], list[bool]] = {}
    for row in rows:
        if row["origin"] == "rejected":
            blocks = (row["target"], row["role"], *row["blocks"].items())
            refused.setdefault(blocks, []).append(bool(faults(row)))
    return [f"{blocks[0]}, {blocks[1]}, {dict(blocks[2:])} is refused without a fault" for blocks, bad in refused.items() if not any(bad)]


def key(row: Row) -> tuple[str, str]:
    """What tells a row of a result from its others."""
    return row["target"], row["identity"]


def changed_registers(rows: Iterable[Row], recorded: Iterable[Row]) -> list[str]:
    """Rows whose registers are not within 16 of the recorded number, and rows that were never recorded."""
    known = {key(row): row for row in recorded}
    found = []
    for row in rows:
        before = known.get(key(row))
        if before is None:
            found.append(f"{name(row)}: not in the recorded table; run `moebius kernels` again and commit it")
        elif "error" not in row and abs(row["registers"] - before.get("registers", -1000)) > REGISTERS:
            found.append(f"{name(row)}: {row['registers']} registers, recorded {before.get('registers')}")
    return found


def wasteful_layers(layers: Iterable[Row]) -> list[str]:
    """Layers with too many launches, bytes or FLOPs."""
    found = []
    for layer in layers:
        where = f"{layer['model']} on {layer['target']}"
        for part, number in layer["launches"].items():
            if number > MOST_LAUNCHES[part]:
                found.append(f"{where}: {number} launches in the {part} pass, at most {MOST_LAUNCHES[part]}")
        for role, done in layer["work"].items():
            if done["touched"] > MOST_BYTES[role] * done["least"]:
                found.append(
                    f"{where}, {role}: touches {done['touched'] / done['least']:.3f} × the bytes it must, at most {MOST_BYTES[role]}"
                )
            if done["executed"] > done["bound"] * done["useful"]:
                found.append(f"{where}, {role}: executes {done['executed'] / done['useful']:.3f} × the FLOPs, at most {done['bound']:.3f}")
    return found


def problems(data: Mapping[str, Any], recorded: Mapping[str, Any] | None = None) -> list[str]:
    """Everything that is wrong with a result; recorded: an earlier one of the same version of Triton."""
    rows = data["rows"]
    found = broken_rows(rows) + unfounded_rejections(rows) + wasteful_layers(data["layers"])
    return found + ([] if recorded is None else changed_registers(rows, recorded["rows"]))
