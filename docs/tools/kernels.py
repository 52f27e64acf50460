"""Tables of the kernels' page: contracts from the docstrings, static figures from the committed result."""

from __future__ import annotations

import ast
import functools
import json
import re
from collections.abc import Callable, Sequence, Set
from functools import partial
from typing import Any

import sources
from layout import definitions, digits, markdown, tabs
from marks import APART, mark

from optimized.static import verdicts

TESTED = "3.7.1"
RESULTS = "docs/results/kernels-{}.json"
PARTS = {"Grid:": "grid", "A program owns": "one program owns", "Equals:": "equals", "Rounds at:": "rounds", "Limits:": "limits"}
SHORT = {"bfloat16": "bf16", "float16": "fp16", "tf32": "tf32", "float32": "fp32", "int32": "int32"}
NBSP, HYPHEN = "\u00a0", "\u2011"
"""A space and a hyphen at which no line ends."""
Rows = Sequence[dict[str, Any]]


@functools.cache
def result(version: str = TESTED) -> dict[str, Any]:
    """What `moebius kernels` wrote with a version of Triton; with the tested one, what was refused too."""
    return json.loads((sources.ROOT / RESULTS.format(version)).read_text(encoding="utf-8"))


def recorded() -> list[str]:
    """Every version of Triton with a committed result, the oldest first."""
    found = [path.stem.partition("-")[2] for path in sources.ROOT.glob(RESULTS.format("*"))]
    return sorted(found, key=lambda version: [int(part) for part in version.split(".")])


def contract(kernel: str) -> str:
    """What a kernel promises: its docstring, part by part."""
    tree = ast.parse(sources.find(f"optimized.kernels.{kernel}").text)
    assert isinstance(tree.body[0], ast.FunctionDef)
    told = " ".join((ast.get_docstring(tree.body[0]) or "").split())
    pieces = re.split("(" + "|".join(map(re.escape, PARTS)) + ")", told)
    named = {PARTS[key]: text.strip() for key, text in zip(pieces[1::2], pieces[2::2], strict=True)}
    owns, _, arrays = named.pop("one program owns", "").partition(". ")
    rows = [["computes", pieces[0].strip()], ["grid", named.pop("grid")]]
    rows += [["one program owns", owns]] if owns else []
    rows += [["arrays", arrays]] if arrays else []
    names = {argument.arg for argument in tree.body[0].args.args} | {"max_tiles"}  # by which a launch's grid is bounded
    return f"### `{kernel}`\n\n" + definitions([[key, _marked(text.rstrip("."), names)] for key, text in rows + list(named.items())])


def _marked(text: str, names: Set[str]) -> str:
    """A part of a docstring as Markdown: what a kernel takes with its shape, names and symbols are marked."""
    taken = re.compile(rf"\b({'|'.join(filter(str.isupper, names))})\b(?!\[)(?: \[[^\]]*\])?")

    def marked(found: re.Match[str]) -> str:
        alone = len(found[0]) == 1  # a letter, which is a size
        return found[0] if alone else f"`{found[0].replace(' ', NBSP)}`"

    plain = (part if part.startswith("`") else taken.sub(marked, part) for part in APART.split(text))
    escaped = (part if part.startswith("`") else part.replace("<", "&lt;").replace("*", "\\*") for part in APART.split("".join(plain)))
    return mark("".join(escaped), names)


def _span(values: Sequence[float], places: int = 0) -> str:
    low, high = digits(min(values), places), digits(max(values), places)
    return low if low == high else f"{low} – {high}"


def _tile(blocks: dict[str, int]) -> str:
    return "×".join(str(blocks[part]) for part in ("rows", "columns", "depth", "block") if blocks.get(part))


def _groups(rows: Rows) -> dict[str, dict[tuple[Any, ...], list[dict[str, Any]]]]:
    """Rows by target, and there by dtypes, origin and blocks."""
    found: dict[str, dict[tuple[Any, ...], list[dict[str, Any]]]] = {}
    for row in rows:
        key = (tuple(row["dtypes"]), row["origin"], tuple(row["blocks"].items()))
        found.setdefault(row["target"], {}).setdefault(key, []).append(row)
    return found


def figures(*roles: str) -> str:
    """The static figures of the kept blocks of some roles, a tab for each target; over all specialisations the lowest and the highest."""
    rows = [row for row in result()["rows"] if row["role"] in roles and row["origin"] != "rejected"]
    return tabs({target: _target(groups) for target, groups in _groups(rows).items()})


def _target(groups: dict[tuple[Any, ...], list[dict[str, Any]]]) -> str:
    """One target's table. No column says what no kept kernel has: spills, and what none of these kernels does."""
    shown = []
    for (dtypes, origin, blocks), own in groups.items():
        sizes, matrix = dict(blocks), sorted({row["matrix"] for row in own} - {""})
        copies = [row["loop_async"] for row in own]
        shown.append([
            "/".join(SHORT[dtype] for dtype in dtypes), f"{_tile(sizes)}{NBSP}*" if origin == "alternative" else _tile(sizes),
            f"{sizes['warps']}/{sizes['stages']}", _span([row["registers"] for row in own]), _span([row["shared"] / 1024 for row in own]),
            _span([row["occupancy"] for row in own], 2),
            f"{'/'.join(matrix)} × {_span([row['matrix_count'] for row in own])}".replace(" ", NBSP) if matrix else "–",
            _span(copies) if any(copies) else "–",
        ])  # fmt: skip
    header = ["dtype", "blocks", "warps/<wbr>stages", "registers", "shared, KiB", "occu&shy;pancy", "matrix", "async copies"]
    told = [place for place, column in enumerate(zip(*shown, strict=True)) if set(column) != {"–"}]
    return markdown([header[place] for place in told], [[row[place] for place in told] for row in shown])


