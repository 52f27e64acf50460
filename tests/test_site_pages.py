"""The pages of the site before any builder: code on them runs, what they cite exists, nothing of the machinery is left in them."""

from __future__ import annotations

import itertools
import posixpath
import re
from dataclasses import replace

import pytest
from conftest import REPOSITORY
from site_tools import (
    build,
    calculations,
    docstrings,
    equations,
    figures,
    finish,
    generated,
    kernels,
    layout,
    native,
    notebook_pages,
    pictures,
    render,
    sources,
    tables,
)

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
    told = pages["reference/museum.md"]
    assert len(re.findall(r"^### ", told, re.MULTILINE)) == len(bugs.MUSEUM)
    for bug in bugs.MUSEUM.values():
        assert f"**{'Shipped' if bug.shipped else 'Near'}**: {bug.place}" in told
    shipped, near = (told.count(f"<br>**{word}**: ") for word in ("Shipped", "Near"))
    assert f"{shipped} have shipped and {near} lie near" in told and near == sum("near:" in bug.seen for bug in bugs.MUSEUM.values())


def test_every_equation_is_listed_where_links_look_for_it(pages):
    for identifier in notation.EQUATIONS:
        assert f"#eq-{identifier} }}" in pages[equations.equation_home(identifier)]


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
    experts = config.experts
    assert drawn.pop("moe-fill moe-e1", 0) == experts.shared
    assert sum(drawn.values()) == experts.count
    assert drawn["moe-fill moe-e0"] == (experts.count if config.gating.choice == "soft" else min(config.gating.top_k, experts.count))
    assert drawn.get("moe-slot moe-blank", 0) <= experts.count - experts.networks


def test_there_are_forty_questions_and_each_leads_to_an_answer(pages):
    asked = re.findall(r"^\d+\. (.+\?) → \[[^]]+\]\(([^)]+)\)$", pages["questions.md"], re.MULTILINE)
    assert len(asked) == len(re.findall(r"^\d+\.", pages["questions.md"], re.MULTILINE)) >= 40
    assert len({question for question, _ in asked}) == len(asked)


