"""The built site in Chromium: every page at two widths and in both schemes, every figure under the keyboard, nothing from elsewhere."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import site_server
from conftest import REPOSITORY, needs_tool
from site_tools import figures

pytestmark = pytest.mark.slow

WIDTHS, SCHEMES = (390, 1280), ("light", "dark")
MAX_BYTES, MAX_REQUESTS, MAX_SHIFT = 700_000, 40, 0.1
LATER = ("mermaid.min.js", "search_index.json")  # after the page: the first diagram loads the one, the search in its worker the other
AXE = REPOSITORY / "docs/node_modules/axe-core/axe.min.js"
AXE_RULES = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"], "resultTypes": ["violations"]}
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
]
RECORD_SHIFTS = """window.shifts = 0;
new PerformanceObserver((list) => { for (const entry of list.getEntries()) if (!entry.hadRecentInput) window.shifts += entry.value; })
  .observe({ type: "layout-shift", buffered: true });"""
SETTLED = 1500
"""Milliseconds after which a figure has told its new state, on a busy machine too; it waits 300 for further input."""
AWAKE = "() => [...document.querySelectorAll('moe-figure')].every((figure) => figure.dataset.awake === 'yes')"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """(address, folder) of the site, built and served."""
    for tool in ("node", "npm"):
        needs_tool(tool)
    folder, port = tmp_path_factory.mktemp("site"), site_server.free_port()
    built = site_server.build(folder, port)
    with site_server.serve(folder / "www", port):
        yield f"http://127.0.0.1:{port}/{site_server.PREFIX}/", built


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium."""
    needs_tool("playwright")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        chromium = play.chromium.launch(executable_path=needs_tool("chromium"), args=ARGUMENTS)
        yield chromium
        chromium.close()


