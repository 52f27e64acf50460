"""build/docs from docs/ and the packages: `python docs/tools/build.py`, before `mkdocs build`.

Pages are rendered (render.py), generated pages and the notebooks added (generated.py, notebook_pages.py), figures drawn by node, KaTeX
and mermaid copied from npm. What MkDocs then sees is plain Markdown; it needs no hook and no plugin of ours.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import figures
import generated
import notebook_pages
import vendor
from render import Page

DOCS = Path(__file__).resolve().parents[1]
TARGET = DOCS.parent / "build" / "docs"
COPIED = ("javascripts", "stylesheets", "assets")


def sources_of_pages() -> dict[str, str]:
    """Path in the site → Markdown of every page of docs/ that is written by hand."""
    inside = {"node_modules", "tools", "results"}
    paths = [path for path in sorted(DOCS.rglob("*.md")) if not inside & set(path.relative_to(DOCS).parts)]
    return {path.relative_to(DOCS).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def render_written(written: dict[str, str], drawn: dict[str, str] | None = None) -> dict[str, str]:
    """The pages of docs/ rendered; without `drawn` figures are placeholders."""
    draw = figures.placeholder if drawn is None else drawn.__getitem__
    return {path: Page(path, draw=draw).render(text) for path, text in written.items()}


def assemble(rendered: dict[str, str]) -> dict[str, str]:
    """Every page of the site as Markdown: the rendered and the generated ones, each architecture's story put into its generated page."""
    made, pages = generated.pages(), dict(rendered)
    for path in [path for path in rendered if path in made]:
        made[path] = made[path].replace(f"<!-- story: {Path(path).stem} -->", pages.pop(path))
    return pages | made | notebook_pages.pages()


def llms(pages: dict[str, str]) -> str:
    """llms.txt: what the site holds, one line per page."""
    lines = [
        "# Moebius",
        "",
        "> Mixture-of-Experts twice: a NumPy and PyTorch reference, a fast track, and the proof that they are equal.",
        "",
    ]
    for path, text in sorted(pages.items()):
        title = re.search(r"^# (.+)$", text, re.MULTILINE)
        lines.append(f"- [{title[1] if title else path}]({path.removesuffix('index.md').removesuffix('.md')})")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Write build/docs anew."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--target", type=Path, default=TARGET, help="where the pages go (default: build/docs)")
    target = parser.parse_args().target
    vendor.install()
    written = sources_of_pages()
    used = sorted(set(re.findall(r"^\{\{ figure (\w+) \}\}", "\n".join(written.values()), re.MULTILINE)))
    pages = assemble(render_written(written, figures.draw(vendor.tool("node"), used)))
    shutil.rmtree(target, ignore_errors=True)
    for path, text in pages.items():
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        (target / path).write_text(text, encoding="utf-8")
    for folder in COPIED:
        if (DOCS / folder).is_dir():
            shutil.copytree(DOCS / folder, target / folder)
    notebook_pages.write_files(target)
    vendor.copy(target / "assets/vendor")
    (target / "llms.txt").write_text(llms(pages), encoding="utf-8")
    print(f"{len(pages)} pages and {len(used)} figures in {target}")


if __name__ == "__main__":
    main()
