"""Rules about the source itself that a reader relies on: small files, small functions, one direction of imports, no missing docstring."""

from __future__ import annotations

import ast
import io
import re
import sys
import tokenize
from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import REPOSITORY, nan_filled

NUMPY_SIDE = ("reference/*.py", "reference/architectures/*.py", "reference/proof/*.py")
TORCH_SIDE = ("reference/autograd/**/*.py", "reference/experiments/**/*.py")
FAST_TRACK = ("optimized/**/*.py",)
RECIPES = ("reference/architectures/[!_]*.py",)
TEXT = [f"{room}/**/*{end}" for room in ("reference", "optimized", "tests", "notebooks", "docs") for end in (".py", ".md", ".ipynb", ".js")]
TOP_LEVEL_TEXT = [
    "README.md", "Makefile", "mkdocs.yml", "pyproject.toml", "constraints.txt", "constraints-triton39.txt", ".ci/run", ".ci/second-triton",
]  # fmt: skip

# Paths of somebody's machine, and talk about how the work was done. [s] keeps a pattern from matching this file.
FOREIGN = re.compile(
    r"(?<![\w.])/(?:[w]ork|[r]oot|[f]arm)/|(?<!scope=\")(?<!sanitize\.)\b[s]essions?\b|[s]ub-?agent|\b[a]s an AI\b", re.IGNORECASE
)

Rule = Callable[[str, str], Iterator[str]]


def functions(source: str) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function of a module, methods and nested ones included."""
    yield from (node for node in ast.walk(ast.parse(source)) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def code_lines(source: str) -> set[int]:
    """The numbers of the lines that hold code: no blank lines, no comments, no docstrings."""
    silent = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in silent:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return lines


def imported(source: str, path: str) -> Iterator[str]:
    """The absolute names of all modules that a file imports, wherever the statement stands."""
    package = path.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def file_at_most(limit: int) -> Rule:
    """Lines of a file, everything counted."""

    def rule(source: str, path: str) -> Iterator[str]:
        if (count := len(source.splitlines())) > limit:
            yield f"{path}: {count} lines, limit {limit}"

    return rule


def code_at_most(limit: int) -> Rule:
    """Lines of code of a file."""

    def rule(source: str, path: str) -> Iterator[str]:
        if (count := len(code_lines(source))) > limit:
            yield f"{path}: {count} lines of code, limit {limit}"

    return rule


def functions_at_most(limit: int) -> Rule:
    """Lines of code of each function."""

    def rule(source: str, path: str) -> Iterator[str]:
        lines = code_lines(source)
        for node in functions(source):
            if (count := len(lines & set(range(node.lineno, node.end_lineno + 1)))) > limit:
                yield f"{path}:{node.lineno} {node.name}: {count} lines of code, limit {limit}"

    return rule


def positional_at_most(limit: int) -> Rule:
    """Arguments of each function that can be given by position, self and cls aside."""

    def rule(source: str, path: str) -> Iterator[str]:
        for node in functions(source):
            names = [arg.arg for arg in node.args.posonlyargs + node.args.args if arg.arg not in ("self", "cls")]
            if len(names) > limit:
                yield f"{path}:{node.lineno} {node.name}: {len(names)} positional arguments, limit {limit}"

    return rule


def no_chain_over_a_choice(source: str, path: str) -> Iterator[str]:
    """A tagged choice is a row of a table: no `elif`, and no `else if`, asks what a word is."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.If) and len(node.orelse) == 1 and isinstance(node.orelse[0], ast.If):
            compared = [test for branch in (node, node.orelse[0]) for test in ast.walk(branch.test) if isinstance(test, ast.Compare)]
            words = [part.value for test in compared for part in ast.walk(test) if isinstance(part, ast.Constant)]
            if any(isinstance(word, str) for word in words):
                yield f"{path}:{node.lineno}: a chain over a choice"


def documented(source: str, path: str) -> Iterator[str]:
    """Public functions and classes of a module have a docstring."""
    for node in ast.parse(source).body:
        public = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_")
        if public and not ast.get_docstring(node):
            yield f"{path}:{node.lineno} {node.name}: no docstring"


