"""The C kernel on a page: its functions by name, its constants, and a picture of its register tile."""

from __future__ import annotations

import re
import textwrap
from functools import lru_cache

import pictures
import sources
from sources import ROOT

FOLDER = ROOT / "optimized/native"
BOX = 9
COLUMNS = 82
"""What a page shows of a line without scrolling; a comment that is cut cannot be read while scrolling."""


def find(name: str) -> sources.Source:
    """A function of optimized/native with the comment before it. Raises ValueError unless there is exactly one of this name."""
    pattern = re.compile(
        rf"^(?:/\*(?:(?!\*/).)*\*/\n)?(?:static|INLINE|int|void|#define)[^\n;]*\b(?:TYPE\({name}\)|{name})\([^;{{]*\{{\n.*?^\}}",
        re.MULTILINE | re.DOTALL,
    )
    found = [(path, match) for path in sorted(FOLDER.glob("*.[ch]")) for match in pattern.finditer(path.read_text(encoding="utf-8"))]
    if len(found) != 1:
        raise ValueError(
            f"{name!r} is a function of {', '.join(path.name for path, _ in found) or 'no file'} of optimized/native, not of one"
        )
    path, match = found[0]
    return sources.Source(path.relative_to(ROOT).as_posix(), match.string.count("\n", 0, match.start()) + 1, match[0])


def shown(name: str) -> sources.Source:
    """A function as a page shows it: the comment before it goes on in as many lines as it needs."""
    found = find(name)
    comment, end, code = found.text.partition(" */\n")
    if not end or not comment.startswith("/* "):
        return found
    paragraphs = (part.replace("\n *", "") for part in comment.removeprefix("/* ").split("\n *\n *"))
    lines = (textwrap.fill(part.strip(), COLUMNS, subsequent_indent=" * ", break_on_hyphens=False) for part in paragraphs)
    return found._replace(text="/* " + "\n *\n * ".join(lines) + end + code)


@lru_cache(maxsize=16)
def constant(name: str) -> int:
    """A number of moe.c's table of constants. Raises ValueError where there is none of this name."""
    match = re.search(rf"^    {name} = (\d+)(?: << (\d+))?,", (FOLDER / "moe.c").read_text(encoding="utf-8"), re.MULTILINE)
    if match is None:
        raise ValueError(f"moe.c has no constant {name!r}")
    return int(match[1]) << int(match[2] or 0)


def stripes(instruction_set: str = "avx512") -> tuple[int, int]:
    """(numbers in a vector, vectors side by side in a tile) of an instruction set. Raises ValueError for one that simd.h has not."""
    match = re.search(
        rf'INSTRUCTION_SET "{instruction_set}"\n#define LANES (\d+)\n#define STRIPES (\d+)', (FOLDER / "simd.h").read_text(encoding="utf-8")
    )
    if match is None:
        raise ValueError(f"simd.h has no instruction set {instruction_set!r}")
    return int(match[1]), int(match[2])


def _grid(rows: int, columns: int, width: int, chosen: set[tuple[int, int]]) -> str:
    boxes: dict[str, str] = {}
    for row in range(rows):
        for column in range(columns):
            kind = "moe-fill moe-e0" if (row, column) in chosen else "moe-slot"
            boxes[kind] = boxes.get(kind, "") + f"M{column * width + 1} {row * BOX + 1}h{width - 2}v{BOX - 2}h{2 - width}z"
    paths = "".join(f'<path class="{kind}" d="{path}"/>' for kind, path in boxes.items())
    return f'<svg viewBox="0 0 {columns * width} {rows * BOX}" style="width:{columns * width / 18:.1f}rem" aria-hidden="true">{paths}</svg>'


def tile_picture() -> str:
    """One step of the inner loop: a unit of some rows, a row of the panel, and the sums that stay in registers."""
    (lanes, count), rows, units = stripes(), constant("TILE_ROWS"), 12
    cards = [
        (f"{rows} rows of x", "one number of each, in every lane of a vector", _grid(rows, units, BOX, {(row, 4) for row in range(rows)})),
        (
            "a panel of W",
            f"{lanes * count} columns, unit by unit: one row of it is {count} vectors",
            _grid(units, count, 4 * BOX, {(4, j) for j in range(count)}),
        ),
        (
            "the sums",
            f"{rows} × {count} vectors, in registers until the last unit",
            _grid(rows, count, 4 * BOX, {(i, j) for i in range(rows) for j in range(count)}),
        ),
    ]
    return pictures.chain([pictures.card(title, [("", told)], drawing) for title, told, drawing in cards])
