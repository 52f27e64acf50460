"""Names mean what the notation says: suffixes are real shapes, equation ids lead both ways, and doctests print what they promise."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from configs import CONFIGS, SENT, random_params, random_tokens
from conftest import REPOSITORY
from tracer import SUFFIX, broken_shapes, traced

from reference import moe_backward, moe_forward
from reference.dispatch import one_hot_combine, one_hot_dispatch, one_hot_slots
from reference.notation import EQUATIONS, LETTERS, PAPERS, ROSETTA
from reference.symbols import LOCAL, SYMBOLS, explained

NUMPY_FILES = sorted((REPOSITORY / "reference").glob("*.py"))
EQUATION_ID = re.compile(r"(?<!\w)\(([a-z][a-z0-9]*(?:-[a-z0-9]+)+)\)(?=[:.;,])|(?<!\w)\(([a-z][a-z0-9-]*)\):")
"""An id in a docstring: several words with hyphens before any punctuation, or one word before a colon."""


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """(dotted name, docstring) of each function of a file."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            yield f"reference.{path.stem}.{node.name}", ast.get_docstring(node) or ""


def ids(docstring: str) -> set[str]:
    return {hyphened or word for hyphened, word in EQUATION_ID.findall(docstring)}


def test_every_id_in_a_docstring_is_an_equation_of_that_function() -> None:
    written = {(found, name) for path in NUMPY_FILES for name, text in docstrings(path) for found in ids(text)}
    assert written == {(key, equation.function) for key, equation in EQUATIONS.items()}


def test_id_pattern_tells_ids_from_other_parentheses() -> None:
    assert ids("Softmax (softmax): s. See (load-cv); (loss-z), but (name, weight), f(x): and (fp32) are none.") == {
        "softmax",
        "load-cv",
        "loss-z",
    }


@pytest.mark.parametrize("key", EQUATIONS)
def test_equation_is_written_out_and_its_function_exists(key: str) -> None:
    latex, function, paper = EQUATIONS[key]
    module, name = function.rsplit(".", 1)
    assert callable(getattr(importlib.import_module(module), name))
    assert balanced(latex) and latex.isascii()
    assert not paper or paper in PAPERS


def balanced(latex: str) -> bool:
    """Braces, environments and \\left … \\right pair up."""
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", latex):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    pairs = (("\\begin", "\\end"), ("\\left\\", "\\right\\"))
    return depth == 0 and all(latex.count(a) == latex.count(b) for a, b in pairs)


def test_balanced_rejects_broken_latex() -> None:
    assert not any(balanced(latex) for latex in (r"\frac{a}{b", r"}x{", r"\left\lceil x", r"\begin{cases} a"))


@pytest.mark.parametrize("key", EQUATIONS)
def test_symbols_of_every_equation_are_explained(key: str) -> None:
    told = explained(key)
    assert told and all(balanced(symbol) and meaning for symbol, meaning in told.items())
    latex = re.sub(r"\s", "", EQUATIONS[key].latex)
    for symbol in filter(told.get, LOCAL.get(key, {})):
        first = re.split(r"[,\s_({]", symbol)[0]  # "a, u" and "g(e)" stand apart in the equation
        assert re.sub(r"\s", "", first) in latex, f"{symbol} is not in {key}"


def test_every_common_symbol_is_in_an_equation() -> None:
    assert LOCAL.keys() <= EQUATIONS.keys()
    assert set(SYMBOLS) <= {symbol for key in EQUATIONS for symbol in explained(key)}


def test_rosetta_names_known_papers() -> None:
    assert {paper for symbols in ROSETTA.values() for paper in symbols} <= set(PAPERS)
    assert all(balanced(symbol) for symbols in ROSETTA.values() for symbol in symbols.values())


def suffixes(source: str) -> Iterator[str]:
    """Every suffixed name that a file assigns, takes as an argument or declares as a field."""
    for node in ast.walk(ast.parse(source)):
        name = node.arg if isinstance(node, ast.arg) else node.id if isinstance(node, ast.Name) else ""
        if SUFFIX.match(name):
            yield name


