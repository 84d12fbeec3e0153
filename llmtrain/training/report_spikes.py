"""The section of report.html about steps that were not like the others, and the documents in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from llmtrain.training.report_page import number, table

Line = Mapping[str, Any]

MOST_STEPS = 50
MOST_DOCUMENTS = 8
"""Documents that a step's row shows, those of its worst rows; events.jsonl has more."""


def spikes_section(events: Sequence[Line], dot: Callable[[str], str]) -> str:
    """Spikes, steps that were left out, and rewinds; nothing where there are none.

    `dot` gives a source's name in its colour as HTML.
    """
    told = [event for event in events if event.get("event") in ("spike", "skip", "rewind")]
    if not told:
        return ""
    left_out = len(told) - MOST_STEPS
    note = f"<p class=soft>{NOTE}{f' The newest {MOST_STEPS} are shown.' if left_out > 0 else ''}</p>"
    head = ["step", "what", "loss", "z of it", "gradient norm", "z of it", "documents of the worst rows"]
    rows = [_rewind(one) if one["event"] == "rewind" else _step(one, dot) for one in told[-MOST_STEPS:]]
    words = ("what", "documents of the worst rows")
    return f"<h2>Spikes</h2>{note}<div class=card>{table(head, rows, words=words)}</div>"


NOTE = (
    "Steps that were left out because they were not finite, and those whose loss or gradient norm lay far "
    "above the steps before; z counts robust standard deviations."
)


def _step(event: Line, dot: Callable[[str], str]) -> list[str]:
    what = "not finite, left out" if event["event"] == "skip" else "spike"
    if event["event"] == "spike" and not event.get("applied", True):
        what = "spike, left out"
    numbers = [
        number(event.get(key), form)
        for key, form in (
            ("loss", "{:.4f}".format),
            ("loss_z", "{:.1f}".format),
            ("grad_norm", "{:.3g}".format),
            ("grad_norm_z", "{:.1f}".format),
        )
    ]
    chip = f'<span class="chip warn">{what}</span>'
    return [escape(str(event.get("step", ""))), chip, *numbers, _documents(event.get("rows") or (), dot)]


def _documents(rows: Sequence[Line], dot: Callable[[str], str]) -> str:
    """One line a row until there are enough documents: source, loss, and where the documents are."""
    lines, shown = list[str](), 0
    for row in rows:
        if shown >= MOST_DOCUMENTS:
            break
        places = [_place(document) for document in row["documents"][: MOST_DOCUMENTS - shown]]
        shown += len(places)
        loss = "not finite" if row["loss"] is None else f"{row['loss']:.4f}"
        lines.append(f"{dot(row['source'])}, row {row['row']}, {loss}: {escape(', '.join(places))}")
    return "<br>".join(lines)


def _place(document: Line) -> str:
    unit = "byte" if "byte" in document else "row"
    return f"{document['file']} {unit} {document.get(unit)}"


def _rewind(event: Line) -> list[str]:
    first, last = event["skip"]
    words = f"back to step {event['to']}; steps {first} to {last} of the data are left out from there on"
    dash = number(None, str)
    return [escape(str(event["step"])), '<span class="chip warn">rewind</span>', *[dash] * 4, escape(words)]
