"""The notebooks' pages of the site: every picture a file with words, no link left that only a clone can follow."""

from __future__ import annotations

import json
import re

import pytest
from site_tools import build as site_build

pytest.importorskip("nbclient")

import notebook_pages

from notebooks import build

SOURCES = {source.name[:2]: source for source in build.sources()}
GATING = notebook_pages.title_of("docs/chapters/gating.md")
BLOCK = re.compile(r"^ *``` .*?^ *```$", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return notebook_pages.pages()


def page_of(pages: dict[str, str], number: str) -> str:
    return pages[f"notebooks/{SOURCES[number].stem}.md"]


def test_pages_are_part_of_the_site(pages: dict[str, str]) -> None:
    assert set(pages) <= set(site_build.assemble({}))


@pytest.mark.parametrize("number", SOURCES)
def test_page_shows_every_piece_of_the_notebook(number: str, pages: dict[str, str]) -> None:
    notebook = build.read(build.target(SOURCES[number], "exercise"))
    unindented = re.sub(r"^ +", "", page_of(pages, number), flags=re.MULTILINE)
    for code in build.code(notebook):
        assert re.sub(r"^ +", "", code, flags=re.MULTILINE) in unindented
    for text in build.text_outputs(notebook):
        printed = text.partition("picture: ")[0].rstrip()
        assert re.sub(r"^ +", "", printed, flags=re.MULTILINE) in unindented
    assert unindented.count("![") == json.dumps(notebook).count('"image/png"')
    assert '??? success "A solution"' in page_of(pages, number)


@pytest.mark.parametrize("number", SOURCES)
def test_page_asks_before_it_tells(number: str, pages: dict[str, str]) -> None:
    page = page_of(pages, number)
    assert page.count('!!! question "Predict"') == "".join(build.prose(build.read(build.target(SOURCES[number], "exercise")))).count(
        "**Predict.**"
    )
    assert page.count('??? abstract "The result"') >= 5


@pytest.mark.parametrize("number", SOURCES)
def test_links_of_a_clone_are_links_of_the_site(number: str, pages: dict[str, str]) -> None:
    text = BLOCK.sub("", page_of(pages, number))
    targets = re.findall(r"\]\(([^)]+)\)", text)
    assert targets
    known = {path.removeprefix("notebooks/") for path in pages}
    for target in (target.partition("#")[0] for target in targets):
        is_chapter = target.startswith("../") and target.endswith(".md") and (build.ROOT / "docs" / target[3:]).is_file()
        assert (
            target in known
            or is_chapter
            or target.startswith(("https://colab.", "pictures/"))
            or target.endswith(f"{SOURCES[number].stem}.ipynb")
        ), target


def test_every_picture_and_notebook_is_written(tmp_path, pages: dict[str, str]) -> None:
    notebook_pages.write_files(tmp_path)
    for path, text in pages.items():
        for name in re.findall(r"\]\((pictures/[^)]+|[\w/]+\.ipynb)\)", BLOCK.sub("", text)):
            assert (tmp_path / path).parent.joinpath(name).stat().st_size > 1000


def test_index_names_two_ideas_of_each_notebook(pages: dict[str, str]) -> None:
    lines = re.findall(r"^- \*\*\[\d\d · .+\]\((\d\d)_\w+\.md\)\*\*\n\n    (.+); (.+)$", pages["notebooks/index.md"], re.MULTILINE)
    assert [number for number, _, _ in lines] == list(SOURCES)


@pytest.mark.parametrize(
    "link, page",
    [
        ("[top_k](../reference/gating.py#L3)", "[`top_k`][reference.gating.top_k]"),
        ("[x](../optimized/kernels/interpreter.py#L9)", "`x`"),
        ("[notebooks/toy.py](../notebooks/toy.py)", "`notebooks/toy.py`"),
        ("[02](02_gating_orders.ipynb)", "[02](02_gating_orders.md)"),
        ("[docs/chapters/gating.md](../docs/chapters/gating.md)", f"[{GATING}](../chapters/gating.md)"),
        ("[docs/architectures/gshard.md](../docs/architectures/gshard.md)", "[GShard](../architectures/gshard.md)"),
        ("[a](https://example.org/b.py)", "[a](https://example.org/b.py)"),
    ],
)  # fmt: skip
def test_link(link: str, page: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SITE_REPOSITORY", raising=False)
    assert notebook_pages.prose(link) == page


def test_links_into_the_repository_where_the_site_knows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SITE_REPOSITORY", "someone/moebius")
    assert (
        notebook_pages.prose("[x](../tests/conftest.py#L9)") == "[`x`](https://github.com/someone/moebius/blob/main/tests/conftest.py#L9)"
    )
    assert "colab.research.google.com/github/someone/moebius/blob/main/notebooks/05_" in notebook_pages.heading(SOURCES["05"])
