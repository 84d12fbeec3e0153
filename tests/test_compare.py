"""`llmtrain compare` on real runs: what it prints, and the page in a real browser."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from llmtrain.compare import main
from llmtrain.training.run_directory import RunDirectory
from tests.data.browser import Browser, find_chromium
from tests.tiny import tiny_run
from tests.training.test_report import HOSTILE, Page

MORE = ["data.validation_fraction=0.3", "callbacks.evaluation.every=2", "callbacks.sample.prompts=[]"]

DRAWN = """
[...document.querySelectorAll(".js-plotly-plot")].map(chart => chart.id)
  .filter(id => document.querySelector("#" + id + " .scatterlayer .trace:nth-child(2) path.js-line"))
"""


@pytest.fixture(scope="module")
def runs(ranks, corpus, tmp_path_factory) -> list[Path]:
    """4 steps of 8 rows, and 3 steps of 16 with another learning rate."""
    place = tmp_path_factory.mktemp("compared")
    one, other = place / "one", place / "more" / "other"
    cache = tmp_path_factory.getbasetemp() / "cache"
    ranks.run([*tiny_run(corpus, cache, one), *MORE, "max_steps=4"], 1, place)
    changed = ["max_steps=3", "global_batch_size=16", "optimizer.lr=1e-3"]
    ranks.run([*tiny_run(corpus, cache, other), *MORE, *changed], 1, place)
    return [one, other]


def test_settings_and_figures_stand_beside_each_other(runs, tmp_path, capsys):
    page = tmp_path / "compare.html"
    assert main([*map(str, runs), "--page", str(page), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["settings"] == {
        "max_steps": [4, 3], "global_batch_size": [8, 16], "optimizer.lr": [3e-3, 1e-3]
    }  # fmt: skip
    lines = [RunDirectory(run).read_metrics() for run in runs]
    numbers = found["figures"]
    assert numbers["state"] == ["finished", "finished"] and "MFU, median" not in numbers
    assert numbers["steps"] == [4, 3] and numbers["tokens"] == [2048, 3072]
    assert numbers["training loss"] == [line[-1]["train/loss"] for line in lines]
    assert numbers["training loss after 2.05k tokens"] == [
        lines[0][3]["train/loss"],
        lines[1][1]["train/loss"],
    ]
    assert numbers["held-out bits per byte"] == [line[-1]["eval/bits_per_byte"] for line in lines]

    assert main([*map(str, runs), "--page", str(page)]) == 0
    shown = capsys.readouterr().out
    assert "optimizer.lr" in shown and f"{lines[1][-1]['train/loss']:.4f}" in shown and str(page) in shown
    assert "\x1b" not in shown


def test_the_page_has_every_run_in_every_chart_and_needs_nothing_from_outside(runs, tmp_path):
    page = tmp_path / "compare.html"
    assert main([*map(str, runs), "--page", str(page), "--json"]) == 0
    seen = Page(page)
    assert seen.addresses == []
    assert ["global_batch_size", "8", "16"] in seen.rows
    lines = [RunDirectory(run).read_metrics() for run in runs]
    for chart, across in (
        ("chart-training-loss", "step"),
        ("chart-training-loss-over-tokens", "train/tokens"),
    ):
        for label, line in zip(("one", "more/other"), lines, strict=True):
            trace = seen.charts[chart][label]
            assert trace["x"] == [point[across] for point in line]
            assert trace["y"] == [point["train/loss"] for point in line]
    assert seen.charts["chart-held-out-loss"]["one"]["x"] == [2, 4]
    assert {"chart-training-loss-of-code", "chart-learning-rate", "chart-throughput"} <= set(seen.charts)


def test_runs_alike_and_names_that_are_markup(runs, tmp_path, capsys):
    copy = tmp_path / HOSTILE.replace("/", "")
    shutil.copytree(runs[0], copy)
    page = tmp_path / "compare.html"
    assert main([str(runs[0]), str(copy), "--page", str(page)]) == 0
    assert "no settings differ" in capsys.readouterr().out
    seen = Page(page)
    assert len(seen.scripts) == 3 and "img" not in seen.tags and copy.name in seen.text
    assert "chart-training-loss-over-tokens" not in seen.charts, "tokens a step are the same"


def test_mistakes_are_one_line(runs, tmp_path, capsys):
    page = tmp_path / "compare.html"
    assert main([str(runs[0]), f"{runs[0]}/../one", "--page", str(page)]) == 78
    assert capsys.readouterr().err == f"error: {runs[0]}: named twice; a run is compared with others\n"
    assert main([str(runs[0]), str(tmp_path), "--page", str(page)]) == 78
    assert "no such file; is" in capsys.readouterr().err
    assert not page.exists()


@pytest.mark.system
def test_a_browser_draws_the_curves_light_and_dark(runs, tmp_path):
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium on this machine")
    page = tmp_path / "compare.html"
    assert main([*map(str, runs), "--page", str(page), "--json"]) == 0
    charts = set(Page(page).charts)
    paper = set()
    with Browser(program, tmp_path / "profile") as browser:
        for width, dark in ((390, False), (800, True), (1280, False)):
            browser.look(width, 900, dark=dark)
            browser.open(page.as_uri())
            drawn = (
                "[...document.querySelectorAll('.js-plotly-plot')].filter(c => c.querySelector('.scatterlayer"
            )
            drawn += " .trace:nth-child(2) path.js-line')).map(c => c.id)"
            assert set(browser.run(drawn)) == charts, "two lines in every chart"
            assert browser.run("document.documentElement.scrollWidth") <= width
            axes = "[...document.querySelectorAll('#chart-training-loss-over-tokens .xtitle')]"
            assert browser.run(f"{axes}.map(t => t.textContent)") == ["tokens"]
            paper.add((dark, browser.run("getComputedStyle(document.body).backgroundColor")))
        assert browser.complaints == []
    assert len(paper) == 2, "one colour a scheme"
