"""Pages that nobody types: the museum, the notation, one page per architecture, the API, the command line."""

from __future__ import annotations

import importlib
import textwrap
from collections.abc import Iterator

import pictures
import sources
import tables
from render import EQUATION_PAGES, block, equation_home, slug

from reference import notation, presets
from reference.architectures import RECIPES
from reference.proof import bugs

API = {
    "reference": [
        "layer", "config", "routing", "scores", "noise", "gating", "choices", "capacity", "dispatch", "experts", "shared", "soft",
        "balancing", "penalty", "model_config", "cost", "presets", "specialization", "overlap", "redundancy", "churn", "beginnings", "text",
    ],
    "reference.proof": ["equal", "teeth", "cases"],
    "reference.autograd": ["layer", "transformer", "training", "checkpoints", "sampling"],
    "optimized": ["layer", "backends", "contracts", "huggingface", "expert_parallel"],
}  # fmt: skip
"""Package → modules with a page of their own, in this order."""


def museum() -> str:
    """Every piece of the museum: the wrong function, where it was seen, what catches it."""
    parts = [
        "# Bug museum",
        f"{len(bugs.MUSEUM)} mistakes that shipped somewhere, or that a paper's text leaves one line away. Each is a small wrong function "
        "beside the check that catches it. The checks run in the test suite: each must accept the reference and reject the mistake, and "
        "the message under each piece is what the check printed when this page was built.",
        "“Near” means that a paper's text invites the mistake and no public report of it was read.",
    ]
    for room, pieces in bugs.ROOMS.items():
        parts.append(f"## {room.capitalize()}")
        for piece in pieces:
            wrong = sources.find(f"{piece.wrong.__module__}.{piece.wrong.__name__}", docstring=False)
            told = " ".join((piece.check.__doc__ or "").split())
            parts += [
                f"### {piece.name[0].upper()}{piece.name[1:]} {{ #{slug(piece.name)} }}",
                f"{piece.mistake} <br>Seen: {piece.seen}",
                block(wrong),
                f"**Caught by** `{piece.check.__name__}`. {told} It says: *{piece.symptom()}.*",
            ]
    return "\n\n".join(parts) + "\n"


def notation_page() -> str:
    """Letters and the papers' symbols."""
    letters = tables.markdown(
        ["letter", "meaning"], [[f"`{letter}`", meaning] for letter, meaning in notation.LETTERS.items()], numbers=False
    )
    papers = tuple(dict.fromkeys(paper for row in notation.ROSETTA.values() for paper in row))
    rosetta = [
        [f"`{name}`", *(f"\\({row[paper]}\\)" if paper in row else "" for paper in papers)] for name, row in notation.ROSETTA.items()
    ]
    parts = [
        "# Notation",
        "An array's name ends in the letters of its shape: `gate_TK` has shape [T, K], and equal letters in one function are equal sizes. "
        "The tests run the code and compare every such name with the real shape.",
        "## Letters",
        letters,
        "## The papers' symbols",
        "What is one thing here has many names in the papers. An empty cell: the paper has no symbol for it.",
        tables.markdown(["here", *papers], rosetta, numbers=False),
        "## Equations",
        "Each equation has an id, which stands in the docstring of the function that computes it.",
        "\n".join(f"- [{title}](equations/{page}.md)" for page, (title, _) in EQUATION_PAGES.items()),
    ]
    return "\n\n".join(parts) + "\n"


def equations_pages() -> dict[str, str]:
    """Every equation with the function that computes it, on the page that `equation_home` knows."""
    parts = {f"reference/equations/{page}.md": [f"# {title}"] for page, (title, _) in EQUATION_PAGES.items()}
    for identifier, equation in notation.EQUATIONS.items():
        source = f" {notation.PAPERS[equation.paper]}." if equation.paper else ""
        parts[equation_home(identifier)] += [
            f"## {identifier} {{ #eq-{identifier} }}",
            f"\\[\n{equation.latex}\n\\]",
            f"`{equation.function}`.{source}",
        ]
    return {path: "\n\n".join(text) + "\n" for path, text in parts.items()}