def imports_numpy_only(source: str, path: str) -> Iterator[str]:
    """The NumPy side needs NumPy and the standard library, so it also runs where there is no torch."""
    for name in imported(source, path):
        root = name.split(".")[0]
        if name.startswith(("reference.autograd", "reference.experiments")) or root not in {"numpy", "reference", *sys.stdlib_module_names}:
            yield f"{path}: imports {name}"


def imports_no_fast_track(source: str, path: str) -> Iterator[str]:
    """The arrow between the tracks has one direction."""
    yield from (f"{path}: imports {name}" for name in imported(source, path) if name.split(".")[0] == "optimized")


def speaks_of_itself(source: str, path: str) -> Iterator[str]:
    """The tree names no private path and does not tell how it was written."""
    for number, line in enumerate(source.splitlines(), 1):
        if found := FOREIGN.search(line):
            yield f"{path}:{number} {found.group()!r}"


RULES = {
    "numpy-file": (file_at_most(350), NUMPY_SIDE, "x = 1\n" * 351),
    "numpy-function": (functions_at_most(40), NUMPY_SIDE, "def f():\n" + "    x = 1\n" * 40),
    "numpy-arguments": (positional_at_most(6), NUMPY_SIDE, "def f(a, b, c, d, e, f, g): ..."),
    "torch-arguments": (positional_at_most(6), TORCH_SIDE, "def f(a, b, c, d, e, f, g): ..."),
    "choices": (no_chain_over_a_choice, NUMPY_SIDE + TORCH_SIDE, "if kind == 'a':\n    x = 1\nelif kind == 'b':\n    x = 2"),
    "numpy-imports": (imports_numpy_only, NUMPY_SIDE, "def f():\n    from .autograd import layer"),
    "recipe": (code_at_most(60), RECIPES, "x = 1\n" * 61),
    "torch-file": (file_at_most(500), TORCH_SIDE, "x = 1\n" * 501),
    "torch-function": (functions_at_most(40), TORCH_SIDE, "def f():\n" + "    x = 1\n" * 40),
    "fast-file": (file_at_most(500), FAST_TRACK, "x = 1\n" * 501),
    "fast-function": (functions_at_most(90), FAST_TRACK, "def f():\n" + "    x = 1\n" * 90),
    "direction": (imports_no_fast_track, NUMPY_SIDE + TORCH_SIDE, "from optimized import MoE"),
    "docstrings": (documented, NUMPY_SIDE + TORCH_SIDE + FAST_TRACK, "def f(): ..."),
    "text": (speaks_of_itself, TEXT + TOP_LEVEL_TEXT, "see " + "/".join(["", "root", "notes"])),
}


@pytest.mark.parametrize("name", RULES)
def test_rule_holds(name: str) -> None:
    rule, patterns, _ = RULES[name]
    paths = sorted({path for pattern in patterns for path in REPOSITORY.glob(pattern) if "node_modules" not in path.parts})
    assert paths, f"no file matches {patterns}"
    broken = [line for path in paths for line in rule(path.read_text(encoding="utf-8"), path.relative_to(REPOSITORY).as_posix())]
    assert not broken, "\n".join(broken)


@pytest.mark.parametrize("name", RULES)
def test_rule_rejects_its_counterexample(name: str) -> None:
    rule, _, counterexample = RULES[name]
    assert list(rule(counterexample, "reference/sample.py"))


def test_code_lines_leave_out_docstrings_comments_and_blanks() -> None:
    source = '"""Module.\n\nMore."""\n\n# why\ndef f():\n    """Sentence."""\n    x = """a\n    b"""\n\n    return x  # why\n'
    assert code_lines(source) == {6, 8, 9, 11}


@pytest.mark.parametrize("owner, expected", [("optimized.kernels", True), ("transformers.models", False)])
def test_uninitialised_memory_of_the_project_is_nan(owner: str, expected: bool) -> None:
    scope = {"__name__": owner, "allocate": nan_filled(torch.zeros)}
    exec("out = allocate(3)", scope)
    assert bool(scope["out"].isnan().all()) is expected
