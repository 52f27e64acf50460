"""Percent sources → executed notebooks: `python notebooks/build.py [--check] [NN …]`.

A source `NN_title.py` is divided by lines `# %%` (code), `# %% [markdown]` (comment lines), `# %% EXERCISE` and `# %% SOLUTION`. Two
notebooks come of it: `NN_title.ipynb` has the exercises' stubs, `solutions/NN_title.ipynb` the solutions in their place. Both begin with
`first_cell.py` and are executed from top to bottom, so nothing below an exercise may need its solution.

Above the first marker, a line `# needs: torch, rich` names what must be importable beside NumPy and Matplotlib, and a line
`# environment: NAME=value` what must be set before anything is imported; the first cell sees to both.

In Markdown, `{{reference.gating.top_k}}` becomes a link to the line that defines it, and `{{path/from/the/root}}` a link to a file.
"""

from __future__ import annotations

import argparse
import asyncio
import importlib
import inspect
import os
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
TIME_LIMIT = 60
AT_ONCE = 2
MOST_CELLS = 30
VARIANTS = {"exercise": "EXERCISE", "solution": "SOLUTION"}
MARKER = re.compile(r"^# %%[ ]*(?P<tag>.*?)[ ]*$")
HEADER = re.compile(r"^# (?P<key>needs|environment): (?P<value>.+)$", re.MULTILINE)
LINK = re.compile(r"\{\{(?P<target>[\w./-]+)\}\}")
KERNEL_ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0", "MPLBACKEND": "module://matplotlib_inline.backend_inline"}


class Cell(NamedTuple):
    """A piece of a source; tag: "" (code), "[markdown]", "EXERCISE" or "SOLUTION"."""

    tag: str
    text: str


def sources() -> list[Path]:
    """The percent sources, in order of their numbers."""
    return sorted(HERE.glob("[0-9][0-9]_*.py"))


def target(source: Path, variant: str) -> Path:
    """Where the notebook of a source lies."""
    folder = HERE if variant == "exercise" else HERE / "solutions"
    return folder / f"{source.stem}.ipynb"


def parse(text: str) -> list[Cell]:
    """The cells of a source; what stands above the first marker is the file's own business. Raises ValueError for an unknown tag."""
    cells: list[tuple[str, list[str]]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if marker := MARKER.match(line):
            if marker["tag"] not in ("", "[markdown]", *VARIANTS.values()):
                raise ValueError(f"line {number}: the tag {marker['tag']!r} is not [markdown], EXERCISE or SOLUTION")
            cells.append((marker["tag"], []))
        elif cells:
            cells[-1][1].append(line)
    return [Cell(tag, "\n".join(lines).strip("\n")) for tag, lines in cells]


def link(name: str, up: str) -> str:
    """A Markdown link to a file of the repository, or to the line that defines a public object. Raises ValueError where there is none.

    Its text is plain: JupyterLab gives what is marked as code the colour of code, and nobody sees that it is a link.
    """
    if (ROOT / name).is_file():
        return f"[{name}]({up}{name})"
    module, _, attribute = name.rpartition(".")
    try:
        found = inspect.unwrap(getattr(importlib.import_module(module), attribute))
        line = inspect.getsourcelines(found)[1]
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{{{{{name}}}}} names neither a file of the repository nor a function or class") from error
    path = Path(str(inspect.getsourcefile(found))).relative_to(ROOT).as_posix()
    return f"[{attribute}]({up}{path}#L{line})"


def first_cell(source: str) -> str:
    """`first_cell.py` with the needs and the environment that stand above the first marker of a source."""
    header = {match["key"]: match["value"] for match in HEADER.finditer(source.partition("# %%")[0])}
    code = (HERE / "first_cell.py").read_text(encoding="utf-8").strip()
    more = [name.strip() for name in header.get("needs", "").split(",") if name.strip()]
    code = code.replace('("numpy", "matplotlib")', "(" + ", ".join(f'"{name}"' for name in ("numpy", "matplotlib", *more)) + ")")
    if "environment" in header:
        name, _, value = header["environment"].partition("=")
        code = code.replace("import subprocess", "import os\nimport subprocess") + f'\nos.environ["{name}"] = "{value}"'
    return code


def compose(source: Path, variant: str) -> nbformat.NotebookNode:
    """The notebook of a source, not executed. Raises ValueError where it has more than MOST_CELLS cells."""
    up = "../" * len(target(source, variant).parent.relative_to(ROOT).parts)
    hidden = {tag for name, tag in VARIANTS.items() if name != variant}
    text = source.read_text(encoding="utf-8")
    pieces = [cell for cell in parse(text) if cell.tag not in hidden]
    pieces.insert(1, Cell("", first_cell(text)))
    if len(pieces) > MOST_CELLS:
        raise ValueError(f"{source.name} has {len(pieces)} cells; the limit is {MOST_CELLS}")
    cells = []
    for number, piece in enumerate(pieces):
        if piece.tag == "[markdown]":
            prose = "\n".join(line.removeprefix("#").removeprefix(" ") for line in piece.text.splitlines())
            cell = nbformat.v4.new_markdown_cell(LINK.sub(lambda found: link(found["target"], up), prose))
        else:
            cell = nbformat.v4.new_code_cell(piece.text)
            if piece.tag:
                cell.metadata["tags"] = [piece.tag.lower()]
        cell["id"] = f"cell-{number:02}"
        cells.append(cell)
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel, "language_info": {"name": "python"}})


