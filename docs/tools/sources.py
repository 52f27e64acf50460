"""The source of a function, class or table of the packages by its dotted name, found in the syntax tree: nothing is imported."""

from __future__ import annotations

import ast
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Source(NamedTuple):
    """path: of the file, from the root of the repository; line: where it starts; text: the source."""

    path: str
    line: int
    text: str


def find(name: str, *, docstring: bool = True) -> Source:
    """The source of `package.module.name` or `package.name`, with or without its docstring. Raises ValueError unless there is one such."""
    module, _, member = name.rpartition(".")
    folder = ROOT.joinpath(*module.split("."))
    paths = sorted(folder.glob("*.py")) if folder.is_dir() else [folder.with_suffix(".py")]
    homes = [path for path in paths if path.is_file() and member in _members(path.read_text(encoding="utf-8"))]
    if len(homes) != 1:
        raise ValueError(f"{name!r} is defined in {', '.join(path.name for path in homes) or 'no file'} of {module}, not in one")
    return _cut(homes[0], member, docstring)


def _cut(path: Path, member: str, docstring: bool) -> Source:
    text = path.read_text(encoding="utf-8")
    node, lines = _members(text)[member], text.splitlines()
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    kept = range(first, (node.end_lineno or first) + 1)
    if not docstring and isinstance(node, (ast.FunctionDef, ast.ClassDef)) and ast.get_docstring(node) is not None:
        told = node.body[0]
        kept = [number for number in kept if not told.lineno <= number <= (told.end_lineno or told.lineno)]
    return Source(path.relative_to(ROOT).as_posix(), first, "\n".join(lines[number - 1] for number in kept).rstrip())


def module_text(name: str, *, docstring: bool = True) -> Source:
    """The whole file of a module, or what follows its docstring. Raises ValueError where there is none."""
    path = ROOT.joinpath(*name.split(".")).with_suffix(".py")
    if not path.is_file():
        raise ValueError(f"{name!r}: there is no file {path.relative_to(ROOT)}")
    text, first = path.read_text(encoding="utf-8"), 0
    if not docstring and ast.get_docstring(tree := ast.parse(text)) is not None:
        first = tree.body[0].end_lineno or 0
    lines = "\n".join(text.splitlines()[first:])
    return Source(path.relative_to(ROOT).as_posix(), first + 1, lines.strip("\n"))


@lru_cache(maxsize=64)
def _members(text: str) -> dict[str, ast.stmt]:
    members: dict[str, ast.stmt] = {}
    for node in ast.parse(text).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            members[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            members |= {target.id: node for target in targets if isinstance(target, ast.Name)}
    return members