def recipes() -> Iterator[tuple[str, str, list[str]]]:
    """(file name, module, presets) of each recipe."""
    modules: dict[str, list[str]] = {}
    for preset, recipe in RECIPES.items():
        modules.setdefault(recipe.__module__, []).append(preset)
    for module, names in modules.items():
        yield module.rpartition(".")[2], module, names


def architecture(module: str, names: list[str]) -> str:
    """One paper's layer: what its file says, its settings and sizes, and the recipe itself."""
    doc = importlib.import_module(module).__doc__ or ""
    title, _, rest = doc.strip().partition("\n")
    paragraphs = [
        "".join(f"**{part}**" if part in ("Source:", "Specific:", "Deviates:") else part for part in split(line))
        for line in rest.strip().splitlines()
    ]
    name, _, idea = title.partition(":")
    told = "\n".join(f"\n{line}" if line.startswith("**") else line for line in paragraphs)
    parts = [
        f"# {name}",
        f"{idea.strip()[:1].upper()}{idea.strip()[1:]}",
        pictures.idea(presets.get(names[0])),
        told,
        f"<!-- story: {module.rpartition('.')[2]} -->",
        "## Settings",
        "What this model sets, and the layer's default beside it. Everything that is not listed is the default.",
        settings(names[0]),
        "## Sizes",
        "Counted from the settings by `reference/cost.py`; the tests compare the totals with the published ones.",
        size_table(names),
        "## The recipe",
        "One training pass as the paper writes it, without flags. The tests compare it with the layer that the settings above drive, and "
        "[the status page](../status.md) has the differences.",
        block(sources.module_text(module)),
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
    rows = [["`d_model`", f"`{chosen['d_model']}`", ""]]
    for part, fields in chosen.items():
        if isinstance(fields, dict):
            rows += [
                [f"`{part}.{key}`", f"`{value!r}`", f"`{plain[part][key]!r}`"] for key, value in fields.items() if value != plain[part][key]
            ]
    return tables.markdown([f"field of `{name}`", "set to", "default"], rows, numbers=False)


def size_table(names: list[str]) -> str:
    """Parameters by component of every preset that shares the recipe."""
    from reference.cost import model_parameters

    parts = {name: model_parameters(presets.model(name)) for name in names}
    used = [part for part in next(iter(parts.values())) if any(count[part].total for count in parts.values())]
    rows = [[part.replace("_", " "), *(tables.billions(parts[name][part].total) for name in names)] for part in used]
    rows.append(["**total**", *(f"**{tables.billions(tables.sizes(name).total)}**" for name in names)])
    rows.append(["**active for a token**", *(f"**{tables.billions(tables.sizes(name).active)}**" for name in names)])
    return tables.markdown(["10⁹ parameters", *(f"`{name}`" for name in names)], rows)


def api_pages() -> dict[str, str]:
    """One page of the API per module, for mkdocstrings, which reads the source and imports nothing."""
    pages = {}
    for package, modules in API.items():
        for module in modules:
            name = f"{package}.{module}"
            pages[f"reference/api/{name.removeprefix('reference.')}.md"] = (
                f"# {name}\n\n::: {name}\n    options:\n      show_root_heading: false\n      show_root_toc_entry: false\n"
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
        rows = []
        for option in command.params:
            if option.name != "help":
                default = "" if option.default in (None, False, "", ()) or callable(option.default) else f"`{option.default}`"
                rows.append(
                    [" ".join(f"`{text}`" for text in option.opts), (getattr(option, "help", None) or "").replace("|", "\\|"), default]
                )
        parts += [
            f"## moebius {name}",
            " ".join((command.help or "").split()),
            tables.markdown(["option", "", "default"], rows, numbers=False),
        ]
    return "\n\n".join(parts) + "\n"


def pages() -> dict[str, str]:
    """Path in the site → Markdown of every page that is generated as a whole."""
    made = {"reference/museum.md": museum(), "reference/notation.md": notation_page(), "reference/command-line.md": command_line()}
    made |= {f"architectures/{name}.md": architecture(module, names) for name, module, names in recipes()}
    return made | equations_pages() | api_pages()
