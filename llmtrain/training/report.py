"""report.html: what a run was and what came of it, from the files of its directory alone."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import chain
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from llmtrain.training.report_events import event_marks, events_section, save_traces
from llmtrain.training.report_goodput import goodput_section
from llmtrain.training.report_heldout import change, heldout_section
from llmtrain.training.report_mixture import QUARANTINE, Stage, asked_by, mixture_section, stage_steps
from llmtrain.training.report_page import Chart, Trace, number, page, table
from llmtrain.training.report_samples import samples_section
from llmtrain.training.report_spikes import spikes_section
from llmtrain.training.rewinds import merged, read_rewinds
from llmtrain.training.run_directory import RunDirectory, write_atomically
from llmtrain.training.words import count, describe_model, short, span

logger = logging.getLogger(__name__)

PATIENCE = 5.0
"""Seconds that a process which ends waits for its last report."""

MOST_POINTS = 2000
"""Points of a curve; a longer one is drawn as means of buckets, so that the page stays small."""

MOST_NAME = 90
"""Characters of a kernel's name that are shown; the rest is in its tool tip."""

PALETTE = 8
"""Colours that the page has for sources, c0 to c7; sources beyond that begin anew."""

Line = Mapping[str, Any]


def write_report(run: Path) -> Path:
    """Write report.html into a run directory, atomically, and return its path.

    Works at any time: for a run without a single logged step, for one that goes on, and for a resumed one,
    where the last line of a step is the one that counts.
    """
    directory = RunDirectory(run)
    return write_atomically(directory.report, _Report(directory).html())


def write_last_report(run: Path) -> None:
    """`write_report` where a process ends for something that went wrong, so that its event is shown.

    Nothing waits longer than PATIENCE for it, and what it fails of is told and no error: the disk may be what
    went wrong.
    """

    def write() -> None:
        try:
            write_report(run)
        except Exception as error:  # the process ends as it would have without
            logger.warning("no report: %s: %s", type(error).__name__, error)

    writing = threading.Thread(target=write, daemon=True, name="llmtrain-report")
    writing.start()
    writing.join(PATIENCE)


