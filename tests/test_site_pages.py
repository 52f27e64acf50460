"""The pages of the site before any builder: code on them runs, what they cite exists, nothing of the machinery is left in them."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from conftest import REPOSITORY
from site_tools import build, figures, layout, pictures, render, sources, tables

from reference import notation, presets
from reference.balancing import LOSSES
from reference.choices import CHOICES
from reference.experts import ACTIVATIONS
from reference.gating import GROUP_SCORES, NORMALIZERS
from reference.proof import bugs
from reference.shared import SHARED_GATES

WRITTEN = build.sources_of_pages()


@pytest.fixture(scope="module")
def pages() -> dict[str, str]:
    return build.assemble(WRITTEN)


@pytest.mark.parametrize("path", WRITTEN)
def test_page_renders_and_its_code_runs(path):
    text = render.Page(path).render(WRITTEN[path])
    assert "{{" not in re.sub(r"```.*?```", "", text, flags=re.DOTALL), re.search(r".*\{\{.*", text)


def test_every_page_is_in_the_navigation_and_nothing_else(pages):
    named = re.findall(r"(?:: |- )([\w/.-]+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(named) == sorted(pages)


def test_museum_page_shows_every_piece(pages):
    assert len(re.findall(r"^### ", pages["reference/museum.md"], re.MULTILINE)) == len(bugs.MUSEUM)
    for bug in bugs.MUSEUM.values():
        assert bug.seen in pages["reference/museum.md"]


def test_every_equation_is_listed_where_links_look_for_it(pages):
    for identifier in notation.EQUATIONS:
        assert f"#eq-{identifier} }}" in pages[render.equation_home(identifier)]


def test_every_story_is_on_its_page(pages):
    for path, text in WRITTEN.items():
        assert text.strip().splitlines()[0] in pages[path]


def test_every_preset_has_a_page(pages):
    told = "".join(text for path, text in pages.items() if path.startswith("architectures/") and not path.endswith("index.md"))
    assert [name for name in presets.names() if f"`{name}`" not in told] == []


@pytest.mark.parametrize(
    ("words", "table"),
    [
        (pictures.CHOICES, CHOICES),
        (pictures.GATES, NORMALIZERS),
        (pictures.GROUPS, GROUP_SCORES),
        (pictures.SHARED, SHARED_GATES),
        (pictures.ACTIVATIONS, ACTIVATIONS),
        (tables.COUNTED, LOSSES),
    ],
    ids=["choices", "gates", "groups", "shared gates", "activations", "losses"],
)
def test_pictures_have_words_for_every_row_of_a_table(words, table):
    assert words.keys() == table.keys()


@pytest.mark.parametrize("name", presets.names())
def test_idea_picture_shows_every_expert_and_those_a_token_meets(name):
    config = presets.get(name)
    drawn = {kind: path.count("M") for kind, path in re.findall(r'<path class="([^"]+)" d="([^"]+)"', pictures.experts_svg(config))}
    shown = min(config.experts.count, pictures.SHOWN)
    assert drawn.pop("moe-fill moe-e1", 0) == config.experts.shared
    assert sum(drawn.values()) == shown
    assert drawn["moe-fill moe-e0"] == (shown if config.gating.choice == "soft" else min(config.gating.top_k, shown))


def test_there_are_forty_questions_and_each_leads_to_an_answer(pages):
    asked = re.findall(r"^\d+\. (.+\?) → \[[^]]+\]\(([^)]+)\)$", pages["questions.md"], re.MULTILINE)
    assert len(asked) == len(re.findall(r"^\d+\.", pages["questions.md"], re.MULTILINE)) >= 40
    assert len({question for question, _ in asked}) == len(asked)


def test_every_figure_stands_on_a_page():
    used = set(re.findall(r"^\{\{ figure (\w+) \}\}", "\n".join(WRITTEN.values()), re.MULTILINE))
    assert used == set(figures.FIGURES)


@pytest.mark.parametrize(
    "line",
    ["{{ source reference.gating.nothing }}", "{{ equation nothing }}", "{{ bug nothing }}", "{{ table nothing }}", "{{ figure nothing }}",
     "{{ nothing at-all }}", "{{= nothing }}", "```python\n1 / 0\n```"],
)  # fmt: skip
def test_what_does_not_exist_is_refused(line):
    with pytest.raises(ValueError, match=r"page\.md"):
        render.Page("page.md").render(line)


def test_output_follows_code_and_values_fill_sentences():
    page = render.Page("chapters/page.md")
    text = page.render("```python\nx = 2 * 21\nprint(x)\n```\n\nIt is {{= x }}, or {{= f'{x:04}' }}; `{{= x }}` is code.\n")
    assert "{ .text .output }\n42\n```" in text and "It is 42, or 0042; `{{= x }}` is code." in text


def test_source_is_cut_with_its_decorators_and_without_its_docstring():
    whole, bare = sources.find("reference.proof.equal.Tolerance"), sources.find("reference.proof.equal.Tolerance", docstring=False)
    assert whole.text.startswith("@dataclass(frozen=True)\nclass Tolerance")
    assert '"""The two bounds' in whole.text and '"""The two bounds' not in bare.text and "def rms_bound" in bare.text
    with pytest.raises(ValueError, match="no file"):
        sources.find("reference.nothing.at_all")


def test_links_from_chapters_find_the_museum():
    assert "(../reference/museum.md#softmax-twice)" in render.Page("chapters/losses.md").bug("softmax twice")
    assert "(reference/museum.md#softmax-twice)" in render.Page("index.md").bug("softmax twice")


def test_table_of_routers_has_every_top_k_model_once_and_follows_its_settings(monkeypatch):
    def row(name: str) -> list[str]:
        (line,) = [line for line in tables.get("routers").splitlines() if f"`{name}`" in line]
        return [cell.strip() for cell in line.split("|")[1:-1]]

    listed = re.findall(r"`([^`]+)`", tables.get("routers"))
    assert sorted(listed) == sorted(name for name in presets.names() if presets.get(name).gating.choice == "top_k" and name != "dense")
    assert row("deepseek-v3")[:2] == ["sigmoid", "divided by their sum, × 2.5"] and "`deepseek-r1`" in row("deepseek-v3")[3]
    assert row("mixtral-8x7b")[:3] == ["the logits", "a softmax over the chosen", ""]
    assert row("deepseek-v2")[2] == "groups: the best expert counts" != row("deepseek-v3")[2].partition(";")[0]

    real = presets.get
    other = replace(real("olmoe-1b-7b").gating, normalize="sum", scale=3.0)
    monkeypatch.setattr(presets, "get", lambda name: replace(real(name), gating=other) if name == "olmoe-1b-7b" else real(name))
    assert row("olmoe-1b-7b") == ["softmax", "divided by their sum, × 3", "", "`olmoe-1b-7b`"]


def test_table_of_losses_has_every_weight_of_every_preset():
    lines = tables.get("balance-losses").splitlines()
    for name in presets.names():
        for loss, weight in presets.get(name).balance.losses:
            (line,) = [line for line in lines if line.startswith(f"| `{loss}` |")]
            (entry,) = [entry for entry in line.split("|")[3].split("<br>") if f"`{name}`" in entry]
            assert float(entry.partition(":")[0]) == weight


def test_programs_of_the_readme_run(capsys):
    """In one namespace, from top to bottom; the model of transformers ends up on the fast path."""
    names: dict = {}
    programs = re.findall(r"^```python\n(.*?)^```$", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    for program in programs:
        exec(compile(program, "README.md", "exec"), names)
    explained = names["huggingface"].explain(names["model"])
    assert len(programs) == 2 and explained and all(line.backend for line in explained)
    assert str(explained[0]) in capsys.readouterr().out


def test_chapter_of_gating_types_no_table():
    assert "{{ table routers }}" in WRITTEN["chapters/gating.md"] and "|---" not in WRITTEN["chapters/gating.md"].replace(" ", "")


def test_only_columns_of_numbers_go_to_the_right():
    rows = [["a", "loop", "−1.5", "**2**", "*x* 1"], ["b", "sorted", "≈ 10^3^", "none", "3 of 4"]]
    assert layout.markdown(list("vwxyz"), rows).splitlines()[1] == "| --- | --- | ---: | ---: | ---: |"
    assert layout.markdown(["v", "w"], [["a", 1]], numbers=False).splitlines()[1] == "| --- | --- |"
    assert layout.markdown(["v", "w"], []).splitlines()[1] == "| --- | ---: |"


def test_a_table_is_computed():
    assert tables.get("example-assignments").count("dropped") == 1