def test_every_chapter_ends_with_the_page_that_follows_it(pages):
    """As the navigation says, by its name: the footer says the same."""
    navigation = re.findall(r"^ +- (?:(.+): )?(\S+\.md)$", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    for (_, path), (title, target) in itertools.pairwise(navigation):
        if path.startswith("chapters/"):
            last = WRITTEN[path].rstrip().splitlines()[-1]
            title = title or re.search(r"^# (.+)$", pages[target], re.MULTILINE)[1]
            assert last.startswith(f"**Next:** [{title}]({posixpath.relpath(target, 'chapters')}): "), last


def test_every_figure_stands_on_a_page():
    used = set(re.findall(r"^\{\{ figure (\w+) \}\}", "\n".join(WRITTEN.values()), re.MULTILINE))
    assert used == set(figures.FIGURES)


@pytest.mark.parametrize(
    "line",
    ["{{ source reference.gating.nothing }}", "{{ c nothing }}", "{{ equation nothing }}", "{{ bug nothing }}", "{{ table nothing }}",
     "{{ figure nothing }}", "{{ nothing at-all }}", "{{= nothing }}", "```python\n1 / 0\n```"],
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


def test_c_function_is_cut_with_the_comment_before_it():
    found = native.find("first_row_of")
    assert found.path == "optimized/native/moe.c" and found.text.startswith("/* The rows of an expert") and found.text.endswith("\n}")
    assert (native.ROOT / found.path).read_text(encoding="utf-8").splitlines()[found.line - 1] == found.text.splitlines()[0]
    wide, shown = native.find("weight_rows"), native.shown("weight_rows")
    comments = [text.partition("*/")[0] for text in (wide.text, shown.text)]
    assert max(map(len, comments[0].splitlines())) > native.COLUMNS + 3 >= max(map(len, comments[1].splitlines()))
    assert comments[0].replace(" *", "").split() == comments[1].replace(" *", "").split()
    assert wide.text.partition("*/")[2] == shown.text.partition("*/")[2] and "\n *\n" in comments[1]
    assert native.shown("up_item") == native.find("up_item")
    assert native.constant("PAST_BYTES") == 8 << 20 and native.stripes("neon") == (4, 4)
    for call in (lambda: native.constant("NOTHING"), lambda: native.stripes("nothing")):
        with pytest.raises(ValueError, match=r"nothing|NOTHING"):
            call()


def test_links_from_chapters_find_the_museum():
    assert "(../reference/museum.md#softmax-twice)" in render.Page("chapters/losses.md").bug("softmax twice")
    assert "(reference/museum.md#softmax-twice)" in render.Page("index.md").bug("softmax twice")


def test_table_of_routers_has_every_top_k_model_once_and_follows_its_settings(monkeypatch):
    def row(name: str) -> list[str]:
        (line,) = [line for line in tables.get("routers").splitlines() if f"`{name}`" in line]
        return [cell.strip() for cell in line.split("|")[1:-1]]

    listed = re.findall(r"`([^`]+)`", tables.get("routers"))
    assert sorted(listed) == sorted(name for name in presets.names() if presets.get(name).gating.choice == "top_k" and name != "dense")
    assert (
        row("deepseek-v3")[0].startswith("**sigmoid** → divided by their sum, ×\N{NO-BREAK SPACE}2.5<span")
        and "`deepseek-r1`" in row("deepseek-v3")[1]
    )
    assert row("mixtral-8x7b")[0] == "**the logits** → a softmax over the chosen"
    assert "groups: the best expert counts" in row("deepseek-v2")[0] and "groups: the two best" in row("deepseek-v3")[0]

    real = presets.get
    other = replace(real("olmoe-1b-7b").gating, normalize="sum", scale=3.0)
    monkeypatch.setattr(presets, "get", lambda name: replace(real(name), gating=other) if name == "olmoe-1b-7b" else real(name))
    assert row("olmoe-1b-7b") == ["**softmax** → divided by their sum, ×\N{NO-BREAK SPACE}3", "`olmoe-1b-7b`"]


def test_table_of_losses_has_every_weight_of_every_preset():
    lines = tables.get("balance-losses").splitlines()
    for name in presets.names():
        for loss, weight in presets.get(name).balance.losses:
            (line,) = [line for line in lines if line.startswith(f"| `{loss}`<")]
            (entry,) = [entry for entry in line.split("|")[2].split("<br>") if f"`{name}`" in entry]
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


DOCSTRING = """What it is (top-k): g_t = x.

one, two  the first meaning, which
          goes on
three     [T, K] | None

Shapes: x [T]. Source: Somebody 2017.
Not a label: this. Deviates: in nothing.

    code = 1
"""


def test_docstring_becomes_lists():
    """Fields in two columns and labelled parts would be run together into one paragraph."""
    told = docstrings.markdown(DOCSTRING)
    assert "`one`, `two`\n:   the first meaning, which goes on\n" in told and "`three`\n:   `[T,\N{NO-BREAK SPACE}K]` | None\n" in told
    assert "Shapes\n:   x `[T]`.\n" in told and "Source\n:   Somebody 2017. Not a label: this.\n" in told
    assert "Deviates\n:   in nothing.\n" in told
    assert "What it is ([top-k][eq-top-k]): g<sub>t</sub> = x." in told and "    code = 1" in told


def test_what_is_said_of_arguments_and_errors_becomes_entries():
    told = docstrings.markdown(
        "load [E]: counted; tokens, rate: more. Not of rate alone. Raises ValueError for another.", {"load", "tokens", "rate"}
    )
    assert "`load [E]`\n:   counted\n" in told and "`tokens`, `rate`\n:   more.\n" in told and "\n\nNot of rate alone.\n\n" in told
    assert "Raises\n:   `ValueError` for another.\n" in told
    assert re.findall(r"^(Raises|Source|Not .*|Last.*)$", docstrings.markdown("Raises ValueError.\n\nLast. Source: x."), re.M) == [
        "Last.",
        "Raises",
        "Source",
    ]
    assert docstrings.markdown("A word: of no argument. Raises ValueError. Then more.", {"load"}).startswith(
        "A word: of no argument. Raises"
    )


@pytest.mark.parametrize(
    ("plain", "marked"),
    [
        ("z_te = Σ_d x_td W_ed + b_e", "z<sub>te</sub> = Σ<sub>d</sub> x<sub>td</sub> W<sub>ed</sub> + b<sub>e</sub>"),
        ("FFN_{e_tk}(x_t), f'_g, x̂_t'ec", "FFN<sub>e<sub>tk</sub></sub>(x<sub>t</sub>), f'<sub>g</sub>, x̂<sub>t'ec</sub>"),
        ("θ^(−2i / D), K^T", "θ<sup>−2i / D</sup>, K<sup>T</sup>"),
        ("x_TD goes by top_k of bounds_P[e + 1]", "`x_TD` goes by `top_k` of `bounds_P[e + 1]`"),
        ('by config.balance, e.g. "top_k" in [0, 1]', 'by `config.balance`, e.g. `"top_k"` in [0, 1]'),
        ("`x_t` of CHOICES, GShard and SOFT", "`x_t` of `CHOICES`, GShard and SOFT"),
    ],
)
def test_names_are_code_and_the_indices_of_symbols_low(plain, marked):
    assert docstrings.mark(plain, {"top_k", "CHOICES"}) == marked


def test_a_quoted_word_is_a_value_where_values_are_listed():
    assert docstrings.mark('"none" | "top_k"') == '"none" | `"top_k"`'
    assert docstrings.mark('"none" | "two words"', values=True) == '`"none"` | "two words"'


def test_equation_is_told_by_the_docstring_of_its_function(pages):
    text = pages["reference/equations/gating.md"]
    assert "Gates that sum to 1: [`reference.gating.sum_normalizer_forward`][reference.gating.sum_normalizer_forward]. Lepikhin" in text


def test_equation_that_a_sentence_names_is_a_link_where_its_id_can_be_nothing_else(pages):
    assert equations.linked("that of `hash-table`, or of `softmax`") == "that of [`hash-table`][eq-hash-table], or of `softmax`"
    assert "the table of [`hash-table`][eq-hash-table]" in pages["reference/equations/choices.md"]


def test_every_function_of_an_equation_is_a_link(pages):
    functions = {equation.function for equation in notation.EQUATIONS.values()}
    assert [name for name in functions if not any(f"[`{name}`][{name}]" in text for text in pages.values())] == []


def test_options_in_help_are_code(pages):
    page = pages["reference/command-line.md"]
    assert "Default: the committed model." in page and "Default: 0.7; `--quick`: 0.3." in page
    assert generated.with_options("With --out, or `--json`; well-known -- so.") == "With `--out`, or `--json`; well-known -- so."
    assert not re.search(r"(?<!`)--\w", page)


def test_notebook_page_names_pages_by_their_titles_and_folds_hints():
    assert notebook_pages.prose("[docs/architectures/gshard.md](../docs/architectures/gshard.md)") == "[GShard](../architectures/gshard.md)"
    assert '??? tip "Hint 1"\n\n    Count.' in notebook_pages.prose("<details><summary>Hint 1</summary>Count.</details>")


def test_tables_of_kernels_are_divided_by_target():
    told = tables.get("figures weight_gradient_kernel")
    assert re.findall(r'=== "(\w+)"', told) == ["sm80", "sm90", "sm100", "gfx942"] and "async copies" not in told.partition('"gfx942"')[2]


def test_contract_of_a_kernel_marks_what_it_takes_with_its_shape():
    told = tables.get("contract combine_kernel") + tables.get("contract project_up_kernel")
    assert "out<sub>t</sub> = Σ<sub>k</sub> g<sub>tk</sub>" in told and "`PARTIAL[part, place of (t, k)]`" in told
    assert "`OUT [T, D]` float" in told.replace("\N{NO-BREAK SPACE}", " ") and "(`max_tiles` · ⌈F / `BLOCK_COLUMNS`⌉)" in told
    assert "M = 2F" in told and "T·K &lt; 2³¹" in told
    assert not any("&lt;" in code or "\\" in code for code in re.findall("`([^`]*)`", told))


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_row_of_the_grid_holds_the_grid_only(kernel):
    (grid,) = re.findall(r"^grid\n:   (.+)$", tables.get(f"contract {kernel}"), re.MULTILINE)
    assert grid.startswith("(") and ". " not in grid and len(grid) < 90


def test_what_stands_right_at_a_formula_stays_with_it():
    formula = r'<span class="arithmatex">\(x\)</span>'
    for text in (f"{formula}, y", f"({formula}) y", f"{formula}-th", f"{formula}&rsquo;s y"):
        kept, rest = re.fullmatch(r'<span class="moe-joined">(.*</span>[^ ]*)</span>(.*)', finish.joined(text)).groups()
        assert kept + rest == text and rest in ("", " y")
    assert finish.joined(f"a {formula} b") == f"a {formula} b"


@pytest.mark.parametrize(
    ("plain", "kept"),
    [
        ("With K\n= 8 of E = 256 experts", "With K~=~8 of E~=~256 experts"),
        ("h<sub>e</sub> = 1 − p<sub>e</sub>, and T · K &lt; 2³¹.", "h<sub>e</sub>~=~1~−~p<sub>e</sub>, and T~·~K~&lt;~2³¹."),
        ("0.2500 · 0.2640 + 0.2500 · 0.2106 = 0.1187", "0.2500~·~0.2640~+ 0.2500~·~0.2106~= 0.1187"),
        ("⌈factor · K · S / E⌉ and x → logits → scores", "⌈factor~· K~·~S~/~E⌉ and x~→ logits~→ scores"),
        ("(E − 1)(V − 1) / (2 N)", "(E~−~1)(V~− 1)~/~(2 N)"),
        ('<a title="K = 8">2 / 3</a> = <code>a = b</code> · z', '<a title="K = 8">2~/~3</a>~= <code>a = b</code>~· z'),
        ("<th>× best</th><pre>K = 8</pre>", "<th>×~best</th><pre>K = 8</pre>"),
        ('<svg><text>K = 8</text></svg> <span class="arithmatex">\\(K = 8\\)</span>', None),
        ("a line\n- with a dash = none", "a line\n- with a dash~= none"),
    ],
)
def test_lines_end_behind_a_sign_and_short_calculations_are_whole(plain, kept):
    expected = plain if kept is None else kept.replace("~", "\N{NO-BREAK SPACE}")
    assert calculations.calculated(f"K = 8<article>{plain}</article>") == f"K = 8<article>{expected}</article>"


def test_only_long_names_are_divided_and_behind_dots_and_underscores():
    assert finish.breakable("<code>a_module.of_some_length.a_function(x_TD)</code>") == (
        "<code>a_<wbr>module.<wbr>of_<wbr>some_<wbr>length.<wbr>a_<wbr>function(x_TD)</code>"
    )
    for text in ("<code>a_module.a_function</code>", f"<code>{30 * '_'}</code>", "<code>a long piece of code, no name at all</code>"):
        assert finish.breakable(text) == text
