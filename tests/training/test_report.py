from __future__ import annotations

import itertools
import json
import re
import threading
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
from llmtrain.training.report import MOST_POINTS, by_step, thin, write_last_report, write_report
from llmtrain.training.report_events import MOST_EVENTS
from llmtrain.training.report_mixture import asked_by, stage_steps
from llmtrain.training.report_page import Chart, Trace, page
from llmtrain.training.report_samples import MOST_SAMPLES, spread
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.words import describe_model, span
from tests.data.browser import Browser, find_chromium

HOSTILE = "</script><script>alert('sample')</script><img src=x onerror=alert(1)> & <b>"
SOURCES = ("code", "prose")
DASH = "\N{EN DASH}"


class Page(HTMLParser):
    """What a browser makes of the page, as far as the tests look."""

    def __init__(self, file: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.text, self.tags, self.scripts, self.addresses = "", [], [], []
        self.rows: list[list[str]] = []
        """The cells of every row of every table."""
        self.paragraphs: list[str] = []
        self.chips: list[str] = []
        self._open: list[list[str]] = []
        self._inside = ""
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag if tag in ("script", "style") else self._inside
        if tag == "script":
            self.scripts.append("")
        if tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self._open = [self.rows[-1]]
            self.rows[-1].append("")
        elif tag == "p":
            self._open = [self.paragraphs]
            self.paragraphs.append("")
        elif tag == "span" and "chip" in (dict(attrs).get("class") or "").split():
            self._open.append(self.chips)
            self.chips.append("")
        self.addresses += [value for name, value in attrs if name in ("src", "href", "srcset", "action")]

    def handle_endtag(self, tag: str) -> None:
        self._inside = "" if tag == self._inside else self._inside
        if tag in ("td", "th", "p"):
            self._open = []
        elif tag == "span":
            self._open = [one for one in self._open if one is not self.chips]

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] += data
        elif not self._inside:
            self.text += data
            for target in self._open:
                target[-1] += data.replace("\N{NO-BREAK SPACE}", " ")

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
    ledger = {"weight": 3, "share": 0.75, "trained": 3072, "epochs": 0.3, "total_tokens": 10_240}
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
    assert ["code", "75.00 %", "75.00 %", "3.07k", "0.300", DASH, DASH, "10.2k"] in seen.rows
    assert "all1.50002.00001.7500\N{MINUS SIGN}25.0 %2.0000999" in seen.text


def everything(run: RunDirectory) -> RunDirectory:
    """A run with all that a report can show."""
    fill(run)
    shares = {f"data/share/{name}": share for name, share in zip(SOURCES, (0.75, 0.25), strict=True)}
    epochs = {f"data/epochs/{name}": 0.3 for name in SOURCES}
    run.append_metrics({**line(9), **shares, **epochs, "perf/mfu": 0.4, "perf/memory_bytes": 3 * 2**29})
    for step in (4, 9):
        run.append_event("save", step=step, seconds=2.0, stall_seconds=0.5)
    run.append_event("skip", step=7)
    run.append_event("spike", step=7)
    run.append_event("early_stop", step=9, best_step=8)
    run.write_json("best.json", {"step": 8, "path": "x", "measure": "eval/bits_per_byte", "value": 1.5})
    run.write_json(
        "data/order.json", {"global_batch_size": 8, "stages": [[0, {"code": 3, "prose": 1}]], "windows": 0}
    )
    kernel = {"name": "aten::mm" * 30, "calls": 2, "ms": 1.5, "share": 0.5}
    run.write_json(
        "profile/kernels.json",
        {"on": "device", "first_step": 2, "steps": 3, "step_ms": 9.0, "total_ms": 3.0, "kernels": [kernel]},
    )
    return run


def test_all_that_is_known_of_a_run_is_shown(run: RunDirectory) -> None:
    seen = Page(write_report(everything(run).path))
    charts = seen.charts
    assert charts["chart-memory"]["perf/memory_bytes"]["y"] == [1.5]
    assert charts["chart-saves"]["until it was there"]["y"] == [2.0, 2.0]
    assert charts["chart-saves"]["training stood still"]["y"] == [0.5, 0.5]
    shares = charts["chart-share-of-the-tokens-so-far"]
    assert {name: trace["y"] for name, trace in shares.items()} == {
        "code": [75.0], "code, asked": [75.0], "prose": [25.0], "prose, asked": [25.0]
    }  # fmt: skip
    assert charts["chart-epochs"]["prose"]["y"] == [0.3]
    marks = {chart["id"]: chart["marks"] for chart in json.loads(seen.scripts[0])}
    assert marks["chart-training-loss"] == [
        {"x": 4, "text": " resumed"},
        {"x": 7, "text": " left out, spike"},
        {"x": 9, "text": " stopped early"},
    ]
    assert marks["chart-held-out-loss"] == [{"x": 8, "text": " best checkpoint"}]
    assert "Best checkpoint" in seen.text and "after step 8" in seen.text
    assert "stopped early" in seen.chips


