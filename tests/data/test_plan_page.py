"""The page of a plan in a real browser: its arithmetic is Python's, to the window, and it can be used."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest
import yaml

from llmtrain.data.config import DataConfig
from llmtrain.data.plan import Plan, RunLength, Size, given_weights, make_plan
from llmtrain.data.plan_page import plan_page
from tests.data.browser import Browser, find_chromium
from tests.data.test_plan import bare, config, declared, gpt3

HOSTILE = "</script><script>alert('name')</script><img src=x onerror=alert(1)> @FACTS@"


def page_of(data: DataConfig, length: RunLength, name: str = "demo", **presets: Mapping[str, float]) -> str:
    return plan_page(name, make_plan(data, declared(data), length), data, presets)


# The file


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


def test_one_small_file_that_asks_for_nothing() -> None:
    data, length = gpt3()
    text = page_of(data, length)
    assert len(text.encode()) < 60_000
    assert not re.search(r"https?:|//\w|@import|url\(", text.split("<script>")[0])
    for tag, attributes in Tags(text).tags:
        assert tag not in ("link", "iframe", "img", "object")
        assert not {"src", "href", "action"} & set(attributes)
    assert not re.search(r"\b(fetch|XMLHttpRequest|WebSocket|import)\b *\(", text)


def test_a_name_is_text_and_never_markup() -> None:
    data, length = gpt3()
    made = Tags(page_of(data, length, HOSTILE))
    assert [tag for tag, _ in made.tags].count("script") == 2
    assert "img" not in [tag for tag, _ in made.tags]


def test_every_field_of_the_page_is_labelled() -> None:
    data, length = gpt3()
    tags = Tags(page_of(data, length)).tags
    labelled = {attributes.get("for") for tag, attributes in tags if tag == "label"}
    for tag, attributes in tags:
        if tag == "input":
            assert attributes.get("aria-label") or attributes.get("id") in labelled
    live = [
        attributes["id"]
        for _, attributes in tags
        if attributes.get("aria-live") or attributes.get("role") == "status"
    ]
    assert set(live) == {"yaml", "summary"}


# In a browser


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium on this machine")
    with Browser(program, tmp_path_factory.mktemp("profile")) as one:
        one.look(1400, 900)
        yield one
        assert one.complaints == []


def write(folder: Path, text: str) -> str:
    (folder / "plan.html").write_text(text, encoding="utf-8")
    return (folder / "plan.html").as_uri()


ROWS = """Object.fromEntries([...document.querySelectorAll('.source')].map(row => [row.dataset.source,
    {...row.dataset, words: row.querySelector('.epochs small').textContent}]))"""


def shown(browser: Browser) -> dict[str, dict[str, str]]:
    """What the page says of each source."""
    return browser.run(ROWS)


def agrees(browser: Browser, plan: Plan) -> None:
    """Every number of the page is Python's: windows as integers, quotients to the last bit."""
    rows = shown(browser)
    assert set(rows) == set(plan.sources)
    for name, expected in plan.sources.items():
        row = rows[name]
        assert int(row["windows"]) == expected.windows, (name, row)
        assert int(row["tokens"]) == expected.tokens
        assert float(row["share"]) == expected.share
        if expected.epochs is None:
            assert row["epochs"] == ""
        else:
            assert float(row["epochs"]) == expected.epochs
        warned = [warning for warning in expected.warnings if "from step" not in warning]
        state = {True: "bad", False: "warn"}["far above" in "".join(warned)] if warned else "good"
        if expected.epochs is not None and len(warned) == len(expected.warnings):
            assert row["state"] == state, (row, expected)


def yaml_of(browser: Browser) -> dict[str, Any]:
    return yaml.safe_load(browser.run("document.getElementById('yaml').textContent"))


@pytest.mark.system
def test_gpt3_and_another_mixture_in_the_address(browser: Browser, tmp_path: Path) -> None:
    data, length = gpt3()
    address = write(tmp_path, page_of(data, length))
    browser.open(address)
    agrees(browser, make_plan(data, declared(data), length))
    browser.open(f"{address}#webtext2=0.5&wikipedia=0.25&tokens=1e12")
    weights = {**given_weights(data, {}), "webtext2": 0.5, "wikipedia": 0.25}
    longer = RunLength(length.seq_len, length.global_batch_size, round(1e12 / length.tokens_per_step))
    plan = make_plan(data, declared(data), longer, weights)
    agrees(browser, plan)
    rows = shown(browser)
    assert "above 16" in rows["wikipedia"]["words"] and rows["wikipedia"]["state"] == "bad"
    assert "above 4" in rows["books1"]["words"] and rows["books1"]["state"] == "warn"
    assert rows["common_crawl"]["state"] == "good"
    assert yaml_of(browser) == {
        "data": {"sources": {name: {"weight": weight} for name, weight in weights.items()}},
        "max_steps": longer.steps,
    }
    assert "wikipedia: above 16" in browser.run("document.getElementById('summary').textContent")


