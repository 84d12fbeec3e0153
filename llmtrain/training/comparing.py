"""Runs beside each other: where their settings differ, what came of them, and their curves on one page."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

from llmtrain.config import UserError
from llmtrain.training.changes import differences, shown
from llmtrain.training.report import PALETTE, by_step, curve, training_seconds
from llmtrain.training.report_page import Chart, Trace, number, page, table
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.status import State, status_of
from llmtrain.training.words import percent, short, span

NAMES = ("name", "output_dir")
"""Keys that say which run it is."""

MOST_SOURCES = 8
"""Sources whose loss has a chart of its own, the first that two runs have."""

Line = Mapping[str, Any]
Value = float | str | None


@dataclass(frozen=True)
class Compared:
    """What a run directory has for a comparison."""

    label: str
    """Its path below the directory that all runs are in."""
    path: Path
    state: State
    config: Mapping[str, Any]
    lines: Sequence[Line]
    """Of the steps that count."""
    start: Line
    """What the newest start said of model and machines."""
    held_out: float | None
    """Bits per byte."""

    @property
    def last(self) -> Line:
        """The newest line."""
        return self.lines[-1] if self.lines else {}

    def median(self, key: str) -> float | None:
        """Of what a key was in the steps that have it."""
        values = [line[key] for line in self.lines if line.get(key) is not None]
        return median(values) if values else None


@dataclass(frozen=True)
class Figure:
    """One number of each run, in the order of the runs."""

    name: str
    values: Sequence[Value]
    form: Callable[[Any], str]

    @property
    def cells(self) -> list[str]:
        """As people read them."""
        return [number(value, self.form) for value in self.values]


def open_runs(paths: Sequence[Path]) -> list[Compared]:
    """Read the runs; UserError for one that is named twice, and where there is none."""
    places = [path.resolve() for path in paths]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"{place}: named twice; a run is compared with others")
    above = os.path.commonpath([place.parent for place in places])
    return [_open(path, os.path.relpath(place, above)) for path, place in zip(paths, places, strict=True)]


def _open(path: Path, label: str) -> Compared:
    directory = RunDirectory(path)
    starts = [event for event in directory.read_events() if event["event"] in ("start", "resume")]
    held_out = (directory.read_json("eval/heldout.json") or {}).get("all") or {}
    return Compared(
        label=label,
        path=path,
        state=status_of(path).state,
        config=directory.read_config(),
        lines=by_step(directory.read_metrics()),
        start=starts[-1] if starts else {},
        held_out=held_out.get("bits_per_byte"),
    )


def settings(runs: Sequence[Compared]) -> dict[str, Sequence[Any]]:
    """{key: its value in each run} of the keys that differ."""
    found = differences(*(run.config for run in runs))
    return {key: values for key, values in found if key not in NAMES}


def figures(runs: Sequence[Compared]) -> Iterator[Figure]:
    """What came of the runs; what no run knows is left out."""
    common = _common_tokens(runs)

    def at_common(run: Compared) -> Value:
        return next(line["train/loss"] for line in run.lines if line.get("train/tokens") == common)

    fixed: list[tuple[str, Callable[[Compared], Value], Callable[[Any], str]]] = [
        ("state", lambda run: run.state, str),
        ("parameters", lambda run: run.start.get("parameters"), short),
        ("ranks", lambda run: run.start.get("ranks"), str),
        ("steps", lambda run: run.last.get("step"), "{:,}".format),
        ("tokens", lambda run: run.last.get("train/tokens"), short),
        ("training loss", lambda run: run.last.get("train/loss"), "{:.4f}".format),
        ("held-out bits per byte", lambda run: run.held_out, "{:.4f}".format),
        ("tokens per second, median", lambda run: run.median("perf/tokens_per_second"), short),
        ("MFU, median", lambda run: run.median("perf/mfu"), percent),
        ("time in steps that count", lambda run: training_seconds(run.lines) or None, span),
        ("goodput", lambda run: run.last.get("goodput/share"), percent),
    ]
    if common is not None:
        fixed.insert(6, (f"training loss after {short(common)} tokens", at_common, "{:.4f}".format))
    for name, ask, form in fixed:
        values = [ask(run) for run in runs]
        if any(value is not None for value in values):
            yield Figure(name, values, form)


def _common_tokens(runs: Sequence[Compared]) -> int | None:
    """The most tokens after which every run has a line."""
    seen = [{line["train/tokens"] for line in run.lines if "train/tokens" in line} for run in runs]
    return max(set.intersection(*seen), default=None)


# The page


def comparison_page(runs: Sequence[Compared]) -> str:
    """One self-contained page: tables of figures and settings, and the curves of all runs over each other."""
    labels = [run.label for run in runs]
    legend = " &ensp; ".join(_dot(number) + escape(label) for number, label in enumerate(labels))
    title, charts = " · ".join(labels), [chart for chart in _charts(runs) if chart.traces]
    numbers = [[escape(figure.name), *map(escape, figure.cells)] for figure in figures(runs)]
    keys = [[escape(key), *(escape(shown(each)) for each in row)] for key, row in settings(runs).items()]
    differing = f"<div class=card>{table(['key', *labels], keys, words=labels)}</div>"
    body = [
        f"<header><h1>{escape(title)}</h1><p class=soft>{legend}</p></header>",
        f"<div class=card>{table(['', *labels], numbers)}</div>",
        "<h2>Settings that differ</h2>",
        differing if keys else "<p class=soft>None.</p>",
        f"<h2>Curves</h2><div class=cards>{''.join(chart.card() for chart in charts)}</div>",
    ]
    return page(f"{title} · llmtrain", "\n".join(body), charts)


def _charts(runs: Sequence[Compared]) -> Iterator[Chart]:
    loss = "train/loss"
    yield Chart("Training loss", "nats per token", _traces(runs, loss), wide=True, log=True)
    if len({run.last["train/tokens"] / run.last["step"] for run in runs if "train/tokens" in run.last}) > 1:
        over = _traces(runs, loss, across="train/tokens")
        yield Chart("Training loss over tokens", "nats per token", over, wide=True, log=True, across="tokens")
    yield Chart("Held-out loss", "bits per byte", _traces(runs, "eval/bits_per_byte", dots=True))
    yield Chart("Throughput", "tokens per second", _traces(runs, "perf/tokens_per_second"), zero=True)
    yield Chart("Model FLOPs utilisation", "of the peak", _traces(runs, "perf/mfu"), zero=True)
    yield Chart("Learning rate", "as applied", _traces(runs, "train/lr"), zero=True)
    yield Chart("Gradient norm", "before clipping", _traces(runs, "train/grad_norm"), log=True)
    keys = [key for run in runs for key in run.last if key.startswith(f"{loss}/")]
    for key in [key for key in dict.fromkeys(keys) if keys.count(key) > 1][:MOST_SOURCES]:
        title = f"Training loss of {key.removeprefix(f'{loss}/')}"
        yield Chart(title, "nats per token", _traces(runs, key), log=True)


def _traces(runs: Sequence[Compared], key: str, across: str = "step", dots: bool = False) -> list[Trace]:
    """A key of each run in its colour."""
    return [
        trace
        for number, run in enumerate(runs)
        for trace in curve(run.lines, key, run.label, _color(number), across=across, dots=dots)
    ]


def _color(number: int) -> str:
    return f"c{number % PALETTE}"


def _dot(number: int) -> str:
    return f'<span class=dot style="background:var(--{_color(number)})"></span>'