def test_what_was_asked_so_far_follows_the_stages() -> None:
    stages = [(1, {"code": 3, "prose": 1}), (5, {"prose": 2})]
    assert asked_by([2, 4, 8], "code", stages) == pytest.approx([0.75, 0.75, 0.375])
    assert asked_by([2, 4, 8], "prose", stages) == pytest.approx([0.25, 0.25, 0.625])


def test_mfu_has_a_chart_where_it_is_known(run: RunDirectory) -> None:
    run.append_metrics({**line(1), "perf/mfu": 0.4})
    assert Page(write_report(run.path)).charts["chart-model-flops-utilisation"]["perf/mfu"]["y"] == [40.0]


# The ledger


def entry(**changed: Any) -> dict[str, Any]:
    """A source as data.json has it: 1000 tokens, of which 300 are trained and 50 skipped."""
    came = {"documents": 47, "train": 40, "held_out": 2, "tokens": 1100, "text_bytes": 4400, "complete": True,
            "rejected": {"not JSON": 4, "empty": 1}}  # fmt: skip
    whole = {"weight": 1, "share": 1.0, "tokens": 300, "trained": 300, "skipped": 50,
             "total_tokens": 1000, "epochs": 0.3, "to_come": 650, "loss": 2.25, "input": came}  # fmt: skip
    return {**whole, **changed}


def page_of(run: RunDirectory, sources: dict[str, Any], **order: Any) -> Page:
    run.write_json("data.json", {"step": 100, "seq_len": 64, "global_batch_size": 8, "sources": sources})
    if order:
        run.write_json("data/order.json", {"global_batch_size": 8, "windows": 0, "skip": [], **order})
    return Page(write_report(run.path))


def added(sentence: str) -> tuple[list[int], list[int]]:
    """The numbers left and right of the sign of equality; those in brackets or a warning do not count."""
    left, right = re.sub(r"\(.*?\)|does not.*", "", sentence).split("=")
    return numbers(left), numbers(right)


def numbers(text: str) -> list[int]:
    return [int(one.replace(",", "")) for one in re.findall(r"\b\d[\d,]*", text)]


def sums(seen: Page) -> list[str]:
    return [text for text in seen.paragraphs if "=" in text and "data." not in text]


def test_the_table_says_what_was_asked_and_what_was_served(run: RunDirectory) -> None:
    seen = page_of(
        run,
        {
            "code": entry(weight=0.75, share=0.6, trained=1_234_567, epochs=1.23456, total_tokens=1_000_003),
            "prose": entry(weight=0.25, share=0.4, loss=None),
        },
    )
    heads = ["asked", "realised", "tokens trained", "epochs", "loss", "skipped", "tokens in source"]
    assert seen.rows[0] == ["source", *heads]
    assert seen.rows[1] == ["code", "75.00 %", "60.00 %", "1.23M", "1.235", "2.2500", "50", "1.00M"]
    assert seen.rows[2] == ["prose", "25.00 %", "40.00 %", "300", "0.300", DASH, "50", "1.00k"]


def test_everything_that_came_in_is_accounted_for(run: RunDirectory) -> None:
    seen = page_of(run, {"code": entry()})
    documents, tokens = sums(seen)
    assert documents == "47 documents in = 40 to train on + 2 held out + 5 left out (4 not JSON, 1 empty)"
    assert tokens == "1,000 tokens of the pass under way = 300 trained + 50 skipped + 650 still to come"
    assert added(documents) == ([47], [40, 2, 5]) and added(tokens) == ([1000], [300, 50, 650])
    assert not any("add up" in chip for chip in seen.chips)