@pytest.mark.system
def test_the_arithmetic_is_pythons_on_random_mixtures(browser: Browser, tmp_path: Path) -> None:
    """Stages, skipped steps, epochs, weights rounded to 1/65,536, and sources too small to be read."""
    made = random.Random(7)
    for case in range(40):
        names = made.sample(["web", "books", "code", "Z", "a.b-c", "ä", "tokens", "7"], made.randint(1, 6))
        draw = made.choice(
            [
                lambda: made.randint(1, 20),
                lambda: round(made.random() + 0.01, 2),
                lambda: 10 ** made.uniform(-7, 0),
            ]
        )
        rows, steps = made.randint(1, 40), made.randint(1, 3000)
        key = "epochs" if case % 8 == 7 else "weight"
        stages = [
            {"from_step": step, "weights": {made.choice(names): 1, **{name: draw() for name in names[1:]}}}
            for step in sorted(made.sample(range(2, 3000), made.randint(0, 2)))
        ]
        skip = [[100, 120], [500, 1999]] if case % 3 == 0 else []
        weights = {name: draw() for name in names}
        if case % 5 == 4:  # the same mixture in other words: no stage at all
            stages = [{"from_step": 300, "weights": {name: 4 * weight for name, weight in weights.items()}}]
        data = config(
            {name: {"tokens": made.randint(10**4, 10**7), key: weights[name]} for name in names},
            stages=stages,
            skip=skip,
        )
        length = RunLength(64, rows, steps)
        browser.open(write(tmp_path, page_of(data, length)))
        agrees(browser, make_plan(data, declared(data), length))
        changed = {name: draw() for name in names}
        words = {f"{name}@1" if name == "tokens" else name: weight for name, weight in changed.items()}
        browser.run(
            f"location.hash = {json.dumps(urlencode(words))}, new Promise(done => setTimeout(done, 30))"
        )
        agrees(browser, make_plan(data, declared(data), length, changed))


@pytest.mark.system
def test_slider_number_and_run_length_are_live_and_kept_in_the_address(
    browser: Browser, tmp_path: Path
) -> None:
    data = bare({"web": 0.7, "books": 0.3}, 20_000)
    length = RunLength(64, 10, 100)
    browser.open(write(tmp_path, page_of(data, length)))
    browser.drag(".source:nth-child(1) [type=range]", 0.2)
    weight = float(browser.run("document.querySelector('.source [type=range]').value"))
    assert weight == pytest.approx(0.2, abs=0.03) and weight != 0.7
    assert browser.run("document.querySelector('.source [type=number]').value") == str(weight)
    agrees(browser, make_plan(data, declared(data), length, {"web": weight, "books": 0.3}))
    browser.type(".source:nth-child(2) [type=number]", "1.25")
    weights = {"web": weight, "books": 1.25}
    agrees(browser, make_plan(data, declared(data), length, weights))
    browser.type("#tokens", "128k")
    longer = RunLength(64, 10, 200)
    plan = make_plan(data, declared(data), longer, weights)
    agrees(browser, plan)
    assert yaml_of(browser) == {
        "data": {"sources": {name: {"weight": weight} for name, weight in weights.items()}}, "max_steps": 200
    }  # fmt: skip
    shared = browser.run("location.href")
    assert "books=1.25" in shared and "tokens=128000" in shared
    browser.open(shared)
    agrees(browser, plan)


@pytest.mark.system
def test_what_is_no_number_is_marked_and_changes_nothing(browser: Browser, tmp_path: Path) -> None:
    data, length = bare({"web": 0.7, "books": 0.3}, 20_000), RunLength(64, 10, 100)
    browser.open(write(tmp_path, page_of(data, length)))
    browser.type(".source:nth-child(1) [type=number]", "-")
    browser.type("#tokens", "many")
    for field in (".source [type=number]", "#tokens"):
        assert browser.run(f"document.querySelector('{field}').getAttribute('aria-invalid')") == "true"
    agrees(browser, make_plan(data, declared(data), length))
    browser.run(
        "location.hash = 'web=x&books&%&nobody=1&tokens=-3', new Promise(done => setTimeout(done, 30))"
    )
    agrees(browser, make_plan(data, declared(data), length))


@pytest.mark.system
def test_no_weight_at_all_is_said(browser: Browser, tmp_path: Path) -> None:
    data, length = bare({"web": 0.7, "books": 0.3}, 20_000), RunLength(64, 10, 100)
    browser.open(write(tmp_path, page_of(data, length)) + "#web=0&books=0")
    assert "no weight above 0" in browser.run("document.getElementById('summary').textContent")
    browser.open(write(tmp_path, page_of(data, length)) + "#web=0")
    assert yaml_of(browser)["data"]["sources"] == {"books": {"weight": 0.3}}
    assert "~data.sources.web" in browser.run("document.getElementById('yaml').textContent")


