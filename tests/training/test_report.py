from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.config import UserError
from llmtrain.training import report
from llmtrain.training.report import MOST_POINTS, by_step, describe_model, span, spread, thin, write_report
from llmtrain.training.report_page import Chart, Trace, page
from llmtrain.training.run_directory import RunDirectory

HOSTILE = "</script><script>alert('sample')</script><img src=x onerror=alert(1)> & <b>"
SOURCES = ("code", "prose")


class Page(HTMLParser):
    """What a browser makes of the page, as far as the tests look."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.tags, self.scripts, self.addresses = "", [], [], []
        self._inside = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag if tag in ("script", "style") else self._inside
        if tag == "script":
            self.scripts.append("")
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data

    @property
    def charts(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Traces by name, by chart."""
        found = json.loads(self.scripts[0])
        return {chart["id"]: {trace["name"]: trace for trace in chart["traces"]} for chart in found}


def line(step: int, loss: float = 2.0) -> dict[str, Any]:
    return {
        "step": step, "train/loss": loss, "train/grad_norm": 1.0, "train/lr": 1e-3,
        "train/tokens": 512 * step,
        **{f"train/loss/{name}": loss + 1 for name in SOURCES},
        "perf/tokens_per_second": 1000.0, "perf/step_seconds": 0.5, "perf/mfu": None,
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "demo")
    directory.path.mkdir()
    return directory


def fill(run: RunDirectory) -> RunDirectory:
    """A finished run that was resumed after step 4, with text in it that means harm."""
    config = {
        "name": "my <run>", "max_steps": 8, "seq_len": 64, "global_batch_size": 8,
        "model": {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 1, "position": {"kind": "rope"}},
        "data": {"sources": {name: {"path": HOSTILE} for name in SOURCES}},
    }  # fmt: skip
    run.config.write_text(yaml.safe_dump(config))
    run.append_event("start", step=0, ranks=2, device="cpu", precision="fp32", parameters=123_456)
    for step in range(1, 7):
        run.append_metrics(line(step, 9.0 if step > 4 else 8.0 - step))
    run.append_event("resume", step=4, checkpoint="step_00000004")
    for step in range(5, 9):
        evaluation = {"eval/bits_per_byte": 1.5, "eval/bits_per_byte/code": 1.4} if step in (6, 8) else {}
        run.append_metrics(
            {**line(step, 8.0 - step), **evaluation, **({"train/loss": None} if step == 7 else {})}
        )
    run.append_event("warning", step=8, text=HOSTILE)
    run.append_event("end", step=8)
    ledger = {"weight": 3, "share": 0.75, "tokens": 3072, "epochs": 0.3, "total_tokens": 10_240}
    run.write_json(
        "data.json", {"sources": {"code": ledger, "prose": {**ledger, "weight": 1, "share": 0.25}}}
    )
    scores = {
        "loss": 2.0,
        "bits_per_byte": 1.5,
        "unigram_bits_per_byte": 2.0,
        "shuffled_bits_per_byte": 1.75,
        "bytes": 999,
    }
    run.write_json(
        "eval/heldout.json", {"step": 8, "sources": {"code": scores, "prose": scores}, "all": scores}
    )
    run.samples.mkdir()
    for step in (4, 8):
        (run.samples / f"step_{step:08d}.txt").write_text(f"--- prompt 1: 'def '\ndef f{step}(): {HOSTILE}\n")
    return run


# The whole page


def test_the_page_needs_nothing_from_outside(run: RunDirectory) -> None:
    file = write_report(fill(run).path)
    assert file == run.report
    seen = Page(file)
    assert seen.addresses == []
    assert not {"link", "iframe", "img"} & set(seen.tags)
    assert len(seen.scripts) == 3
    style = file.read_text().split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style
    assert seen.scripts[1].count("plotly.js v") == 1 and len(seen.scripts[1]) > 1_000_000
    assert file.stat().st_size < 6_000_000


def test_text_of_the_run_is_shown_and_never_becomes_markup(run: RunDirectory) -> None:
    seen = Page(write_report(fill(run).path))
    assert len(seen.scripts) == 3 and "img" not in seen.tags and "run" not in seen.tags
    assert f"def f8(): {HOSTILE}" in seen.text, "the sample"
    assert f"text {HOSTILE}" in seen.text, "the event"
    assert "my <run>" in seen.text
    assert seen.text.count("alert('sample')") >= 5, "two samples, an event, two sources of the config"


def test_no_string_of_a_chart_ends_its_script(tmp_path: Path) -> None:
    trace = Trace(HOSTILE, [HOSTILE], [1.0], "c0", "bar")
    chart = Chart("Title", "note", [trace], marks=[{"x": 1, "text": HOSTILE}])
    file = tmp_path / "page.html"
    file.write_text(page(HOSTILE, chart.card(), [chart]))
    read = Page(file)
    assert len(read.scripts) == 3 and "img" not in read.tags
    (found,) = json.loads(read.scripts[0])
    assert found["marks"][0]["text"] == HOSTILE
    assert unescape(found["traces"][0]["name"]) == unescape(found["traces"][0]["x"][0]) == HOSTILE
    assert "<" not in found["traces"][0]["name"] + found["traces"][0]["x"][0], "plotly reads tags there"