@pytest.mark.parametrize(
    ("trained", "skipped", "to_come", "begun"),
    [(0, 0, 1000, 1000), (1000, 0, 0, 1000), (950, 50, 0, 1000), (1001, 0, 999, 2000), (2990, 20, 990, 4000)],
)
def test_the_passes_that_have_begun_are_counted_whole(
    run: RunDirectory, trained: int, skipped: int, to_come: int, begun: int
) -> None:
    source = entry(trained=trained, skipped=skipped, to_come=to_come, epochs=trained / 1000)
    seen = page_of(run, {"code": source})
    sentence = sums(seen)[1]
    passes = re.search(r"of (\d+) passes", sentence)
    assert (int(passes[1]) if passes else 1) == begun // 1000
    (whole, *_), terms = added(sentence)
    assert (whole, terms) == (begun, [trained, skipped, to_come])
    assert not any("add up" in chip for chip in seen.chips)


@pytest.mark.parametrize(
    ("changed", "line", "whole", "total"),
    [
        ({"input": {**entry()["input"], "documents": 48}}, 0, 48, 47),
        ({"input": {**entry()["input"], "train": 39}}, 0, 47, 46),
        ({"input": {**entry()["input"], "rejected": {"not JSON": 7}}}, 0, 47, 49),
        ({"to_come": 651}, 1, 1000, 1001),
        ({"skipped": 0}, 1, 1000, 950),
        ({"to_come": 1650}, 1, 1000, 2000),
    ],
)
def test_a_sum_that_is_wrong_is_marked(
    run: RunDirectory, changed: dict[str, Any], line: int, whole: int, total: int
) -> None:
    seen = page_of(run, {"prose": entry(), "code": entry(**changed)})
    warning = f"does not add up: {total:,}"
    assert [chip for chip in seen.chips if "add up" in chip] == [warning]
    marked = [number for number, text in enumerate(sums(seen)) if warning in text]
    assert marked == [2 + line], "the second source, this line"
    left, right = added(sums(seen)[2 + line])
    assert left == [whole] and sum(right) == total


def test_what_is_not_known_is_a_dash_and_no_mistake(run: RunDirectory) -> None:
    unknown = dict.fromkeys(("total_tokens", "epochs", "to_come", "loss"))
    seen = page_of(run, {"live": entry(**unknown), "far": entry(**unknown, input=None)})
    row = ["100.00 %", "300", DASH, DASH, "50", DASH]
    assert seen.rows[1:3] == [["live", "50.00 %", *row], ["far", "50.00 %", *row]]
    tokens = f"{DASH} tokens of the pass under way = 300 trained + 50 skipped + {DASH} still to come"
    assert sums(seen)[1:] == [
        tokens,
        f"{DASH} documents in = {DASH} to train on + {DASH} held out + {DASH} left out",
        tokens,
    ]
    assert "None" not in seen.text and "nan" not in seen.text.split()
    assert not any("add up" in chip for chip in seen.chips)


def test_a_sum_with_an_unknown_part_is_no_mistake(run: RunDirectory) -> None:
    seen = page_of(run, {"code": entry(to_come=None)})
    assert sums(seen)[1].startswith("1,000 tokens") and sums(seen)[1].endswith(f"+ {DASH} still to come")


def test_text_that_is_still_tokenised_has_come_in_so_far(run: RunDirectory) -> None:
    came = {"documents": 12, "train": 9, "held_out": 1, "rejected": {"not UTF-8": 2}, "complete": False}
    seen = page_of(run, {"live": entry(input=came)})
    assert sums(seen)[0] == "12 documents in so far = 9 to train on + 1 held out + 2 left out (2 not UTF-8)"


def test_padding_is_counted_apart(run: RunDirectory) -> None:
    windows = 12  # of 64 inputs, of 800 that were trained
    padded = entry(tokens=64 * windows - 5, padding=5, share=windows / 800, trained=766, to_come=184)
    seen = page_of(run, {"code": padded})
    assert sums(seen)[1:] == [
        "1,000 tokens of the pass under way = 766 trained + 50 skipped + 184 still to come",
        "768 inputs trained = 763 with a token + 5 padding",
    ]
    assert "add up" not in seen.text
    assert "does not add up: 769" in page_of(run, {"code": {**padded, "padding": 6}}).text


def test_a_source_that_left_the_mixture_says_since_when(run: RunDirectory) -> None:
    stages = [[0, {"a": 1, "b": 1}], [80, {"a": 1}], [160, {"a": 1, "c": 1}], [4000, {"b": 1}]]
    seen = page_of(run, {"a": entry(), "b": entry(weight=0), "c": entry()}, stages=stages)
    assert [text.rpartition(" + ")[2] for text in sums(seen) if "trained" in text] == [
        "650 still to come", "650 unread: out of the mixture since step 11", "650 still to come"
    ]  # fmt: skip
    assert not any("add up" in chip for chip in seen.chips)


