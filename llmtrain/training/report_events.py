"""Events in report.html: a table of them, how many there were, marks on curves, and what saves took."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from llmtrain.training.report_page import Trace, table

MOST_EVENTS = 200
FIRST_EVENTS = 20
"""Of more events than MOST_EVENTS, the first few and the newest are shown."""

MOST_MARKS = 12

MARKS = {
    "resume": "resumed",
    "skip": "left out",
    "spike": "spike",
    "rewind": "rewound",
    "early_stop": "stopped early",
}
"""Events that the loss curve shows, and as what."""

WARNINGS = (
    "warning", "skip", "spike", "rewind", "signal", "hang", "crash", "corruption", "rejected",
    "save_failed",
)  # fmt: skip
TOLD_ELSEWHERE = ("time", "event", "step", "rows")
"""Of an event: in columns and sections of their own."""

Line = Mapping[str, Any]


def events_section(events: Sequence[Line]) -> str:
    """How many there were of each kind, and the table; empty where there are none."""
    if not events:
        return ""
    kinds = Counter(str(event.get("event", "")) for event in events)
    counts = "".join(f"<li>{_chip(kind)} {number:,}</li>" for kind, number in kinds.most_common())
    rows = [_row(event) for event in events]
    if len(rows) > MOST_EVENTS:
        left_out = len(rows) - MOST_EVENTS
        gap = ["…", "", "", f"{left_out} more in events.jsonl"]
        rows = [*rows[:FIRST_EVENTS], gap, *rows[FIRST_EVENTS + left_out :]]
    head = ["time (UTC)", "step", "event", "details"]
    body = table(head, rows, words=("event", "details"))
    return f'<h2>Events</h2><ul class=counts>{counts}</ul><div class="card tall">{body}</div>'


def event_marks(events: Sequence[Line]) -> list[dict[str, Any]]:
    """Where the run was taken up again, or was not as ever; the newest few, if that happened often.

    What happened at one step stands in one mark.
    """
    marked: dict[int, dict[str, None]] = {}
    for event in events:
        if event.get("event") in MARKS and isinstance(event.get("step"), int):
            marked.setdefault(event["step"], {})[MARKS[event["event"]]] = None
    newest = sorted(marked.items())[-MOST_MARKS:]
    return [{"x": step, "text": f" {', '.join(texts)}"} for step, texts in newest]


def save_traces(events: Sequence[Line]) -> list[Trace]:
    """What each save took until it was there, and how long training stood still where that is less."""
    saves = {event["step"]: event for event in events if event.get("event") == "save" and "seconds" in event}
    if not saves:
        return []
    steps = sorted(saves)
    there, stood = ([saves[step].get(key) for step in steps] for key in ("seconds", "stall_seconds"))
    trace = Trace("until it was there", steps, there, "c0", dots=True)
    return (
        [trace] if stood == there else [trace, Trace("training stood still", steps, stood, "c1", dots=True)]
    )


def _row(event: Line) -> list[str]:
    """A row of the table, as HTML."""
    time = str(event.get("time", "")).replace("T", " ")[:19]
    details = [f"{key} {_plain(value)}" for key, value in event.items() if key not in TOLD_ELSEWHERE]
    return [
        escape(time),
        escape(str(event.get("step", ""))),
        _chip(str(event.get("event", ""))),
        escape(" · ".join(details)),
    ]


def _chip(kind: str) -> str:
    look = "warn" if kind in WARNINGS else "good" if kind == "end" else ""
    return f'<span class="chip {look}">{escape(kind)}</span>'


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(inner)}" for key, inner in value.items())
    if isinstance(value, float):
        return f"{value:.5g}"
    return "none" if value is None else str(value)