@pytest.mark.system
def test_buttons_of_helpers_and_stages(browser: Browser, tmp_path: Path) -> None:
    stages = [{"from_step": 51, "weights": {"books": 1}}]
    data, length = bare({"web": 0.7, "books": 0.3}, 20_000, stages=stages), RunLength(64, 10, 100)
    text = page_of(data, length, Even={"web": 0.5, "books": 0.5})
    browser.open(write(tmp_path, text))
    browser.click("#presets button:nth-child(2)")
    even = {"web": 0.5, "books": 0.5}
    agrees(browser, make_plan(data, declared(data), length, even))
    browser.click("#stages button:nth-child(2)")
    assert browser.run("document.querySelector('.source [type=number]').value") == "0", "of the second stage"
    browser.click("#presets button:nth-child(2)")
    other = bare(even, 20_000, stages=[{"from_step": 51, "weights": even}])
    agrees(browser, make_plan(other, declared(other), length))
    found = yaml_of(browser)["data"]
    assert found["stages"] == [{"from_step": 51, "weights": even}]
    assert DataConfig.model_validate({**other.model_dump(), "stages": found["stages"]}) == other
    browser.click("#presets button:nth-child(1)")
    browser.click("#stages button:nth-child(1)")
    browser.click("#presets button:nth-child(1)")
    agrees(browser, make_plan(data, declared(data), length))
    assert browser.run("location.hash") == ""


@pytest.mark.system
def test_copying(browser: Browser, tmp_path: Path) -> None:
    data, length = bare({"web": 0.7, "books": 0.3}, 20_000), RunLength(64, 10, 100)
    browser.open(write(tmp_path, page_of(data, length)))
    browser.send("Browser.grantPermissions", permissions=["clipboardReadWrite", "clipboardSanitizedWrite"])
    browser.run("navigator.clipboard.writeText = async text => { globalThis.copied = text; }, 0")
    browser.click("#copy")
    assert browser.run("copied") == browser.run("document.getElementById('yaml').textContent")
    browser.run("navigator.clipboard.writeText = async () => { throw new Error('not allowed'); }, 0")
    browser.click("#copy")
    selected = browser.run("new Promise(done => setTimeout(() => done(getSelection().toString()), 30))")
    assert selected.strip() == browser.run("document.getElementById('yaml').textContent").strip()


@pytest.mark.system
@pytest.mark.parametrize("width", [390, 800, 1400])
@pytest.mark.parametrize("dark", [False, True])
def test_it_can_be_read_at_every_width_and_by_night(
    browser: Browser, tmp_path: Path, width: int, dark: bool
) -> None:
    """Nothing is wider than the window or cut off, text stands out, and thumbs hit the buttons."""
    data, length = gpt3()
    browser.look(width, 900, dark=dark)
    browser.open(write(tmp_path, page_of(data, length)) + "#wikipedia=0.3&books1=0.2")
    try:
        assert browser.run("document.documentElement.scrollWidth") == width
        cut = browser.run(CUT_OFF)
        assert cut == []
        assert browser.run(CONTRAST) == []
        assert (
            browser.run("Math.min(...[...document.querySelectorAll('button')].map(b => b.offsetHeight))")
            >= 32
        )
        ground = browser.run("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground))) < 200) == dark
    finally:
        browser.look(1400, 900)


CUT_OFF = """[...document.querySelectorAll('main *')]
  .filter(node => node.clientWidth && node.scrollWidth > node.clientWidth + 1
    && getComputedStyle(node).display !== 'inline' && node.tagName !== 'PRE')
  .map(node => node.outerHTML.slice(0, 120))"""

CONTRAST = """(() => {
  const light = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number).map(c => c / 255)
      .map(c => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = node => {
    for (; node; node = node.parentElement) {
      const color = getComputedStyle(node).backgroundColor;
      if (color !== 'rgba(0, 0, 0, 0)') return color;
    }
  };
  const faint = [];
  for (const node of document.querySelectorAll('main *')) {
    const words = [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim());
    if (!words || !node.offsetParent || node.closest('.stack')) continue;
    const [a, b] = [light(getComputedStyle(node).color), light(ground(node))].sort((x, y) => y - x);
    if ((a + 0.05) / (b + 0.05) < 4.5) faint.push(node.outerHTML.slice(0, 120));
  }
  return faint;
})()"""


@pytest.mark.system
def test_unknown_and_estimated_sizes(browser: Browser, tmp_path: Path) -> None:
    data = config({"hub": {"path": "x", "weight": 1}, "web": {"path": "y", "weight": 1}})
    sizes = {"hub": Size(None, False, "on a hub"), "web": Size(10_000, False, "a sample")}
    plan = make_plan(data, sizes, RunLength(64, 10, 100))
    browser.open(write(tmp_path, plan_page("demo", plan, data, {})))
    agrees(browser, plan)
    text = browser.run("document.querySelector('main').innerText")
    assert "size unknown" in text and "~10.0k tokens, estimated" in text