def test_bad_records_are_counted_by_reason_and_found(run: RunDirectory) -> None:
    def came(**rejected: int) -> dict[str, Any]:
        return {"input": {**entry()["input"], "rejected": rejected, "documents": 42 + sum(rejected.values())}}

    kept = run.path / "data" / "quarantine" / "code" / "shard-00003.jsonl"
    kept.parent.mkdir(parents=True)
    kept.write_text(json.dumps({"record": HOSTILE, "secret": "never shown"}))
    sources = {"code": entry(**came(bad=3, worse=1200)), "prose": entry(**came(empty=9)),
               "maths": entry(**came(bad=1)), "clean": entry(**came())}  # fmt: skip
    seen = page_of(run, sources)
    start = seen.rows.index(["source", "reason", "records"]) + 1
    assert seen.rows[start : start + 4] == [
        ["code", "worse", "1,200"], ["code", "bad", "3"], ["prose", "empty", "9"], ["maths", "bad", "1"]
    ]  # fmt: skip
    (hint,) = [text for text in seen.paragraphs if "quarantine" in text]
    assert "in data/quarantine/code/." in hint and "Not kept of maths:" in hint
    assert "data/quarantine/prose" not in hint and "data/quarantine/clean" not in hint
    assert "never shown" not in seen.text


def test_without_bad_records_nothing_is_said_of_them(run: RunDirectory) -> None:
    seen = page_of(run, {"code": entry(input={**entry()["input"], "documents": 42, "rejected": {}})})
    assert "Bad records" not in seen.text and "quarantine" not in seen.text
    assert sums(seen)[0].endswith("+ 0 left out")


def test_names_and_reasons_of_the_ledger_are_text(run: RunDirectory) -> None:
    came = {**entry()["input"], "documents": 43, "rejected": {HOSTILE: 1}}
    seen = page_of(run, {HOSTILE: entry(input=came)}, stages=[[0, {"a": 1}], [8, {HOSTILE: 1}]])
    assert len(seen.scripts) == 3 and "img" not in seen.tags
    assert seen.text.count(HOSTILE) >= 5, "table, sums (twice), bad records (twice), changes"


def test_steps_at_which_the_mixture_changed_are_named(run: RunDirectory) -> None:
    first, second, third = {"a": 3, "b": 1}, {"a": 1, "c": 7}, {"c": 2}
    # Steps of 8 rows: window 79 is in step 10, window 80 opens step 11, window 800 step 101.
    stages = [[0, first], [80, second], [800, third], [8000, first]]
    seen = page_of(run, {"a": entry()}, stages=stages)
    (line,) = [text for text in seen.paragraphs if "mixture" in text.lower()]
    assert line == (
        "After step 100. The mixture changed at step 11 (a 12.5 %, c 87.5 %)."
        " It will change at step 101 (c 100 %)."
    )
    assert seen.rows[0][1] == "asked now"
    assert page_of(run, {"a": entry()}, stages=stages[:1]).rows[0][1] == "asked"


def test_a_mixture_has_changed_with_the_first_step_that_trains_it(run: RunDirectory) -> None:
    changed = page_of(run, {"a": entry()}, stages=[[0, {"a": 1}], [8 * 99, {"b": 1}]])
    assert "The mixture changed at step 100 (b 100 %)" in changed.text and changed.rows[0][1] == "asked now"
    later = page_of(run, {"a": entry()}, stages=[[0, {"a": 1}], [8 * 100, {"b": 1}]])
    assert "It will change at step 101 (b 100 %)" in later.text and later.rows[0][1] == "asked"


def test_of_many_changes_the_newest_are_named(run: RunDirectory) -> None:
    stages = [[8 * step, {"a": 1 + step, "b": 1}] for step in range(30)]
    text = page_of(run, {"a": entry()}, stages=stages).text
    shown = [int(step) for step in re.findall(r"step (\d+) \(a ", text)]
    assert shown == list(range(19, 31)) and "the newest 12 of 29 times" in text


