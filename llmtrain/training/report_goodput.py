"""The section of report.html that says what the time of a run was spent on, and how often to save."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from llmtrain.training.goodput import (
    DEVICE_HOURS_BETWEEN_FAILURES,
    PARTS,
    START,
    Advice,
    Part,
    advise,
    seconds_of,
)
from llmtrain.training.report_page import table
from llmtrain.training.words import percent, span

MEANING = {
    "productive": "steps that were trained for the first time",
    "checkpoint": "standing still for a save",
    "evaluation": "held-out text and samples",
    "stall": "waiting for data",
    "restart": "from the start of a process to its first step",
    "lost": "steps trained again after the end of a process",
    "idle": "no process at work",
}
COLORS = dict(zip(PARTS, ("c2", "c0", "c3", "c1", "c5", "c4", "line"), strict=True))

MOST_STARTS = 12

Line = Mapping[str, Any]


def goodput_section(lines: Sequence[Line], events: Sequence[Line]) -> str:
    """A bar and a table by part, what the starts took, and the interval to save at; lines in file order."""
    seconds = seconds_of(lines)
    total = sum(seconds.values())
    if not total:
        return ""
    rows = [
        [f"{_dot(part)}{part}", MEANING[part], span(seconds[part]), percent(seconds[part] / total)]
        for part in PARTS
        if seconds[part] or part == "productive"
    ]
    rows.append(["all", "since the first process began", span(total), ""])
    advice = advise(events, seconds)
    steps = [line["perf/step_seconds"] for line in lines if line.get("perf/step_seconds")]
    said = f"<p class=soft>{_advice(advice, median(steps))}</p>" if advice and steps else ""
    head = ["time", "spent on", "", "share"]
    card = f"<div class=card>{_bar(seconds, total)}{table(head, rows, words=('spent on',))}</div>"
    return f"<h2>Goodput</h2>{said}{card}{_starts(events)}"


def _bar(seconds: Mapping[str, float], total: float) -> str:
    parts = "".join(
        f'<span title="{part} {percent(seconds[part] / total)}" '
        f'style="width:{100 * seconds[part] / total:.3f}%;background:var(--{COLORS[part]})"></span>'
        for part in PARTS
    )
    return f"<div class=shares>{parts}</div>"


def _starts(events: Sequence[Line]) -> str:
    """What each start took by part, the newest few."""
    starts = [event for event in events if event.get("event") in ("start", "resume") and "seconds" in event]
    if not starts:
        return ""
    rows = []
    for event in starts[-MOST_STARTS:]:
        parts = [event["seconds"].get(part, 0.0) for part in START]
        rows.append([f"step {event['step'] + 1}", *(f"{part:.1f}" for part in [*parts, sum(parts)])])
    card = f"<div class=card>{table(['from', *START, 'together'], rows)}</div>"
    return f"<p class=soft>Seconds from the start of a process to its training:</p>{card}"


def _advice(advice: Advice, step_seconds: float) -> str:
    def every(seconds: float) -> str:
        return f"{span(seconds)} ({max(1, round(seconds / step_seconds)):,} steps)"

    if advice.failures:
        between = f"{span(advice.between_failures)} between failures (measured, {advice.failures} so far)"
    else:
        between = (
            f"{span(advice.between_failures)} between failures (assumed, for there was none yet: one in "
            f"{DEVICE_HOURS_BETWEEN_FAILURES:,.0f} device hours)"
        )
    return (
        f"A save stops training for {advice.cost:.2f} s. With {between}, saving every {every(advice.young)} "
        f"loses least, {percent(advice.loss)} of the time (Young); to higher order every "
        f"{every(advice.daly)} (Daly)."
    )


def _dot(part: Part) -> str:
    return f'<span class=dot style="background:var(--{COLORS[part]})"></span>'