def test_the_header_says_what_ran(run: RunDirectory) -> None:
    text = Page(write_report(fill(run).path)).text
    assert "123k parameters · 2 layers · d_model 64 · 4 heads (MQA) · RoPE · 2 ranks on cpu · fp32" in text
    assert "complete" in text and "not finished" not in text
    assert (
        "Steps8" in text and "Tokens trained4.10k8 rows of 64 a step" in text and "Training time4 s" in text
    )
    assert "Held-out text1.5000bits per byte, \N{MINUS SIGN}25.0 % against unigram" in text


def test_of_a_replayed_step_the_last_line_counts(run: RunDirectory) -> None:
    curve = Page(write_report(fill(run).path)).charts["chart-training-loss"]["all"]
    assert curve["x"] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert curve["y"] == [7.0, 6.0, 5.0, 4.0, 3.0, 2.0, None, 0.0]


def test_curves_come_from_their_keys(run: RunDirectory) -> None:
    charts = Page(write_report(fill(run).path)).charts
    assert set(charts) == {
        "chart-training-loss", "chart-held-out-loss", "chart-throughput", "chart-learning-rate",
        "chart-gradient-norm",
        "chart-share-of-the-training-tokens", "chart-bits-per-byte",
    }  # fmt: skip
    assert list(charts["chart-training-loss"]) == ["code", "prose", "all"], "all is drawn last, on top"
    assert charts["chart-training-loss"]["code"]["y"][:2] == [8.0, 7.0]
    assert charts["chart-held-out-loss"].keys() == {"code", "all"}, "prose has no value there"
    assert (charts["chart-held-out-loss"]["all"]["x"], charts["chart-held-out-loss"]["all"]["y"]) == (
        [6, 8],
        [1.5, 1.5],
    )
    assert charts["chart-learning-rate"]["train/lr"]["y"] == [1e-3] * 8
    assert charts["chart-gradient-norm"]["train/grad_norm"]["y"] == [1.0] * 8
    assert charts["chart-throughput"]["perf/tokens_per_second"]["y"] == [1000.0] * 8


def test_a_resume_is_marked_in_the_loss(run: RunDirectory) -> None:
    found = json.loads(Page(write_report(fill(run).path)).scripts[0])
    assert {chart["id"]: chart["marks"] for chart in found if chart["marks"]} == {
        "chart-training-loss": [{"x": 4, "text": " resumed"}]
    }


def test_mixture_and_held_out_have_bars_and_tables(run: RunDirectory) -> None:
    seen = Page(write_report(fill(run).path))
    shares = seen.charts["chart-share-of-the-training-tokens"]
    assert shares["asked"]["x"] == ["code", "prose"] and shares["asked"]["y"] == [75.0, 25.0]
    assert shares["realised"]["y"] == [75.0, 25.0]
    bars = seen.charts["chart-bits-per-byte"]
    assert {name: bar["y"][-1] for name, bar in bars.items()} == {
        "model": 1.5, "token unigram": 2.0, "context shuffled": 1.75
    }  # fmt: skip
    assert "code75.00 %75.00 %3.07k0.30010.2k" in seen.text
    assert "all1.50002.00001.7500\N{MINUS SIGN}25.0 %2.0000999" in seen.text


def test_mfu_has_a_chart_where_it_is_known(run: RunDirectory) -> None:
    run.append_metrics({**line(1), "perf/mfu": 0.4})
    assert Page(write_report(run.path)).charts["chart-model-flops-utilisation"]["perf/mfu"]["y"] == [0.4]


# Runs that are not whole


def test_an_empty_directory_has_a_page(run: RunDirectory) -> None:
    seen = Page(write_report(run.path))
    assert seen.charts == {} and "No step has been logged yet" in seen.text and "demo" in seen.text
    assert "not finished" in seen.text and "None" not in seen.text
    assert run.report.stat().st_size < 50_000, "no charts, no plotly.js"


def test_one_line_makes_one_point(run: RunDirectory) -> None:
    run.append_metrics(line(1))
    seen = Page(write_report(run.path))
    assert seen.charts["chart-training-loss"]["all"]["x"] == [1]
    assert "nothing logged" in seen.text, "the held-out curve"


def test_a_line_full_of_nulls_is_no_obstacle(run: RunDirectory) -> None:
    run.append_metrics({**dict.fromkeys(line(1)), "step": 1})
    seen = Page(write_report(run.path))
    assert seen.charts == {} and "Steps1" in seen.text


