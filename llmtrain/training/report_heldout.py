"""The section of report.html on held-out text: bits per byte by source, beside those of simple baselines."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmtrain.training.report_page import Chart, Trace, number, table
from llmtrain.training.words import short

BASELINES = {
    "model": "bits_per_byte",
    "token unigram": "unigram_bits_per_byte",
    "context shuffled": "shuffled_bits_per_byte",
}

HELD_OUT = (
    "Documents that were never trained on. The unigram baseline knows only how frequent each token is; "
    "with the context shuffled, the model itself sees the right tokens in the wrong order."
)


def heldout_section(
    heldout: Mapping[str, Any], dot: Callable[[str], str], draw: Callable[[Chart], str]
) -> str:
    """What the newest evaluation found, by source and against the baselines; empty before there is one."""
    sources = heldout.get("sources") or {}
    if not sources:
        return ""
    entries = {**sources, "all": heldout["all"]}
    bars = []
    for (name, key), color in zip(BASELINES.items(), ("accent", "soft", "soft"), strict=True):
        values = [entry.get(key) for entry in entries.values()]
        if any(value is not None for value in values):
            faint = name == "context shuffled"
            bars.append(Trace(name, list(entries), values, color, "bar", faint=faint))
    rows = [_row(name, entry, dot) for name, entry in entries.items()]
    head = ["source", *BASELINES, "against unigram", "loss a token", "bytes"]
    note = f"after step {heldout.get('step')}; lower is better"
    chart = draw(Chart("Bits per byte", note, bars, zero=True))
    return (
        f"<h2>Held-out text</h2><p class=soft>{HELD_OUT}</p>"
        f'<div class="cards uneven">{chart}<div class="card table">{table(head, rows)}</div></div>'
    )


def _row(name: str, entry: Mapping[str, Any], dot: Callable[[str], str]) -> list[str]:
    return [
        "all" if name == "all" else dot(name),
        *(number(entry.get(key), "{:.4f}".format) for key in BASELINES.values()),
        change(entry.get("bits_per_byte"), entry.get("unigram_bits_per_byte")),
        number(entry.get("loss"), "{:.4f}".format),
        number(entry.get("bytes"), short),
    ]


def change(value: float | None, reference: float | None) -> str:
    """`-12.3 %`: how far a value is from its reference."""
    if value is None or not reference:
        return "\N{EN DASH}"
    return f"{100 * (value / reference - 1):+.1f} %".replace("-", "\N{MINUS SIGN}")