@given(
    st.integers(1, 4),
    st.lists(st.integers(1, 25), unique=True, max_size=12),
    st.integers(0, 20),
    st.integers(1, 120),
)
def test_a_stage_begins_at_the_first_step_that_trains_one_of_its_windows(
    rows: int, left_out: list[int], done: int, window: int
) -> None:
    # By counting: the steps of the order that are trained, numbered anew.
    trained = [place for place in range(1, 200) if place not in left_out]
    expected = 1 + next(n for n, place in enumerate(trained) if place * rows > window)
    past = [[place, place] for place in sorted(left_out) if place <= done]
    ahead = [[place, place] for place in sorted(left_out) if place > done]
    order = {"global_batch_size": rows, "windows": done * rows, "skip": past,
             "stages": [[0, {"a": 1}], [window, {"b": 1}]]}  # fmt: skip
    assert stage_steps(order, ahead)[1] == (expected, {"b": 1})
    if done:
        behind = [1, done + 1 if done + 1 in left_out else done]
        rest = [stretch for stretch in ahead if stretch[0] > behind[1]]
        assert stage_steps(order, [behind, *rest])[1] == (expected, {"b": 1}), "what is trained stays trained"


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


def test_the_last_report_ends_nothing_and_keeps_nobody_waiting(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run.append_event("crash", step=3, message="no such thing")
    write_last_report(run.path)
    assert "no such thing" in run.report.read_text()
    run.metrics.write_text("nonsense\n")
    write_last_report(run.path)
    assert "no report: UserError" in caplog.text and "no such thing" in run.report.read_text()
    answers = threading.Event()
    monkeypatch.setattr(report, "PATIENCE", 0.1)
    monkeypatch.setattr(report, "write_report", lambda path: answers.wait())  # a disk that does not answer
    write_last_report(run.path)
    assert [thread.name for thread in threading.enumerate()].count("llmtrain-report") == 1
    answers.set()


def test_what_went_wrong_stands_out_among_events(run: RunDirectory) -> None:
    wrong = ("hang", "corruption", "rejected", "save_failed", "skip")
    for kind in (*wrong, "save"):
        run.append_event(kind, step=1)
    page = write_report(run.path).read_text()
    assert all(f'<span class="chip warn">{kind}</span>' in page for kind in wrong)
    assert '<span class="chip warn">save</span>' not in page


def test_many_events_and_samples_are_cut_to_what_one_reads(run: RunDirectory) -> None:
    for step in range(300):
        run.append_event("save", step=step, note=f"number {step}.")
    run.samples.mkdir()
    for step in range(1, 41):
        (run.samples / f"step_{step:08d}.txt").write_text(f"sample {step}.")
    text = Page(write_report(run.path)).text
    assert len(re.findall(r"note number \d+\.", text)) == MOST_EVENTS
    assert "number 0." in text and "number 299." in text and "100 more in events.jsonl" in text
    assert "number 20." not in text and "number 120." in text
    assert len(re.findall(r"sample \d+\.", text)) == MOST_SAMPLES + 1
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
    rewound = [{"step": 1}, {"step": 2}, {"step": 3}, {"step": 4}, {"step": 2, "a": 2}, {"step": 3, "a": 2}]
    assert by_step(rewound) == [{"step": 1}, {"step": 2, "a": 2}, {"step": 3, "a": 2}]


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


@pytest.mark.system
def test_a_browser_draws_every_chart_on_every_screen(run: RunDirectory, tmp_path: Path) -> None:
    program = find_chromium()
    if program is None:
        pytest.skip("no chromium on this machine")
    page = write_report(everything(run).path)
    charts, papers = Page(page).charts, set()
    drawn = "[...document.querySelectorAll('.js-plotly-plot')].filter(c => c.querySelector("
    drawn += "'.scatterlayer path.js-line[d], .scatterlayer path.point, .barlayer path')).map(c => c.id)"
    with Browser(program, tmp_path / "profile") as browser:
        for width, dark in itertools.product((375, 820, 1440), (False, True)):
            browser.look(width, 900, dark=dark)
            browser.open(page.as_uri())
            assert set(browser.run(drawn)) == set(charts), (width, dark)
            assert browser.run("document.documentElement.scrollWidth") == width
            wider = "[...document.querySelectorAll('.card')].filter(c => c.getBoundingClientRect().right > "
            assert browser.run(f"{wider}{width}).length") == 0
            papers.add((dark, browser.run("getComputedStyle(document.body).backgroundColor")))
        assert browser.complaints == []
    assert len(papers) == 2, "one colour a scheme"