def test_evaluation_without_baselines(run: RunDirectory) -> None:
    scores = {
        "loss": 2.0,
        "bits_per_byte": 1.5,
        "unigram_bits_per_byte": None,
        "shuffled_bits_per_byte": None,
        "bytes": 9,
    }
    run.write_json("eval/heldout.json", {"step": 8, "sources": {"code": scores}, "all": scores})
    seen = Page(write_report(run.path))
    assert list(seen.charts["chart-bits-per-byte"]) == ["model"]
    assert "code1.5000\N{EN DASH}\N{EN DASH}\N{EN DASH}2.00009" in seen.text


def test_damage_is_named_and_the_old_page_stays(run: RunDirectory) -> None:
    before = write_report(fill(run).path).read_bytes()
    with run.metrics.open("a") as file:
        file.write("nonsense\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:11"):
        write_report(run.path)
    assert run.report.read_bytes() == before
    assert not list(run.path.glob(".report*"))


def test_many_events_and_samples_are_cut_to_what_one_reads(run: RunDirectory) -> None:
    for step in range(300):
        run.append_event("save", step=step, note=f"number {step}.")
    run.samples.mkdir()
    for step in range(1, 41):
        (run.samples / f"step_{step:08d}.txt").write_text(f"sample {step}.")
    text = Page(write_report(run.path)).text
    assert len(re.findall(r"note number \d+\.", text)) == report.MOST_EVENTS
    assert "number 0." in text and "number 299." in text and "100 more in events.jsonl" in text
    assert "number 20." not in text and "number 120." in text
    assert len(re.findall(r"sample \d+\.", text)) == report.MOST_SAMPLES + 1
    assert "sample 1." in text and "sample 40." in text and "12 of 39 earlier samples" in text


# Arithmetic


def test_a_long_curve_is_drawn_as_means(run: RunDirectory) -> None:
    count = 2 * MOST_POINTS + 1  # buckets of three, the last one shorter
    for step in range(1, count + 1):
        run.append_metrics(
            {"step": step, "train/loss": float(step % 3) if step > 3 else None, "train/lr": step}
        )
    seen = Page(write_report(run.path))
    curve = seen.charts["chart-training-loss"]["all"]
    assert "mean of 3 logged steps" in seen.text
    assert len(curve["x"]) == -(-count // 3)
    assert curve["x"][:2] == [2.0, 5.0] and curve["y"][:2] == [None, 1.0]
    assert curve["x"][-1] == sum(range(4000, 4002)) / 2
    assert sum(seen.charts["chart-learning-rate"]["train/lr"]["y"][:-1]) * 3 == sum(range(1, 4000))


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=60), st.integers(1, 70))
def test_means_of_buckets_keep_the_mean(values: list[float], bucket: int) -> None:
    xs, ys = thin(list(enumerate(values)), bucket)
    sizes = [min(bucket, len(values) - first) for first in range(0, len(values), bucket)]
    assert len(xs) == len(ys) == len(sizes)
    assert sum(y * n for y, n in zip(ys, sizes, strict=True) if y is not None) == pytest.approx(
        sum(values), abs=1e-3
    )
    assert sum(x * n for x, n in zip(xs, sizes, strict=True)) == pytest.approx(sum(range(len(values))))


def test_lines_are_ordered_by_step() -> None:
    assert by_step([{"step": 2, "a": 1}, {"step": 1}, {"step": 2, "a": 2}]) == [
        {"step": 1},
        {"step": 2, "a": 2},
    ]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (45, "45 s"), (142, "2 min 22 s"), (3600, "1 h 0 min"), (11_520, "3 h 12 min"),
     (183_600, "2 d 3 h")],
)  # fmt: skip
def test_spans(seconds: float, text: str) -> None:
    assert span(seconds) == text


@pytest.mark.parametrize(("shared", "kind"), [(1, "MQA"), (4, "GQA, 4 for keys and values"), (8, "MHA")])
def test_the_attention_is_named(shared: int, kind: str) -> None:
    assert describe_model({"n_heads": 8, "n_kv_heads": shared}) == [f"8 heads ({kind})"]


def test_spread_keeps_both_ends() -> None:
    files = [Path(str(number)) for number in range(100)]
    some = spread(files, 5)
    assert [file.name for file in some] == ["0", "25", "50", "74", "99"]
    assert spread(files[:3], 5) == files[:3]


# In a browser

CHROMIUM = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--enable-logging=stderr", "--virtual-time-budget=5000",
]  # fmt: skip


@pytest.mark.system
def test_a_browser_draws_every_chart_without_a_complaint(run: RunDirectory, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no chromium on this machine")
    file = write_report(fill(run).path)
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    result = subprocess.run(
        [browser, *CHROMIUM, profile, "--dump-dom", file.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert ":CONSOLE" not in result.stderr, result.stderr
    dom = unescape(result.stdout)
    charts = Page(file).charts
    drawn = re.findall(
        r'id="?(chart-[\w-]+)"? class="?[^>]*js-plotly-plot|class="chart js-plotly-plot" id="(chart-[\w-]+)"',
        dom,
    )
    assert {one or other for one, other in drawn} == set(charts)
    assert dom.count('<svg class="main-svg"') >= len(charts)
