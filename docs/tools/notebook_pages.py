"""The notebooks as pages of the site: the executed .ipynb as Markdown, its pictures as files; no kernel runs.

What is asked before a result stays in sight, the result itself is folded, and so is the solution of the exercise. Links into the source
become links to the API's pages where there is one, and links to the repository where SITE_REPOSITORY=owner/name says where that is.
"""

from __future__ import annotations

import base64
import os
import re
import struct
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import generated
from api import has_page

from notebooks import build

COLAB = "https://colab.research.google.com/"
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)#\s]+)(?:#L(?P<line>\d+))?\)")
HINT = re.compile(r"<details><summary>(.+?)</summary>(.+?)</details>", re.DOTALL)
PREDICT = re.compile(r"^\*\*Predict\.\*\* (?P<question>.+?)(?=\n\n|\Z)", re.MULTILINE | re.DOTALL)


class Exported(NamedTuple):
    """markdown of a page, and its pictures by file name."""

    markdown: str
    pictures: dict[str, bytes]


def repository() -> str:
    """owner/name on GitHub, or "" where the site was not told."""
    return os.environ.get("SITE_REPOSITORY", "")


def api_page(path: str) -> str | None:
    """The dotted name of a source file whose module has a page of the API."""
    module = path.removesuffix(".py").replace("/", ".")
    return module if has_page(module) else None


def relink(match: re.Match[str]) -> str:
    """A link of a notebook as one of the site."""
    text, target, line = match["text"], match["target"].removeprefix("../"), match["line"]
    if "//" in target:
        return match[0]
    if target.endswith(".ipynb"):
        return f"[{text}]({target.removesuffix('.ipynb')}.md)"
    if target.startswith("docs/"):
        return f"[{title_of(target)}](../{target.removeprefix('docs/')})"
    if line and (module := api_page(target)):
        return f"[`{text}`][{module}.{text}]"
    if repository():
        shown, place = (f"`{text}`", f"#L{line}") if line else (text, "")
        return f"[{shown}](https://github.com/{repository()}/blob/main/{target}{place})"
    return f"`{text}`"


def title_of(path: str) -> str:
    """The heading of a page of docs/; that of an architecture stands in its recipe."""
    if path.startswith("docs/architectures/"):
        return generated.headline(f"reference.architectures.{Path(path).stem}")[0]
    text = (build.ROOT / path).read_text(encoding="utf-8")
    found = re.search(r"^# (.+)$", text, re.MULTILINE)
    return found[1] if found else path


def prose(text: str) -> str:
    """A Markdown cell: links of the site, each question in a box of its own."""

    def boxed(match: re.Match[str]) -> str:
        return '!!! question "Predict"\n\n' + textwrap.indent(match["question"], "    ")

    hinted = HINT.sub(lambda match: "\n" + folded("tip", match[1], match[2].strip()) + "\n", text)
    return PREDICT.sub(boxed, LINK.sub(relink, hinted))


def folded(kind: str, title: str, content: str) -> str:
    """A block that opens on a click, without any script."""
    return f'??? {kind} "{title}"\n\n' + textwrap.indent(content, "    ")


def fence(kind: str, text: str) -> str:
    """A fenced block of another class than what a page runs."""
    return f"``` {{ {kind} }}\n{text.rstrip()}\n```"


def drawn(name: str, content: bytes, told: str = "") -> str:
    """A picture in a place of its size, so that nothing moves when it comes."""
    width, height = struct.unpack(">II", content[16:24])  # where a PNG has them
    return f"![{told}](pictures/{name}){{ width={width} height={height} }}"


def shown(cell: Any, stem: str, pictures: dict[str, bytes]) -> Iterator[str]:
    """What a code cell printed and drew; the pictures go into `pictures`."""
    for output in cell.outputs:
        data = output.get("data", {})
        if "image/png" in data:
            name = f"{stem}-{len(pictures)}.png"
            pictures[name] = base64.b64decode(data["image/png"])
            yield drawn(name, pictures[name], data["text/plain"].removeprefix("picture: "))
        elif text := output.get("text") or data.get("text/plain"):
            yield fence(".text .output .wraps", text)


