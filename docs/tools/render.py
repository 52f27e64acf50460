"""A page of docs/ as Markdown that any builder understands: code runs and its output is inserted, directives are expanded.

A fenced block ```python runs, in one namespace per page, and what it prints follows it. `{{= expression }}` in a sentence is the value
of the expression in that namespace, so that no number of the running example is typed. A line `{{ name argument }}` is a directive:

    {{ source reference.gating.top_k }}        the source of one or several functions; {{ code … }} is the same without docstrings
    {{ c multiply_tile }}                      one or several functions of the C kernel
    {{ equation top-k }}                       an equation of reference/notation.py
    {{ bug softmax twice }}                    a piece of the museum: the wrong function and what its check says
    {{ table example-routing }}                a table of tables.py
    {{ plot collapse }}                        a picture of plots.py
    {{ figure route }}                         an interactive figure, already drawn
"""

from __future__ import annotations

import contextlib
import io
import posixpath
import re
import textwrap
from collections.abc import Callable
from typing import Any

import figures
import native
import plots
import sources
import tables
from equations import equation_home

from reference import notation
from reference.proof import bugs

PIECE = re.compile(
    r"^(?P<indent>[ ]*)(?P<fence>`{3,})(?P<info>[^\n`]*)\n(?P<code>.*?)^(?P=indent)(?P=fence)[ ]*$"
    r"|^(?P<space>[ ]*)\{\{ (?P<directive>[a-z]+) (?P<argument>[^}\n]+?) \}\}[ ]*$"
    r"|\{\{= (?P<expression>[^\n]+?) \}\}"
    r"|`[^`\n]+`",
    re.MULTILINE | re.DOTALL,
)


class Page:
    """One page while it is rendered: where it lies, and the names that its code has defined so far."""

    def __init__(self, path: str, *, draw: Callable[[str], str] = figures.placeholder) -> None:
        self.path = path
        self.draw = draw
        self.names: dict[str, Any] = {"__name__": path, **tables.NAMES, "shown": figures.shown}
        self.directives: dict[str, Callable[[str], str]] = {
            "source": lambda names: block(*(sources.find(name) for name in names.split())),
            "code": lambda names: block(*(sources.find(name, docstring=False) for name in names.split())),
            "c": lambda names: block(*map(native.shown, names.split()), language="c"),
            "equation": self.equation,
            "bug": self.bug,
            "table": lambda name: tables.get(name),
            "plot": lambda name: plots.get(name),
            "figure": lambda name: self.draw(name),
        }

    def render(self, text: str) -> str:
        """The page's text with everything in place. Raises ValueError naming the page where a piece cannot be made."""
        return PIECE.sub(self._piece, text)

    def link(self, target: str) -> str:
        """A path of the site as seen from this page."""
        return posixpath.relpath(target, posixpath.dirname(self.path) or ".")

    def _piece(self, match: re.Match[str]) -> str:
        try:
            if match["fence"]:
                return self._fence(match)
            if match["directive"]:
                if match["directive"] not in self.directives:
                    raise ValueError(f"no directive {match['directive']!r}; known: {', '.join(self.directives)}")
                return textwrap.indent(self.directives[match["directive"]](match["argument"]), match["space"])
            if match["expression"]:
                return str(eval(match["expression"], self.names))
        except Exception as error:
            raise ValueError(f"{self.path}: {match[0][:120]!r}: {error}") from error
        return match[0]

    def _fence(self, match: re.Match[str]) -> str:
        if match["info"].split(" ")[0] != "python":
            return match[0]
        printed = self.run(textwrap.dedent(match["code"]))
        output = textwrap.indent(f"\n``` {{ .text .output }}\n{printed}```", match["indent"]) if printed else ""
        return match[0] + "\n" + output if output else match[0]

    def run(self, code: str) -> str:
        """What the code prints; the names that it defines stay."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, self.path, "exec"), self.names)
        return printed.getvalue()

    def equation(self, identifier: str) -> str:
        """The equation, where it is computed and where it comes from."""
        if identifier not in notation.EQUATIONS:
            raise ValueError(f"no equation {identifier!r}")
        equation = notation.EQUATIONS[identifier]
        home = self.link(equation_home(identifier)) + f"#eq-{identifier}"
        paper = f", {equation.paper}" if equation.paper else ""
        return f'\\[\n{equation.latex}\n\\]\n\n<p class="equation-note" markdown>[{identifier}]({home}){paper}</p>'

    def bug(self, name: str) -> str:
        """A piece of the museum, told."""
        piece = bugs.get(name)
        wrong = f"{piece.wrong.__module__}.{piece.wrong.__name__}"
        museum = self.link("reference/museum.md") + f"#{slug(name)}"
        told = [
            f'!!! bug "From the museum: [{name}]({museum})"',
            "",
            f"    {piece.mistake} {'Shipped' if piece.shipped else 'Near'}: {piece.place}.",
            "",
            textwrap.indent(block(sources.find(wrong, docstring=False)), "    "),
            "",
            f"    The check `{piece.check.__name__}` says: *{piece.symptom()}.*",
        ]
        return "\n".join(told)


def block(*parts: sources.Source, language: str = "python") -> str:
    """A fenced block titled with the files it comes from; of another class than what a page runs."""
    title = ", ".join(dict.fromkeys(part.path for part in parts))
    text = "\n\n\n".join(part.text for part in parts)
    return f'``` {{ .{language} title="{title}" }}\n{text}\n```'


def slug(name: str) -> str:
    """The anchor of a heading."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