class Visit:
    """A page in a context of its own; `troubles` fills with console errors, exceptions and requests to other origins."""

    def __init__(self, browser: Any, address: str, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.address, self.troubles, self.documents = address, [], 0
        self.context.route("**/*", self._let_through)
        self.page = self.context.new_page()
        self.page.set_default_timeout(120_000)  # a busy machine is slow, not broken
        self.page.on("console", lambda message: message.type in ("error", "warning") and self.troubles.append(message.text))
        self.page.on("pageerror", lambda error: self.troubles.append(str(error)))

    def _let_through(self, route: Any) -> None:
        url = route.request.url
        if url.startswith((self.address, "data:", "blob:")):
            self.documents += route.request.resource_type == "document"
            route.continue_()
        else:
            self.troubles.append(f"asks for {url}")
            route.abort()

    def open(self, path: str) -> Any:
        """The page, its figures awake. A navigation that stalls is tried again: what is judged is the page, not the connection."""
        from playwright.sync_api import TimeoutError as Stalled

        for last in (False, False, True):
            try:
                self.page.goto(self.address + path, wait_until="load", timeout=40_000)
                break
            except Stalled:
                if last:
                    raise
        self.page.wait_for_function(AWAKE)
        return self.page

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def paths(folder: Path) -> list[str]:
    """Every page of the built site."""
    found = (page.relative_to(folder).as_posix().removesuffix("index.html") for page in sorted(folder.rglob("index.html")))
    return list(found)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("width", WIDTHS)
def test_every_page(site, browser, width, scheme):
    address, folder = site
    bad = []
    with Visit(browser, address, viewport={"width": width, "height": 900}, color_scheme=scheme) as visit:
        visit.context.add_init_script(RECORD_SHIFTS)
        for path in paths(folder):
            page = visit.open(path)
            bad += [f"{path or 'home'}: {trouble}" for trouble in visit.troubles]
            visit.troubles.clear()
            if page.evaluate("document.documentElement.scrollWidth > innerWidth"):
                bad.append(f"{path}: scrolls sideways")
            if (shift := page.evaluate("window.shifts")) > MAX_SHIFT:
                bad.append(f"{path}: layout shifts by {shift:.2f}")
            page.evaluate(AXE.read_text(encoding="utf-8"))
            for violation in page.evaluate(f"axe.run(document, {AXE_RULES}).then((found) => found.violations)"):
                nodes = [node["html"][:120] for node in violation["nodes"][:2]]
                bad.append(f"{path}: axe {violation['id']}: {nodes}")
    assert not bad, "\n".join(bad)


def test_a_picture_stays_where_it_is_when_the_next_one_arrives(site, browser):
    address, folder = site
    stayed = """() => {
      const places = (plots) => JSON.stringify([...plots.children].map((picture) => picture.getBoundingClientRect()))
      return [...document.querySelectorAll(".moe-plots")].flatMap((plots) => {
        const after = []
        while (plots.children.length > 1) {
          const before = JSON.stringify(JSON.parse(places(plots)).slice(0, -1))
          plots.lastElementChild.remove()
          after.push(before === places(plots))
        }
        return after
      })
    }"""
    held: list[bool] = []
    for width in WIDTHS:
        with Visit(browser, address, viewport={"width": width, "height": 900}) as visit:
            for path in paths(folder):
                if "moe-plots" in (folder / path / "index.html").read_text(encoding="utf-8"):
                    held += visit.open(path).evaluate(stayed)
    assert len(held) > 10 and all(held)


def test_weight_and_requests(site, browser):
    address, folder = site
    bad = []
    for path in paths(folder):
        with Visit(browser, address, viewport={"width": 1280, "height": 900}) as visit:
            page = visit.open(path)
            page.wait_for_load_state("networkidle")
            entries = page.evaluate(
                "[...performance.getEntriesByType('navigation'), ...performance.getEntriesByType('resource')]"
                ".map((entry) => [entry.name, entry.decodedBodySize])"
            )
        weight = sum(size for name, size in entries if not name.endswith(LATER))
        if weight > MAX_BYTES or len(entries) > MAX_REQUESTS:
            bad.append(f"{path or 'home'}: {weight} bytes in {len(entries)} requests")
    assert not bad, "\n".join(bad)


def test_links_and_anchors_hold(site):
    assert site_server.broken_links(site[1]) == []


def test_link_checker_sees_what_is_broken(tmp_path):
    (tmp_path / "index.html").write_text('<a id="here" href="#gone"></a><a href="no.html"></a><script src="https://x.y/z.js"></script>')
    assert len(site_server.broken_links(tmp_path)) == 3


# Page, key of a control, how often ArrowRight (negative: ArrowLeft), what it changes, what the status must then say of Python's result.
Told = Callable[[dict], str]


def shown(value: float) -> str:
    """A number as figures print it."""
    return f"{value:.3f}".replace("-", "−")


MOVES: dict[str, tuple[str, str, int, dict[str, Any], Told]] = {
    "route": ("", "topK", -1, {"topK": 1}, lambda case: f"goes to action with gate {case['gate'][2][0]:.3f}. Capacity {case['capacity']}"),
    "gates": ("chapters/gating/", "z0", -20, {"logits": [-1.0, -1.0, 1.6, 0.3]}, lambda case: f"{case['sigmoid']['gate'][0]:.3f}, "),
    "buckets": ("chapters/capacity/", "factor", -1, {"factor": 0.75}, lambda case: f"served, {len(case['dropped'])} dropped"),
    "losses": ("chapters/losses/", "pull", 8, {"pull": 2.0}, lambda case: f"The loss is {case['losses']['right']:.3f}"),
    "bias": ("chapters/bias/", "skew", 2, {"skew": 1.5}, lambda case: f"MaxVio is {case['violation'][0]:.2f} at the first step"),
    "cost": ("chapters/why-sparse/", "right", 0, {}, lambda case: f"mixtral-8x7b stores {case['right']['total'] / 1e9:.1f}"),
    "layer": (
        "chapters/layer/",
        "step",
        6,
        {"step": 6},
        lambda case: f"added up: ({case['y'][0]:.3f}, {case['y'][1]:.3f}, {case['y'][2]:.3f}",
    ),
    "granularity": (
        "chapters/fine-grained/",
        "logCut",
        2,
        {"logCut": 2},
        lambda case: "{chosen} of {routed} experts of width {narrow}".format(**case),
    ),
    "lamp": ("chapters/equal/", "logAtol", -8, {"logAtol": -6.0}, lambda case: "all zeros" if case["zero"]["allclose"] else "no wrong one"),
    "scrubber": (
        "chapters/specialization/",
        "checkpoint",
        -3,
        {"checkpoint": 4},
        lambda case: f"MaxVio {case['violation']:.2f}.",
    ),
    "gradients": (
        "chapters/gradients/",
        "dg2",
        -8,
        {"dgate": [-1.0, -0.8]},
        lambda case: f"thing {shown(case['dlogits'][1])}, action {shown(case['dlogits'][2])}, place 0.",
    ),
    "dispatch": (
        "chapters/dispatch/",
        "pull",
        4,
        {"pull": 4},
        lambda case: (
            f"Sort: {len(case['token'])} rows, {case['integers']} integers. "
            f"Einsum: {4 * case['capacity']} rows, {case['padding']} of them padding, {case['entries']} entries."
        ),
    ),
    "crossings": (
        "chapters/expert-parallelism/",
        "topK",
        2,
        {"topK": 4},
        lambda case: f"the dispatch would send {case['apart']:,} bytes, not {case['dispatch'].sum():,}.",
    ),
    "ladder": (
        "chapters/ladder/",
        "rung",
        1,
        {"rung": 3},
        lambda case: f"launches rise from {case['before'][0]} to {case['now'][0]}; 10⁶ FLOPs fall from {case['before'][1] / 1e6:.1f} ",
    ),
}
STARTS = {
    "route": {"word": 2, "topK": 2, "factor": 1.0, "order": "choice_major"},
    "gates": {"topK": 2},
    "buckets": {"factor": 1.0, "order": "choice_major", "step": 16},
    "losses": {"pull": 0.0, "topK": 2, "factor": 1.0},
    "bias": {"logRate": -2.0, "skew": 1.0, "steps": 160, "shift": "no"},
    "cost": {"left": "dense", "right": "mixtral-8x7b", "bytes": 2},
    "layer": {"word": 2, "company": "batch", "step": 0},
    "granularity": {"logCut": 0, "shared": 0, "tokens": 1024},
    "lamp": {"logSize": -3.0, "logAtol": -2.0, "rtol": 0.02},
    "scrubber": {"checkpoint": 7, "layer": 1, "run": 0},
    "gradients": {"word": 1, "topK": 2, "router": "sum", "dgate": [-1.0, 0.0]},
    "dispatch": {"step": 3, "view": "sort", "word": -1, "pull": 0, "factor": 1},
    "crossings": {"ranks": 2, "topK": 2, "way": "dispatch", "dModel": 4, "itemsize": 4},
    "ladder": {"rung": 2, "part": "forward", "experts": 16, "load": "skewed"},
}


def test_every_figure_is_tried():
    assert set(MOVES) == set(STARTS) == set(figures.FIGURES)


@pytest.mark.parametrize("name", MOVES)
def test_figure_under_the_keyboard_shows_what_python_computes(site, browser, name):
    path, key, presses, change, told = MOVES[name]
    make_data, _, case = figures.FIGURES[name]
    data = make_data()
    state = STARTS[name] | ({"logits": [z for row in data["logits"] for z in row]} if name == "route" else {}) | change
    with Visit(browser, site[0], viewport={"width": 390, "height": 900}) as visit:
        page = visit.open(path)
        page.focus(f"#figure-{name}-{key}")
        for _ in range(abs(presses)):
            page.keyboard.press("ArrowRight" if presses > 0 else "ArrowLeft")
        page.wait_for_timeout(SETTLED)
        assert told(case(state, data)) in page.inner_text(f"#figure-{name} .moe-status")
        assert ("?" in page.evaluate("location.hash")) == (presses != 0)
        page.click(f"#figure-{name} .moe-reset")
        page.wait_for_timeout(SETTLED)
        assert page.evaluate("location.hash") == "" and not visit.troubles


def test_single_gate_teaches_nothing_until_it_is_no_longer_divided(site, browser):
    """The puzzle of the chapter on gradients, with the keys of a reader."""
    state = STARTS["gradients"] | {"topK": 1}
    make_data, _, case = figures.FIGURES["gradients"]
    with Visit(browser, site[0], viewport={"width": 390, "height": 900}) as visit:
        page = visit.open("chapters/gradients/")
        page.focus("#figure-gradients-topK")
        page.keyboard.press("ArrowLeft")
        page.wait_for_timeout(SETTLED)
        assert not case(state, make_data())["dlogits"].any()
        assert "Every logit gets 0: the only gate is 1" in page.inner_text("#figure-gradients .moe-status")
        page.focus("#figure-gradients-router")
        page.keyboard.press("ArrowUp")  # from "÷ sum" to the plain softmax
        page.wait_for_timeout(SETTLED)
        learned = case(state | {"router": "plain"}, make_data())["dlogits"]
        told = ", ".join(f"{name} {shown(value)}" for name, value in zip(make_data()["experts"], learned, strict=True))
        assert learned.all() and told in page.inner_text("#figure-gradients .moe-status")


def test_rows_are_followed_to_their_experts_and_back(site, browser):
    """The steps of the chapter on dispatch, with an expert that nobody wants."""
    make_data, _, case = figures.FIGURES["dispatch"]
    with Visit(browser, site[0], viewport={"width": 390, "height": 900}, has_touch=True) as visit:
        page = visit.open("chapters/dispatch/#figure-dispatch?pull=-4&factor=0&word=2")
        found = case({"pull": -4, "factor": 0}, make_data())
        assert found["bounds"][0] == found["bounds"][1] and "grammar: no rows" in page.text_content("#figure-dispatch svg")
        own = [f"row {n} with gate {found['gate'][n]:.3f}" for n, token in enumerate(found["token"]) if token == 2]
        assert f"“sat” is {' and '.join(own)}." in page.inner_text("#figure-dispatch .moe-status")
        page.select_option("#figure-dispatch-view", "einsum")
        assert page.locator("#figure-dispatch rect.moe-blank").count() == found["padding"] >= found["capacity"]
        page.focus("#figure-dispatch-step")
        for told in ("Every expert multiplies", "slots for each expert", "token by token"):
            page.keyboard.press("ArrowLeft")
            page.wait_for_timeout(SETTLED)
            assert told in page.inner_text("#figure-dispatch .moe-status")
        assert page.locator("#figure-dispatch rect").count() == len(found["token"]) and not visit.troubles


@pytest.mark.parametrize("rows", [0, 1])
def test_dropped_word_is_followed(site, browser, rows):
    """Of the chapter on dispatch: with half a capacity a word for whom neither expert has room, and one for whom a single one has."""
    make_data, _, case = figures.FIGURES["dispatch"]
    data = make_data()
    found = case({"pull": 4, "factor": 0.5}, data)
    served = [found["token"].tolist().count(t) for t in range(len(data["words"]))]
    word = served.index(rows)
    with Visit(browser, site[0], viewport={"width": 390, "height": 900}) as visit:
        page = visit.open(f"chapters/dispatch/#figure-dispatch?pull=4&factor=0.5&word={word}")
        status = page.inner_text("#figure-dispatch .moe-status")
        assert (f"“{data['words'][word]}” has no row, so it gets 0." in status) == (rows == 0)
        assert status.count(f"“{data['words'][word]}” for ") == 2 - rows  # told as dropped
        assert page.locator("#figure-dispatch .moe-lost").count() == len(found["dropped"])
        assert page.locator("#figure-dispatch line").count() == 2 * len(found["token"])
        assert page.locator("#figure-dispatch line:not(.moe-dim)").count() == 2 * rows and not visit.troubles


def test_climbing_reveals_a_rung_at_a_time(site, browser):
    """The ladder from its foot to its top: what is not climbed yet stays a question, and the same load is never padded twice."""
    make_data, _, case = figures.FIGURES["ladder"]
    rungs = make_data()["rungs"]
    with Visit(browser, site[0], viewport={"width": 390, "height": 900}) as visit:
        page = visit.open("chapters/ladder/#figure-ladder?rung=1&load=one_takes_all")
        page.focus("#figure-ladder-rung")
        for number, told in enumerate(rungs, 1):
            page.wait_for_timeout(SETTLED)
            status = page.inner_text("#figure-ladder .moe-status")
            found = case({"rung": number, "part": "forward", "experts": 16, "load": "one_takes_all"}, {})
            assert f"Rung {number} of {len(rungs)}, {told['name']}, saves {told['saves']}." in status
            assert (f"{found['padding']} rows of zeros" in status) == (found["padding"] > 0)
            assert page.locator("#figure-ladder .moe-card text", has_text="?").count() == 4 * (len(rungs) - number)
            page.keyboard.press("ArrowRight")
        assert not visit.troubles


def test_pieces_of_a_figure_are_shared_once_there_are_enough(site, browser):
    """How far a slider goes hangs on another one; the layer that the chapter on fine-grained experts asks for can be set."""
    make_data, _, case = figures.FIGURES["granularity"]
    with Visit(browser, site[0], viewport={"width": 390, "height": 900}) as visit:
        page = visit.open("chapters/fine-grained/")
        for key in ("logCut", "shared"):
            page.focus(f"#figure-granularity-{key}")
            for _ in range(2):
                page.keyboard.press("ArrowRight")
        page.wait_for_timeout(SETTLED)
        found = case(STARTS["granularity"] | {"logCut": 2, "shared": 2}, make_data())
        assert f"{found['chosen']} of {found['routed']} experts" in page.inner_text("#figure-granularity .moe-status")
        assert "and 2 shared" in page.inner_text("#figure-granularity .moe-status") and not visit.troubles


@pytest.mark.parametrize("name", MOVES)
def test_figure_is_moved_and_seen_in_one_window(site, browser, name):
    """On a phone the controls stay while the picture passes, so that neither is moved without being seen."""
    parts = """(figure) => [".moe-controls", ".moe-status"].map((part) => {
      const { top, bottom } = figure.querySelector(part).getBoundingClientRect()
      return top >= document.querySelector(".md-header").offsetHeight - 1 && bottom <= innerHeight + 1
    })"""
    with Visit(browser, site[0], viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True) as visit:
        page = visit.open(MOVES[name][0])
        page.evaluate(f"document.querySelector('#figure-{name} .moe-status').scrollIntoView({{block: 'end'}})")
        assert page.locator(f"#figure-{name}").evaluate(parts) == [True, True] and not visit.troubles


def test_address_restores_a_figure(site, browser):
    with Visit(browser, site[0], viewport={"width": 1280, "height": 900}) as visit:
        page = visit.open("#figure-route?topK=3&factor=0.5")
        assert page.input_value("#figure-route-topK") == "3"
        assert f"Capacity {figures.slots_per_expert({'factor': 0.5}, 3, 8, 4)}" in page.inner_text("#figure-route .moe-status")


def test_figure_is_touched(site, browser):
    with Visit(browser, site[0], viewport={"width": 390, "height": 900}, has_touch=True) as visit:
        page = visit.open("")
        page.tap("#figure-route [data-set='word=7']")
        page.wait_for_timeout(SETTLED)
        assert "“purred” goes to" in page.inner_text("#figure-route .moe-status")


# Slider of a figure, at which end a finger touches it, what that changes, what the status must then say of Python's result.
TOUCHED: dict[str, tuple[str, float, dict[str, Any], Told]] = {
    "gradients": ("topK", 0, {"topK": 1}, lambda case: f"K = 1: thing with gate {shown(case['gate'][0])}. Every logit gets 0"),
    "dispatch": ("step", 0, {}, lambda case: f"{len(case['token'])} kept assignments, token by token."),
    "crossings": ("topK", 1, {"topK": 4}, MOVES["crossings"][4]),
    "ladder": ("rung", 1, {"rung": 6}, lambda case: f"backward fall from {case['before'][3] / 1e6:.2f} to {case['now'][3] / 1e6:.2f}."),
}


@pytest.mark.parametrize("name", TOUCHED)
def test_slider_is_set_by_a_finger(site, browser, name):
    key, share, change, told = TOUCHED[name]
    make_data, _, case = figures.FIGURES[name]
    with Visit(browser, site[0], viewport={"width": 390, "height": 900}, has_touch=True, is_mobile=True) as visit:
        page = visit.open(MOVES[name][0])
        slider, status = page.locator(f"#figure-{name}-{key}"), page.locator(f"#figure-{name} .moe-status")
        opened, size = status.inner_text(), slider.bounding_box()
        assert size["height"] >= 24, "WCAG 2.2, 2.5.8: a target is at least as high as this"
        slider.tap(position={"x": 4 + share * (size["width"] - 8), "y": size["height"] / 2})
        page.wait_for_timeout(SETTLED)
        assert told(case(STARTS[name] | change, make_data())) in status.inner_text()
        assert "?" in page.evaluate("location.hash")
        page.tap(f"#figure-{name} .moe-reset")
        page.wait_for_timeout(SETTLED)
        assert status.inner_text() == opened and page.evaluate("location.hash") == "" and not visit.troubles


def test_step_is_chosen_by_its_name(site, browser):
    """The picture is drawn anew, and the button that was pressed keeps the focus."""
    with Visit(browser, site[0], viewport={"width": 390, "height": 900}) as visit:
        page = visit.open("chapters/layer/")
        page.focus("#figure-layer [data-set='step=4']")
        page.keyboard.press("Enter")
        page.wait_for_timeout(SETTLED)
        assert "step 5, places" in page.inner_text("#figure-layer .moe-status") and page.input_value("#figure-layer-step") == "4"
        assert page.evaluate("document.activeElement.dataset.set") == "step=4" and not visit.troubles


def test_select_shows_its_longest_option(site, browser):
    """On a phone, where a column is narrow: the text of an option is no wider than what padding and arrow leave for it."""
    measure = """() => [...document.querySelectorAll('moe-figure select')].map((one) => {
      const probe = document.createElement('canvas').getContext('2d'), style = getComputedStyle(one);
      probe.font = `${style.fontSize} ${style.fontFamily}`;
      const longest = Math.max(...[...one.options].map((option) => probe.measureText(option.label).width));
      return [one.id, one.clientWidth - parseFloat(style.paddingLeft) - parseFloat(style.paddingRight) - 18 - longest]; })"""
    with Visit(browser, site[0], viewport={"width": 390, "height": 900}) as visit:
        rooms = [room for path, *_ in MOVES.values() for room in visit.open(path).evaluate(measure)]
    assert rooms and not [room for room in rooms if room[1] < 0]


def test_instant_navigation_wakes_figures_and_formulas(site, browser):
    with Visit(browser, site[0], viewport={"width": 1280, "height": 900}) as visit:
        page = visit.open("")
        for link, path in (
            ("article a[href*='chapters/gating/']", "chapters/gating/"),
            (".md-nav--primary a[href*='bias']", "chapters/bias/"),
        ):
            name = next(name for name, move in MOVES.items() if move[0] == path)
            page.click(link)
            page.wait_for_url(re.compile(path))
            page.wait_for_selector(f"moe-figure[name={name}]")  # the address changes before the page does
            page.wait_for_function(AWAKE)
            page.wait_for_selector(".katex")
            page.focus(f"moe-figure[name={name}] input")
            before = page.inner_text(".moe-picture")
            page.keyboard.press("ArrowLeft")
            page.wait_for_function("before => document.querySelector('.moe-picture').innerText !== before", arg=before)
        assert visit.documents == 1 and not visit.troubles


SCROLLERS = "div.arithmatex, .md-typeset__scrollwrap, .moe-scroll, .md-typeset pre > code"
SIGNS = f"""() => [...document.querySelectorAll('{SCROLLERS}')].filter((one) => one.clientWidth).map((one) =>
  ({{cut: one.scrollWidth > one.clientWidth, sign: getComputedStyle(one).backgroundImage !== 'none', focus: one.tabIndex === 0 ||
    !!one.querySelector('a, button, input'), what: one.className + ': ' + one.innerText.slice(0, 60)}}))"""


def test_what_is_cut_on_a_phone_shows_it_and_what_fits_does_not(site, browser):
    address, folder = site
    bad, seen = [], {True: 0, False: 0}
    with Visit(browser, address, viewport={"width": 390, "height": 900}, has_touch=True, is_mobile=True) as visit:
        for path in paths(folder):
            page = visit.open(path)
            page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
            page.wait_for_timeout(50)
            for block in page.evaluate(SIGNS):
                seen[block["cut"]] += 1
                if block["cut"] != block["sign"] or (block["cut"] and not block["focus"]):
                    bad.append(f"{path}: {block}")
    assert not bad, "\n".join(bad)
    assert all(seen.values()), seen


@pytest.mark.parametrize("path", ["kernels/", "status/", "benchmarks/", "reference/notation/"])
def test_tables_of_the_project_fit_a_desktop(site, browser, path):
    """Whatever tab is open; equal tabs open together, so the largest number of tabs is how many views there are."""
    with Visit(browser, site[0], viewport={"width": 1280, "height": 900}) as visit:
        page = visit.open(path)
        sets = "[...document.querySelectorAll('.tabbed-set')].map((one) => one.querySelectorAll(':scope > input'))"
        for place in range(page.evaluate(f"Math.max(1, ...{sets}.map((tabs) => tabs.length))")):
            page.evaluate(f"(place) => {sets}.forEach((tabs) => tabs[place]?.click())", place)
            page.wait_for_timeout(100)
            cut = "[...document.querySelectorAll('.md-typeset__scrollwrap')].filter((one) => one.scrollWidth > one.clientWidth)"
            assert page.evaluate(cut + ".map((one) => one.innerText.slice(0, 80))") == []


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize(
    ("path", "kind", "text"),
    [
        ("chapters/gating/", "div.arithmatex", "ties"),
        ("chapters/gating/", "pre > code", "def top_k"),
        ("chapters/fine-grained/", ".md-typeset__scrollwrap", "gshard-600b"),
    ],
    ids=["formula", "code", "table"],
)
def test_shadow_lies_where_there_is_more(site, browser, scheme, path, kind, text):
    """Of the two edges of a block at its start, in the middle and at its end; left in a table is its first column, which stays."""
    with Visit(browser, site[0], viewport={"width": 390, "height": 900}, color_scheme=scheme) as visit:
        scroller = visit.open(path).locator(kind, has_text=text).first
        scroller.scroll_into_view_if_needed()
        cells = scroller.locator("tr > :first-child")
        kept = round(cells.first.bounding_box()["width"]) if cells.count() else 0
        shaded = {}
        for place, share in (("start", 0), ("middle", 0.5), ("end", 1)):
            scroller.evaluate("(one, share) => { one.scrollLeft = share * (one.scrollWidth - one.clientWidth); }", share)
            visit.page.wait_for_timeout(300)
            shaded[place] = shadows(scroller.screenshot(), kept)
        assert shaded == {"start": (False, True), "middle": (True, True), "end": (True, False)}
        if kept:
            edges = [place.bounding_box() for place in (scroller, scroller.locator("table"), cells.last)]
            assert edges[0]["x"] == edges[2]["x"] and edges[0]["y"] + edges[0]["height"] == edges[1]["y"] + edges[1]["height"]


def shadows(png: bytes, left: int) -> tuple[bool, bool]:
    """Whether the ground, the commonest colour, is missing behind so many pixels from the left and along the right edge."""
    import io

    from PIL import Image

    image = Image.open(io.BytesIO(png)).convert("RGB")
    width, height = image.size
    ground = max(image.getcolors(width * height))[1]
    columns = (image.crop((x, 2, x + 1, height - 2)).getcolors(height) for x in (left + 1, width - 2))
    behind, right = (dict((colour, count) for count, colour in column).get(ground, 0) < height / 20 for column in columns)
    return behind, right


def test_diagram_is_drawn_from_our_own_origin(site, browser):
    with Visit(browser, site[0], viewport={"width": 1280, "height": 900}) as visit:
        page = visit.open("")
        page.wait_for_selector("div.mermaid", timeout=60_000)
        assert page.evaluate("performance.getEntriesByType('resource').some((entry) => entry.name.endsWith('mermaid.min.js'))")
        assert page.locator("div.mermaid").bounding_box()["height"] > 50 and not visit.troubles


def test_figures_stay_readable_without_scripts(site, browser):
    with Visit(browser, site[0], viewport={"width": 390, "height": 900}, java_script_enabled=False) as visit:
        visit.page.goto(site[0])
        assert visit.page.is_visible("#figure-route .moe-picture svg")
        assert "goes to action" in visit.page.inner_text("#figure-route .moe-status")


def test_search_finds_a_chapter(site, browser):
    with Visit(browser, site[0], viewport={"width": 1280, "height": 900}) as visit:
        page = visit.open("")
        page.click(".md-search__input")
        page.keyboard.type("towards the end")
        page.wait_for_selector(".md-search-result__link[href*='capacity']", timeout=60_000)
        assert not visit.troubles