class _Report:
    """The files of a run, and the sections of its page as HTML."""

    def __init__(self, directory: RunDirectory) -> None:
        self.directory = directory
        self.config = directory.read_config() if directory.config.exists() else {}
        written = directory.read_metrics()
        self.lines = by_step(written)
        self.events = directory.read_events()
        self.goodput = goodput_section(written, self.events)
        self.data: Mapping[str, Any] = directory.read_json("data.json") or {}
        self.best: Mapping[str, Any] = directory.read_json("best.json") or {}
        self.heldout: Mapping[str, Any] = directory.read_json("eval/heldout.json") or {}
        self.name = str(self.config.get("name") or directory.name)
        self.sources = self._source_names()
        self.charts: list[Chart] = []

    def html(self) -> str:
        body = [
            self._header(),
            self._curves(),
            self._mixture(),
            heldout_section(self.heldout, self._dot, self._draw),
            samples_section(self.directory.samples),
            self.goodput,
            self._profile(),
            spikes_section(self.events, self._dot),
            events_section(self.events),
            self._config(),
        ]
        return page(f"{self.name} · llmtrain", "\n".join(body), self.charts)

    def _header(self) -> str:
        ended = (
            bool(self.events) and self.events[-1].get("event") == "end"
        )  # DONE is written after the report
        kind, state = ("good", "complete") if ended else ("warn", "not finished")
        last = self.lines[-1]["step"] if self.lines else 0
        early = any(event.get("event") == "early_stop" and event["step"] == last for event in self.events)
        chips = f'<span class="chip {kind}">{state}</span>' + early * "<span class=chip>stopped early</span>"
        tiles = "".join(
            f"<div class=tile><dt>{escape(name)}</dt>"
            f"<dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
            for name, value, note in self._tiles()
        )
        return (
            f"<header><div class=headline><h1>{escape(self.name)}</h1>"
            f"{chips}</div>"
            f"<p class=soft>{escape(self._summary())}</p><dl class=tiles>{tiles}</dl></header>"
        )

    def _tiles(self) -> list[tuple[str, str, str]]:
        """(name, value, note) of the numbers one looks for first."""
        last = self.lines[-1] if self.lines else {}
        rows, length = self.config.get("global_batch_size"), self.config.get("seq_len")
        batch = f"{rows} rows of {length} a step" if rows and length else ""
        speeds = [line["perf/tokens_per_second"] for line in self.lines if line.get("perf/tokens_per_second")]
        bits, unigram = self._newest("bits_per_byte"), self._newest("unigram_bits_per_byte")
        gain = f"bits per byte, {change(bits, unigram)} against unigram" if unigram else "bits per byte"
        best = f"bits per byte, after step {self.best['step']:,}" if self.best else ""
        return [
            ("Steps", _steps(last.get("step", 0), self.config.get("max_steps")), ""),
            ("Tokens trained", number(last.get("train/tokens"), short), batch),
            (
                "Training time",
                number(training_seconds(self.lines) or None, span),
                "in the steps that count",
            ),
            ("Training loss", number(last.get("train/loss"), "{:.4f}".format), "nats per token, last step"),
            ("Held-out text", number(bits, "{:.4f}".format), gain),
            *([("Best checkpoint", number(self.best["value"], "{:.4f}".format), best)] if self.best else ()),
            ("Throughput", number(median(speeds) if speeds else None, short), "tokens per second, median"),
        ]

    def _newest(self, key: str) -> float | None:
        """A held-out number over all sources: that of the last evaluation."""
        found = (line[f"eval/{key}"] for line in reversed(self.lines) if f"eval/{key}" in line)
        return (self.heldout.get("all") or {}).get(key) or next(found, None)

    def _summary(self) -> str:
        """The model in one line, with what the newest start has to say about the machines."""
        start: dict[str, Any] = {}
        for event in self.events:
            start |= event if event.get("event") in ("start", "resume") else {}
        parts = describe_model(self.config.get("model") or {})
        if "parameters" in start:
            parts.insert(0, f"{short(start['parameters'])} parameters")
        if ranks := start.get("ranks"):
            parts.append(f"{count(ranks, 'rank')} on {start.get('device', 'cpu')}")
        precision = start.get("precision", self.config.get("precision"))
        return " · ".join([*parts, precision] if precision else parts)

    def _curves(self) -> str:
        if not self.lines:
            return "<h2>Curves</h2><p class=soft>No step has been logged yet.</p>"
        losses, speed = self._by_source("train/loss"), self._curve("perf/tokens_per_second")
        held_out = self._by_source("eval/bits_per_byte", dots=True)
        happened = event_marks(self.events)
        best = [{"x": self.best["step"], "text": " best checkpoint"}] if self.best else []
        charts = [
            Chart("Training loss", "nats per token", losses, wide=True, log=True, marks=happened),
            Chart("Held-out loss", "bits per byte", held_out, marks=best),
            Chart("Learning rate", "as applied", self._curve("train/lr"), zero=True),
            Chart("Gradient norm", "before clipping", self._curve("train/grad_norm"), log=True),
            Chart("Throughput", "tokens per second", speed, zero=True),
        ]
        mfu, memory = self._curve("perf/mfu", scale=100), self._curve("perf/memory_bytes", scale=2**-30)
        more = [
            Chart("Model FLOPs utilisation", "percent of the peak", mfu, zero=True),
            Chart("Memory", "GiB held by rank 0", memory, zero=True),
            Chart("Saves", "seconds a checkpoint", save_traces(self.events), zero=True),
        ]
        charts += [chart for chart in more if chart.traces]
        bucket = bucket_size(len(self.lines))
        note = f"<p class=soft>Each point is the mean of {bucket} logged steps.</p>" if bucket > 1 else ""
        return f"<h2>Curves</h2>{note}<div class=cards>{''.join(map(self._draw, charts))}</div>"

    def _curve(self, key: str, name: str = "", color: str = "c0", **look: Any) -> list[Trace]:
        return curve(self.lines, key, name or key, color, **look)

    def _by_source(self, key: str, **look: Any) -> list[Trace]:
        """A key of each source in its colour, and of all together, where there is that, thick and on top."""
        together = self._curve(key, "all", "ink", **look)
        look["faint"] = bool(together)
        each = [self._curve(f"{key}/{name}", name, self._color(name), **look) for name in self.sources]
        return [*chain.from_iterable(each), *together]

    def _mixture(self) -> str:
        order: Mapping[str, Any] = self.directory.read_json("data/order.json") or {}
        skips = (self.config.get("data") or {}).get("skip") or ()
        rewinds = [rewind.skip for rewind in read_rewinds(self.directory)]
        stages = stage_steps(order, merged([*skips, *rewinds]))
        quarantine = self.directory.path / QUARANTINE
        kept = {name for name in self.sources if any((quarantine / name).glob("shard-*.jsonl"))}
        curves = [
            Chart("Share of the tokens so far", "percent; dotted: as asked", self._shares(stages), zero=True),
            Chart("Epochs", "passes over the text of a source", self._by_source("data/epochs"), zero=True),
        ]
        return mixture_section(self.data, stages, kept, self._dot, self._draw, curves)

    def _shares(self, stages: Sequence[Stage]) -> list[Trace]:
        """Of each source as it was served, and below it as it was asked for."""
        traces = []
        for name in self.sources:
            served = self._curve(f"data/share/{name}", name, self._color(name), scale=100)
            for trace in served if stages else ():
                steps = [float(step) for step in trace.x]
                asked = [100 * share for share in asked_by(steps, name, stages)]
                traces.append(Trace(f"{name}, asked", steps, asked, trace.color, dash=True))
            traces += served
        return traces

    def _profile(self) -> str:
        found = self.directory.read_json("profile/kernels.json")
        if not found:
            return ""
        what = "kernel" if found["on"] == "device" else "operator"
        rows = [
            [
                f"<span title='{escape(kernel['name'])}'>{escape(kernel['name'][:MOST_NAME])}</span>",
                f"{kernel['calls']:.3g}",
                f"{kernel['ms']:.3f}",
                f"{kernel['share']:.1%}",
            ]
            for kernel in found["kernels"]
        ]
        last = found["first_step"] + found["steps"] - 1
        note = (
            f"Steps {found['first_step']} to {last}: {found['step_ms']:.1f} ms a step, "
            f"{found['total_ms']:.1f} ms of them in {what}s of the {found['on']}. "
            "The whole trace is in profile/."
        )
        head = [what, "calls a step", "ms a step", "share"]
        card = f'<div class="card tall">{table(head, rows, words=(what,))}</div>'
        return f"<h2>Profile</h2><p class=soft>{note}</p>{card}"

    def _config(self) -> str:
        if not self.config:
            return ""
        text = escape(yaml.safe_dump(self.config, sort_keys=False, allow_unicode=True))
        return (
            "<h2>Configuration</h2><details class=card>"
            f"<summary>config.yaml</summary><pre>{text}</pre></details>"
        )

    def _draw(self, chart: Chart) -> str:
        """The card of a chart, which the page's script will fill."""
        if chart.traces:
            self.charts.append(chart)
        return chart.card()

    # Sources have the same colour everywhere.

    def _source_names(self) -> list[str]:
        names = dict.fromkeys((self.config.get("data") or {}).get("sources") or {})
        for line in self.lines[-1:]:
            keys = [key for key in line if key.startswith("train/loss/")]
            names |= dict.fromkeys(key.removeprefix("train/loss/") for key in keys)
        return list(names | dict.fromkeys(self.data.get("sources") or {}))

    def _color(self, source: str) -> str:
        return f"c{self.sources.index(source) % PALETTE}" if source in self.sources else "ink"

    def _dot(self, source: str) -> str:
        color = self._color(source)
        return f'<span class=dot style="background:var(--{color})"></span>{escape(source)}'