def rejections() -> str:
    """Every block size that was tried and refused, its worst fault, and how many of its specialisations have one; a tab for each target."""
    rows = [row for row in result()["rows"] if row["origin"] == "rejected"]
    shown: dict[str, dict[tuple[str, str], list[tuple[int, str]]]] = {}
    for row in rows:
        blocks, found = row["blocks"], verdicts.faults(row)
        where = f"{'/'.join(SHORT[dtype] for dtype in row['dtypes'])}, {', '.join(row['models'])}"
        key = row["role"], f"{_tile(blocks)}, {blocks['warps']}/{blocks['stages']}"
        fault = row.get("spilled", 0), f"{found[0]} ({where})" if found else ""
        shown.setdefault(row["target"], {}).setdefault(key, []).append(fault)
    header = ["kernel, blocks, warps / stages", "the worst fault", "faulty"]

    def one(groups: dict[tuple[str, str], list[tuple[int, str]]]) -> str:
        rows = []
        for key, own in groups.items():
            faulty = f"{sum(bool(text) for _, text in own)} of {len(own)}".replace(" ", NBSP)
            rows.append(["<br>".join(key), max(own)[1], faulty])
        return markdown(header, rows, numbers=False)

    return tabs({target: one(groups) for target, groups in shown.items()})


def layers() -> str:
    """One layer of every model: launches, bytes and FLOPs against what has to be; targets of which all is equal in one row."""
    shown: dict[tuple[str, ...], list[str]] = {}
    for layer in result()["layers"]:
        products = {role: done for role, done in layer["work"].items() if done["useful"]}
        others = [done["touched"] / done["least"] for role, done in layer["work"].items() if role not in products]
        flops, bound = max((done["executed"] / done["useful"], done["bound"]) for done in products.values())
        moved = max(done["touched"] / done["least"] for done in products.values())
        launches = f"{layer['launches']['forward']} + {layer['launches']['backward']}"
        told = layer["model"].replace("-", HYPHEN), launches, *(digits(value) for value in (moved, max(others), flops, bound))
        shown.setdefault(told, []).append(layer["target"])
    targets = list(dict.fromkeys(layer["target"] for layer in result()["layers"]))
    rows = [[model, "all" if own == targets else ", ".join(own), *numbers] for (model, *numbers), own in shown.items()]
    return markdown(["model", "targets", "launches", "bytes, products", "bytes, others", "FLOPs", "FLOPs may be"], rows)


def versions() -> str:
    """What each Triton makes of the kernels in bf16, target by target: of the specialisations that all of their tables hold."""
    tables = {version: {verdicts.key(row): row for row in result(version)["rows"]} for version in recorded()}
    kept = [key for key, row in tables[TESTED].items() if row["origin"] != "rejected" and all(key in table for table in tables.values())]
    shown = []
    for version, table in tables.items():
        for target in dict.fromkeys(target for target, _ in kept):
            own = [(table[key], tables[TESTED][key]) for key in kept if key[0] == target]
            code = [(row, tested) for row, tested in own if "error" not in row]
            moved = sum(abs(row["registers"] - tested["registers"]) > verdicts.REGISTERS for row, tested in code)
            shown.append([
                version, target, len(own), sum(bool(verdicts.faults(row)) for row, _ in own), sum(row["spilled"] for row, _ in code),
                _span([row["registers"] for row, _ in code]), "/".join(sorted({row["matrix"] for row, _ in code} - {""})), moved,
            ])  # fmt: skip
    return markdown(["Triton", "target", "compiled", "faulty", "spilled", "registers", "matrix", "far"], shown)


def version_faults() -> str:
    """Everything that is wrong with what another Triton makes of the kernels."""
    found = [(version, fault) for version in recorded() for fault in result(version)["problems"]]
    return markdown(["Triton", "fault"], found, numbers=False) if found else "No version makes a kernel with a fault."


def counts() -> dict[str, Any]:
    """What the page's sentences say about the result."""
    data = result()
    kept = [row for row in data["rows"] if row["origin"] != "rejected"]
    return {
        "triton": data["triton"], "far": verdicts.REGISTERS, "tokens": data["layers"][0]["tokens"],
        "kept": len(kept), "spilled": sum(row["spilled"] for row in kept),
        "bytes": digits(verdicts.MOST_BYTES["up"], 2), "other_bytes": digits(verdicts.MOST_BYTES["combine"], 2),
        "launches": _span([part for layer in data["layers"] for part in (layer["launches"]["forward"], layer["launches"]["backward"])]),
        "rejected": len({(row["target"], row["role"], *row["blocks"].values()) for row in data["rows"] if row["origin"] == "rejected"}),
    }  # fmt: skip


KERNELS: dict[str, tuple[str, ...]] = {
    "route_kernel": ("route",), "route_backward_kernel": ("router's gradient",), "histogram_kernel": ("histogram",),
    "scan_kernel": ("scan",), "scatter_kernel": ("scatter",), "restore_kernel": ("restore",), "project_up_kernel": ("up",),
    "expert_product_kernel": ("down", "rows' gradient"), "combine_kernel": ("combine", "input's gradient"),
    "activation_gradient_kernel": ("activation's gradient",), "weight_gradient_kernel": ("up's gradient", "down's gradient"),
}  # fmt: skip

TABLES: dict[str, Callable[[], str]] = {
    **{f"contract {kernel}": partial(contract, kernel) for kernel in KERNELS},
    **{f"figures {kernel}": partial(figures, *roles) for kernel, roles in KERNELS.items()},
    "kernel-rejections": rejections,
    "kernel-layers": layers,
    "kernel-versions": versions,
    "kernel-version-faults": version_faults,
}
