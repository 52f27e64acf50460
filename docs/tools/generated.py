"""Pages that nobody types: the museum, the notation, one page per architecture, the API, the command line."""

from __future__ import annotations

import importlib
import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

import components
import layout
import pictures
import sources
import tables
from api import API, has_page
from equations import EQUATION_PAGES, equation_home, linked
from marks import mark
from render import block, slug

from reference import notation, presets, symbols
from reference.architectures import RECIPES
from reference.proof import bugs


def museum() -> str:
    """Every piece of the museum: the wrong function, where it was seen, what catches it."""
    shipped = sum(bug.shipped for bug in bugs.MUSEUM.values())
    parts = [
        "# Bug museum",
        f"{len(bugs.MUSEUM)} mistakes, of which {shipped} have shipped and {len(bugs.MUSEUM) - shipped} lie near. Each is a small wrong "
        "function beside the check that catches it. The checks run in the test suite: each must accept the reference and reject the "
        "mistake, and the message under each piece is what the check printed when this page was built.",
        "**Shipped**: published code, or a paper's pseudo-code, has made it; the report or the file is named. **Near**: no public report "
        "of it was read, but what is named invites it: a paper's text, a function's documentation, or code whose layout is unlike others'.",
        "What only goes wrong between several devices is told elsewhere: "
        "[the traps of expert parallelism](../chapters/expert-parallelism.md#the-traps).",
        "The rooms: " + ", ".join(f"[{room}](#{slug(room)}) ({len(pieces)})" for room, pieces in bugs.ROOMS.items()) + ".",
    ]
    for room, pieces in bugs.ROOMS.items():
        parts.append(f"## {room.capitalize()}")
        for piece in pieces:
            wrong = sources.find(f"{piece.wrong.__module__}.{piece.wrong.__name__}", docstring=False)
            told = " ".join((piece.check.__doc__ or "").split())
            parts += [
                f"### {piece.name[0].upper()}{piece.name[1:]} {{ #{slug(piece.name)} }}",
                f"{piece.mistake} <br>**{'Shipped' if piece.shipped else 'Near'}**: {piece.place}",
                block(wrong),
                f"**Caught by** `{piece.check.__name__}`. {told} It says: *{piece.symptom()}.*",
            ]
    return "\n\n".join(parts) + "\n"


def notation_page() -> str:
    """Letters and the papers' symbols."""
    letters = tables.markdown(
        ["letter", "meaning"], [[f"`{letter}`", meaning] for letter, meaning in notation.LETTERS.items()], numbers=False
    )
    parts = [
        "# Notation",
        "An array's name ends in the letters of its shape: `gate_TK` has shape [T, K], and equal letters in one function are equal sizes. "
        "The tests run the code and compare every such name with the real shape.",
        "## Letters",
        letters,
        "## Symbols of the equations",
        "With an index a capital letter may be something else than a size. The [pages of equations](#equations) tell it for each equation.",
        tables.markdown(
            ["symbol", "meaning, and name in the code"],
            [[f"\\({latex}\\)", row.meaning + (f" (`{row.name}`)" if row.name else "")] for latex, row in symbols.SYMBOLS.items()],
            numbers=False,
        ),
        "## The papers' symbols",
        "What is one thing here has many names in the papers. A paper that is not named has no symbol for it.",
        layout.definitions((f"`{name}`", papers_write(row)) for name, row in notation.ROSETTA.items()),
        "## Equations",
        "Each equation has an id, which stands in the docstring of the function that computes it.",
        "\n".join(f"- [{title}](equations/{page}.md)" for page, (title, _) in EQUATION_PAGES.items()),
    ]
    return "\n\n".join(parts) + "\n"