def by_step(lines: Iterable[Line]) -> list[Line]:
    """The lines that count: where a step was passed anew, nothing from before of this step or later."""
    found: list[Line] = []
    for line in lines:
        while found and found[-1]["step"] >= line["step"]:
            found.pop()
        found.append(line)
    return found


def bucket_size(points: int) -> int:
    """How many logged steps one point of a curve stands for."""
    return max(1, -(-points // MOST_POINTS))


def curve(
    lines: Sequence[Line],
    key: str,
    name: str,
    color: str,
    *,
    across: str = "step",
    faint: bool = False,
    dots: bool = False,
    scale: float = 1,
) -> list[Trace]:
    """A key, times `scale`, over the steps or over another key, as a trace; none where it has no value."""
    points = [(line[across], line[key]) for line in lines if key in line and across in line]
    x, means = thin(points, bucket_size(len(points)))
    y = [value if value is None else scale * value for value in means]
    trace = Trace(name, x, y, color, faint=faint, dots=dots)
    return [trace] if any(value is not None for value in y) else []


def thin(points: Sequence[tuple[int, float | None]], bucket: int) -> tuple[list[float], list[float | None]]:
    """x and y of a curve as means of `bucket` points each: of the steps, and of the values that there are."""
    if bucket == 1:
        return [x for x, _ in points], [y for _, y in points]
    xs: list[float] = []
    ys: list[float | None] = []
    for first in range(0, len(points), bucket):
        part = points[first : first + bucket]
        values = [y for _, y in part if y is not None]
        xs.append(sum(x for x, _ in part) / len(part))
        ys.append(sum(values) / len(values) if values else None)
    return xs, ys


def training_seconds(lines: Sequence[Line]) -> float:
    """Time spent in steps that count: each line's seconds a step times the steps since the line before."""
    total, before = 0.0, 0
    for line in lines:
        total += (line.get("perf/step_seconds") or 0.0) * (line["step"] - before)
        before = line["step"]
    return total


def _steps(step: int, most: int | None) -> str:
    return f"{step:,} of {most:,}" if most and most != step else f"{step:,}"