def without_noise(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The executed notebook with only what a second run repeats. Raises ValueError for anything on stderr but Matplotlib's font cache."""
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        cell.metadata.pop("execution", None)
        warnings = [output for output in cell.outputs if output.get("name") == "stderr"]
        for warning in warnings:
            if "font cache" not in warning.text:
                raise ValueError(f"the cell {cell.source.splitlines()[0]!r} writes to stderr: {warning.text}")
        cell.outputs = [output for output in cell.outputs if output not in warnings]
    notebook.metadata["language_info"] = {"name": "python"}
    return notebook


async def execute(notebook: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Runs every cell in a fresh kernel that starts in `folder`. Raises nbclient's CellExecutionError where a cell fails."""
    client = NotebookClient(
        notebook, timeout=TIME_LIMIT, startup_timeout=180, kernel_name="python3", record_timing=False,
        resources={"metadata": {"path": str(folder)}}, coalesce_streams=True,
        extra_arguments=["--IPKernelApp.log_level=ERROR"],  # it warns that it talks over TCP
    )  # fmt: skip
    await client.async_execute(env={**os.environ, **KERNEL_ENVIRONMENT})
    return without_noise(notebook)


def code(notebook: nbformat.NotebookNode) -> list[str]:
    """The code cells."""
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def prose(notebook: nbformat.NotebookNode, *, lines: bool = True) -> list[str]:
    """The Markdown cells; lines=False leaves out at which line a linked function stands, which moves with every change of its file."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return texts if lines else [re.sub(r"#L\d+\)", ")", text) for text in texts]


def text_outputs(notebook: nbformat.NotebookNode) -> list[str]:
    """Of each code cell what it printed or returned as text, and of each picture that there is one."""
    shown = []
    for cell in notebook.cells:
        if cell.cell_type == "code":
            shown.append("".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in cell.outputs))
    return shown


def read(path: Path) -> nbformat.NotebookNode:
    """A committed notebook."""
    return nbformat.read(path, as_version=4)


def differences(committed: nbformat.NotebookNode, built: nbformat.NotebookNode) -> list[str]:
    """What distinguishes the committed notebook from one just built and executed.

    Pictures are compared by their existence. Text is compared to the letter, wherever the two were executed: processors sum in different
    orders, and a notebook that prints a digit that depends on it prints one digit too many.
    """
    views = {"code": code, "prose": prose, "text output": text_outputs}
    found = []
    for what, view in views.items():
        old, new = view(committed), view(built)
        if len(old) != len(new):
            found.append(f"{len(old)} pieces of {what} instead of {len(new)}")
        pairs = enumerate(zip(old, new, strict=False))
        found += [f"{what} {number} is\n{before}\ninstead of\n{now}" for number, (before, now) in pairs if before != now]
    return found


async def build(source: Path, variant: str, *, check: bool, at_once: asyncio.Semaphore) -> list[str]:
    """Writes one notebook, or compares it with the committed one; the differences found."""
    path, notebook = target(source, variant), compose(source, variant)
    async with at_once:
        start = time.perf_counter()
        await execute(notebook, path.parent)
        print(f"{path.relative_to(ROOT)}: {time.perf_counter() - start:.1f} s", flush=True)
    if check:
        committed = [f"{path.name} is missing"] if not path.exists() else differences(read(path), notebook)
        return [f"{path.relative_to(ROOT)}: {line}" for line in committed]
    path.parent.mkdir(exist_ok=True)
    nbformat.validate(notebook)
    path.write_text(nbformat.writes(notebook).rstrip("\n") + "\n", encoding="utf-8")
    return []


async def build_all(chosen: Sequence[Path], *, check: bool) -> list[str]:
    """Both notebooks of each source, AT_ONCE kernels at a time."""
    at_once = asyncio.Semaphore(AT_ONCE)
    jobs = [build(source, variant, check=check, at_once=at_once) for source in chosen for variant in VARIANTS]
    return [line for lines in await asyncio.gather(*jobs) for line in lines]


def main(arguments: Sequence[str] | None = None) -> int:
    """0: written, or in step; 1: --check found differences; 2: an unknown number."""
    parser = argparse.ArgumentParser(description="execute the notebooks and write them with their outputs")
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a committed notebook differs from one built now")
    parser.add_argument("numbers", nargs="*", metavar="NN", help="only these, such as 01 (default: all)")
    options = parser.parse_args(arguments)
    known = {source.name[:2]: source for source in sources()}
    if unknown := [number for number in options.numbers if number not in known]:
        parser.error(f"no notebook {', '.join(unknown)}; there are {', '.join(known)}")
    sys.path.insert(0, str(ROOT))
    found = asyncio.run(build_all([known[number] for number in options.numbers or known], check=options.check))
    print("\n".join(found), end="\n" if found else "")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