def heading(source: Path) -> str:
    """Where the notebook can be had and run."""
    name, solved = f"{source.stem}.ipynb", f"solutions/{source.stem}.ipynb"
    colab = f"[open in Colab]({COLAB}github/{repository()}/blob/main/notebooks/{name})"
    if not repository():
        colab = f"[open Colab]({COLAB}) and upload it"
    download, solution = f'[download .ipynb]({name}){{ download="{name}" }}', f'[with the solution]({solved}){{ download="{name}" }}'
    return f"{download} · {solution} · {colab} · [how to run it](index.md#run)"


def page(source: Path) -> Exported:
    """The page of one notebook."""
    notebook = build.read(build.target(source, "exercise"))
    solution = next(cell.text for cell in build.parse(source.read_text(encoding="utf-8")) if cell.tag == "SOLUTION")
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    asked = False
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type == "markdown":
            title, *rest = prose(cell.source).split("\n\n")
            parts += [title, *([heading(source)] if number == 0 else []), *rest]
            asked = "**Predict.**" in cell.source
            continue
        code = fence(".python", cell.source)
        if number == 1:
            parts.append(folded("note", "The first cell finds the project, and installs what is missing", code))
            continue
        parts.append(code)
        if "exercise" in cell.metadata.get("tags", ()):
            parts.append(folded("success", "A solution", fence(".python", solution)))
            asked = False
        results = "\n\n".join(shown(cell, source.stem, pictures))
        if results:
            parts.append(folded("abstract", "The result", results) if asked else results)
    return Exported("\n\n".join(parts) + "\n", pictures)


def index() -> str:
    """The list of the notebooks, and how to run them."""
    lines = [
        "---\nhide: [toc]\n---",  # it has one entry, and nine cards want three columns
        "# Notebooks",
        "Here you compute, predict, break and rebuild. Each notebook runs from top to bottom in less than a minute on one core, needs no "
        "network and no GPU, asks for a prediction before each result, and has one exercise that checks itself: a wrong answer is drawn "
        "beside the right one and told which known mistake it is.",
    ]
    cards = []
    for source in build.sources():
        title, introduction = build.read(build.target(source, "exercise")).cells[0].source.removeprefix("# ").split("\n\n")[:2]
        ideas = re.findall(r"\*\*(.+?)\*\*", introduction, re.DOTALL)
        said = f"**[{title}]({source.stem}.md)**", f"{'; '.join(' '.join(idea.split()) for idea in ideas)}"
        cards.append("- " + "\n\n    ".join((*said, drawn(*smallest(source)))))
    lines += ['<div class="grid cards" markdown>', *cards, "</div>"]
    lines += [
        "## Run them { #run }",
        "From a clone, in Jupyter or VS Code: open `notebooks/01_route_eight_tokens.ipynb` with the environment that `make install` makes. "
        "`.venv/bin/python -m pip install jupyterlab` adds JupyterLab to it. Start it in the clone itself and not in `notebooks/`: no link "
        "opens that leads outside of the folder it was started in. "
        "The first cell of each notebook looks for the project around and beside the notebook, and installs what is missing. In Colab, "
        "clone the repository in a cell above it. `notebooks/solutions/` holds every notebook with its solution, and `make notebooks` "
        "executes all of them anew: no printed text may change.",
    ]
    return "\n\n".join(lines) + "\n"


def smallest(source: Path) -> tuple[str, bytes]:
    """Name and content of the picture of a notebook that weighs least: nine of them make a page."""
    return min(page(source).pictures.items(), key=lambda picture: len(picture[1]))


def pages() -> dict[str, str]:
    """Path in the site → Markdown, of the index and of every notebook."""
    return {"notebooks/index.md": index(), **{f"notebooks/{source.stem}.md": page(source).markdown for source in build.sources()}}


def write_files(target: Path) -> None:
    """The pictures and the notebooks themselves, beside their pages in `target`."""
    for source in build.sources():
        for name, content in page(source).pictures.items():
            (target / "notebooks/pictures").mkdir(parents=True, exist_ok=True)
            (target / "notebooks/pictures" / name).write_bytes(content)
        for variant in build.VARIANTS:
            path = build.target(source, variant)
            copied = target / "notebooks" / path.relative_to(build.HERE)
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(path.read_bytes())
