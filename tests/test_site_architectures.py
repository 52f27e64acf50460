"""The architecture pages: drawings show what the reference computes, tables and bars what the presets hold."""

from __future__ import annotations

import re

import numpy as np
import pytest
from conftest import REPOSITORY
from site_tools import build, components, generated, pictures, routed, sources

from reference import presets
from reference.architectures import RECIPES
from reference.cost import model_parameters, sum_parameters

INDEX = (REPOSITORY / "docs/architectures/index.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*presets.names(), routed.BLEND])
def test_every_assignment_is_drawn_as_a_disc_or_a_cross(name):
    config, drawn = routed.small(name), routed.picture(name)
    found = routed.routing(config)
    assert drawn.count("<circle") == found.keep.sum() + config.experts.shared * routed.TOKENS
    assert drawn.count("l6 6m0-6l-6 6") == routed.refused(found, config).sum()
    told = dict(pictures.routed.told(config))
    assert ("refused" in told) == bool(routed.refused(found, config).any()) and ("to all" in told) == bool(config.experts.shared)


def test_same_logits_reach_every_router_and_the_rules_do_what_their_pages_say():
    plain = {name: routed.routing(routed.small(name)) for name in ("switch-base-128", "mixtral-8x7b", "llama4-scout")}
    for found in plain.values():
        np.testing.assert_allclose(found.logits, routed.logits(), rtol=0.2)  # Switch's jitter reaches its own copy
    even = routed.TOKENS // routed.EXPERTS
    for name, each in (("base-layer-44b", even), ("expert-choice-8b-64e", 2 * even)):
        found = routed.routing(routed.small(name))
        assert np.bincount(found.expert[found.keep]).tolist() == routed.EXPERTS * [each]
    for name in ("deepseek-v3", "deepseek-v4-flash", "longcat-flash"):
        config = routed.small(name)
        load_E = routed.routing(config).load[: config.experts.networks]
        assert load_E.max() - load_E.min() <= 2 < np.ptp(routed.routing(routed.small("olmoe-1b-7b")).load)
    hashed = routed.routing(routed.small("hash-layer-1.28b")).expert[:, 0]
    assert all(len(set(hashed[word == routed.IDS].tolist())) == 1 for word in routed.IDS)
    assert routed.routing(routed.small("remoe-182m")).keep.sum() == routed.TOKENS


def test_bars_are_as_long_as_the_numbers():
    names = ["mixtral-8x7b", "mixtral-8x22b"]
    widths = [
        sum(map(float, re.findall(r"width:([\d.]+)%", bar)))
        for bar in re.findall(r'<div class="moe-part-bar">(.*?)</div>', components.bars(names))
    ]
    sums = [sum_parameters(model_parameters(presets.model(name))) for name in names]
    truth = [100 * count / max(one.total for one in sums) for one in sums for count in one]
    np.testing.assert_allclose(widths, truth, atol=0.01)


def test_names_of_few_models_stay_whole_in_the_head_of_their_table():
    assert components.table(["gpt-oss-20b", "gpt-oss-120b"]).startswith("| parameters | `gpt-oss-20b`{ .moe-joined } | `gpt-oss-120b`{")
    assert "moe-joined" not in components.table(["switch-base-128", "switch-c-2048", "switch-xxl-128"])


def test_numbers_of_parameters_have_the_unit_that_suits_them():
    cases = {671.03e9: "671.0\u00a0B", 59.4e6: "59.4\u00a0M", 24_300: "24.3\u00a0K", 999: "999.0", 0: "–"}
    assert {count: components.scaled(count) for count in cases} == cases


def test_settings_read_as_python_writes_them_and_pairs_stand_below_each_other():
    assert generated.setting("softmax") == "`'softmax'`" and generated.setting(()) == "`()`"
    assert generated.setting((("importance", 0.1), ("router_z", 0.001))) == "`importance`\u00a0`0.1`<br>`router_z`\u00a0`0.001`"


def test_recipe_is_shown_without_what_the_page_has_told():
    for name in {recipe.__module__ for recipe in RECIPES.values()}:
        whole, bare = sources.module_text(name), sources.module_text(name, docstring=False)
        assert whole.text.endswith(bare.text) and "Source:" not in bare.text and bare.text.startswith("from __future__")
        assert whole.text.splitlines()[bare.line - 1 :][0] in ("", "from __future__ import annotations")


def test_gallery_shows_every_page_once_in_the_order_of_the_navigation():
    navigation = re.findall(r"architectures/(\w+)\.md", (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    shown = re.findall(r"^- \[[^]]+\]\((\w+)\.md\)", INDEX, re.MULTILINE)
    assert ["index", *shown] == navigation
    assert len(re.findall(r"routed\.picture\(", INDEX)) == len(shown)
    text = build.render_written({"architectures/index.md": INDEX})["architectures/index.md"]
    assert text.count('<svg class="moe-routed"') == len(shown)


@pytest.mark.parametrize(
    ("names", "titles"),
    [
        (["deepseek-v3", "deepseek-r1"], []),
        (["deepseek-v4-flash", "deepseek-v4-flash-hash"], ["deepseek-v4-flash", "deepseek-v4-flash-hash"]),
    ],
)
def test_page_draws_every_rule_of_its_presets_once(names, titles):
    made = pictures.at_work(names)
    assert re.findall(r"<strong><code>([^<]+)</code>", made) == titles
    assert made.count('<svg class="moe-routed"') == max(1, len(titles))