@pytest.mark.parametrize("track", ["reference", "optimized"])
def test_every_suffix_letter_is_in_the_legend(track: str) -> None:
    paths = sorted((REPOSITORY / track).rglob("*.py"))
    found = {(path.name, name) for path in paths for name in suffixes(path.read_text(encoding="utf-8"))}
    assert found or track == "optimized"
    assert not {entry for entry in found if set(SUFFIX.match(entry[1])[1]) - set(LETTERS)}  # type: ignore[index]


def test_suffixes_finds_arguments_fields_and_locals() -> None:
    assert set(suffixes("class A:\n    a_T: int\ndef f(b_TQ):\n    c_E = d_F = b_TQ\n    LIMIT_E = 1")) == {"a_T", "b_TQ", "c_E", "d_F"}


@pytest.mark.parametrize("name", CONFIGS)
def test_traced_shapes_agree_with_the_suffixes(name: str, rng: np.random.Generator) -> None:
    config = CONFIGS[name]
    params = random_params(config, rng)
    with traced(REPOSITORY / "reference") as trace:
        for tokens, groups, pads in ((13, 3, 2), (1, 1, 0), (0, 1, 0)):
            output, cache = moe_forward(
                params=params, config=config, training=True, rng=rng, **random_tokens(config, rng, tokens, groups=groups, pads=pads)
            )
            moe_backward(rng.standard_normal(output.y.shape), cache)
            slot_TKEC = one_hot_slots(output.routing.expert, output.routing.keep, config.experts.count, tokens)
            rows_ECD = one_hot_dispatch(np.zeros((tokens, config.d_model)), slot_TKEC)
            one_hot_combine(rows_ECD, output.routing.gate, slot_TKEC)
    assert not trace.errors, "\n".join(trace.errors)
    sent = {"routing.py:decide wanted_TK", "layer.py:moe_backward dx_TD", "dispatch.py:dispatch_forward bounds_P"}
    mixed = {"soft.py:slot_logits_forward cosine_TEC", "layer.py:moe_backward dx_TD", "soft.py:mix_forward bounds_P"}
    assert (sent if name in SENT else mixed) <= trace.seen


PLANTED = {
    "rank": ("def f(x):\n    row_TD = x\n", "row_TD has shape (2,)", np.zeros(2)),
    "size": ("def f(x):\n    a_TD, b_TF = x, x\n    c_DF = x\n", "D is 2 in c_DF and 3 in a_TD", np.zeros((2, 3))),
    "bounds": ("def f(x):\n    load_E, bounds_P = x, x\n", "P is 4 in bounds_P and E is 4 in load_E", np.zeros(4)),
    "field": (
        "from typing import NamedTuple\nclass Cache(NamedTuple):\n    gate_TK: object\ndef f(x):\n    return x, Cache(x)\n",
        "gate_TK has shape (2,)",
        np.zeros(2),
    ),
}


@pytest.mark.parametrize("name", PLANTED)
def test_tracer_catches_a_planted_wrong_suffix(name: str, tmp_path: Path) -> None:
    source, message, argument = PLANTED[name]
    scope: dict = {"__name__": "planted"}
    exec(compile(source, str(tmp_path / "planted.py"), "exec"), scope)
    with traced(tmp_path) as trace:
        scope["f"](argument)
    assert f"planted.py:f: {message}" in trace.errors


def test_tracer_ignores_other_folders_and_names_without_arrays(tmp_path: Path) -> None:
    with traced(tmp_path) as trace:
        broken_shapes({})
    assert not trace.errors and not trace.seen
    assert not broken_shapes({"gate_TK": None, "LIMIT_E": np.zeros((1, 1)), "x": np.zeros(3)})


@pytest.mark.parametrize("path", [path for path in NUMPY_FILES if ">>> " in path.read_text(encoding="utf-8")], ids=lambda path: path.stem)
def test_doctests(path: Path) -> None:
    results = doctest.testmod(importlib.import_module(f"reference.{path.stem}"))
    assert results.attempted and not results.failed