def worked_out() -> dict[str, list[str]]:
    """Equation → links to the chapters that show it, as seen from the pages of equations."""
    found: dict[str, list[str]] = {}
    for path in sorted((sources.ROOT / "docs/chapters").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        title = text.partition("\n")[0].removeprefix("# ")
        for identifier in dict.fromkeys(re.findall(r"^ *\{\{ equation (\S+) \}\}", text, re.MULTILINE)):
            found.setdefault(identifier, []).append(f"[{title}](../../chapters/{path.name})")
    return found


def papers_write(row: Mapping[str, str]) -> str:
    """What the papers write, those that write the same together."""
    papers: dict[str, list[str]] = {}
    for paper, symbol in row.items():
        papers.setdefault(symbol, []).append(paper)
    return " · ".join(f"\\({symbol}\\) {', '.join(names)}" for symbol, names in papers.items())


def told(identifier: str) -> str:
    """What the docstring of an equation's function says before the equation, and where it stands."""
    module, _, name = notation.EQUATIONS[identifier].function.rpartition(".")
    text = " ".join((getattr(importlib.import_module(module), name).__doc__ or "").split())
    said = re.split(r"[.:] ", text.partition(f"({identifier})")[0])[0].rstrip(" ,.:")
    where = f"[`{module}.{name}`][{module}.{name}]" if has_page(module) else f"`{module}.{name}`"
    return f"{mark(said)}: {where}."


def equations_pages() -> dict[str, str]:
    """Every equation with its symbols and the function that computes it, on the page that `equation_home` knows."""
    intro = "Capital letters are the sizes of [the notation](../notation.md#letters); t is a token, e an expert, k a choice."
    parts = {f"reference/equations/{page}.md": [f"# {title}", intro] for page, (title, _) in EQUATION_PAGES.items()}
    chapters = worked_out()
    for identifier, equation in notation.EQUATIONS.items():
        source = f" {notation.PAPERS[equation.paper]}." if equation.paper else ""
        parts[equation_home(identifier)] += [
            f"## {identifier} {{ #eq-{identifier} }}",
            f"\\[\n{equation.latex}\n\\]",
            "; ".join(f"\\({symbol}\\): {linked(meaning)}" for symbol, meaning in symbols.explained(identifier).items()) + ".",
            f"{told(identifier)}{source}" + (f" Worked out in {', '.join(shown)}." if (shown := chapters.get(identifier)) else ""),
        ]
    return {path: "\n\n".join(text) + "\n" for path, text in parts.items()}


def recipes() -> Iterator[tuple[str, str, list[str]]]:
    """(file name, module, presets) of each recipe."""
    modules: dict[str, list[str]] = {}
    for preset, recipe in RECIPES.items():
        modules.setdefault(recipe.__module__, []).append(preset)
    for module, names in modules.items():
        yield module.rpartition(".")[2], module, names


def headline(module: str) -> tuple[str, str, str]:
    """(whose layer a recipe is, its idea, what more its file says), from the docstring."""
    title, _, rest = (importlib.import_module(module).__doc__ or "").strip().partition("\n")
    name, _, idea = title.partition(":")
    return name, idea.strip(), rest.strip()


def architecture(module: str, names: list[str]) -> str:
    """One paper's layer: what its file says, its settings and sizes, and the recipe itself."""
    name, idea, rest = headline(module)
    paragraphs = [
        "".join(f"**{part}**" if part in ("Source:", "Specific:", "Deviates:") else part for part in split(line))
        for line in rest.splitlines()
    ]
    told = "\n".join(f"\n{line}" if line.startswith("**") else line for line in paragraphs)
    parts = [
        f"# {name}",
        f"{idea[:1].upper()}{idea[1:]}",
        pictures.idea(presets.get(names[0])),
        told,
        f"<!-- story: {module.rpartition('.')[2]} -->",
        "## At work",
        "A small copy of the layer, computed by the reference. Tokens and logits are the same on the page of every architecture, so what "
        "differs is the rule.",
        pictures.at_work(names),
        "## Settings",
        f"What `{names[0]}` sets, and the layer's default beside it. Everything that is not listed is the default.",
        settings(names[0]),
        "## Sizes",
        "Counted from the settings by `reference/cost.py`; the tests compare the totals with the published ones. Of the two bars the upper "
        "is what is stored, the lower what one token meets; B is 10⁹.",
        components.bars(names),
        components.table(names),
        "## The recipe",
        "One training pass as the paper writes it, without flags. The tests compare it with the layer that the settings above drive, and "
        "[the status page](../status.md) has the differences.",
        block(sources.module_text(module, docstring=False)),  # the page has told it
    ]
    return "\n\n".join(parts) + "\n"


def split(line: str) -> list[str]:
    """A line, its leading keyword apart."""
    head, colon, tail = line.partition(":")
    return [head + colon, tail] if colon and head in ("Source", "Specific", "Deviates") else [line]


def settings(name: str) -> str:
    """The fields of a preset that differ from a plain layer's."""
    from reference.config import MoEConfig

    chosen, plain = presets.get(name).to_dict(), MoEConfig(presets.get(name).d_model).to_dict()
    rows = [["`d_model`", f"`{chosen['d_model']}`", "–"]]
    for part, fields in chosen.items():
        if isinstance(fields, dict):
            rows += [
                [f"`{part}.{key}`", setting(value), setting(plain[part][key])] for key, value in fields.items() if value != plain[part][key]
            ]
    return tables.markdown(["field", "set to", "default"], rows, numbers=False)


def setting(value: Any) -> str:
    """A value as Python writes it, pairs below each other."""
    pairs = isinstance(value, tuple) and value
    return "<br>".join(f"`{name}`\u00a0`{number}`" for name, number in value) if pairs else f"`{value!r}`"


def api_pages() -> dict[str, str]:
    """One page of the API per module, for mkdocstrings, which reads the source and imports nothing."""
    pages = {}
    for package, modules in API.items():
        for module in modules:
            name = f"{package}.{module}"
            title = re.sub(r"([._])", r"\1<wbr>", name)  # on a phone a line ends between words
            pages[f"reference/api/{name.removeprefix('reference.')}.md"] = (
                f"# {title}\n\n::: {name}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
            )
    return pages


def command_line() -> str:
    """Every command and its options, read from the program itself."""
    import typer.main

    from optimized.cli import application

    group = typer.main.get_command(application())
    parts = [
        "# Command line",
        "`moebius` is installed with the packages; `python -m optimized.cli` is the same.",
        textwrap.dedent(group.help or ""),
    ]
    for name, command in getattr(group, "commands", {}).items():
        rows = [option_row(option) for option in command.params if option.name != "help"]
        parts += [f"## moebius {name}", with_options(" ".join((command.help or "").split())), layout.definitions(rows)]
    return "\n\n".join(parts) + "\n"


def option_row(option: Any) -> tuple[str, str]:
    """How an option is written, what it does, and what holds where it is not given."""
    told = option.show_default if isinstance(getattr(option, "show_default", None), str) else None
    known = told or (option.default not in (None, False, "", ()) and not callable(option.default))
    default = f" Default: {with_options(told) if told else f'`{option.default}`'}." if known else ""
    return " ".join(f"`{text}`" for text in option.opts), with_options(getattr(option, "help", None) or "") + default


def with_options(text: str) -> str:
    """A help text, the options that it names set as code."""
    return re.sub(r"(?<![`\w-])--\w[\w-]*", r"`\g<0>`", text)


def pages() -> dict[str, str]:
    """Path in the site → Markdown of every page that is generated as a whole."""
    made = {"reference/museum.md": museum(), "reference/notation.md": notation_page(), "reference/command-line.md": command_line()}
    made |= {f"architectures/{name}.md": architecture(module, names) for name, module, names in recipes()}
    return made | equations_pages() | api_pages()
