"""What the proofs found, as Markdown."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmtrain.benchmarks import measure

Found = Mapping[str, Any]


def markdown(report: Found) -> str:
    """The tables of all proofs that were run."""
    return "\n\n".join(table(report[name]) for name, table in TABLES.items() if name in report)


def _kills(found: Found) -> str:
    headings = (
        "run",
        "kills",
        "in a save",
        "steps lost",
        "steps compared",
        "batches compared",
        "differ",
        "orphans",
    )
    rows = [
        (
            name, sum(tally["kills"].values()), tally["mid_save"], tally["lost_steps"], tally["steps"],
            tally["batches"], len(tally["differences"]), tally["orphans"],
        )
        for name, tally in found.items()
    ]  # fmt: skip
    totals = [sum(row[column] for row in rows) for column in range(1, len(headings))]
    return measure.markdown(headings, [*rows, ("all", *totals)])


def _stock(found: Found) -> str:
    rows = [(found["mid_save_kills"], found["unresumable"])]
    return measure.markdown(("kills in a save of DeepSpeed's", "runs that cannot go on"), rows)


def _damage(found: Found) -> str:
    detection, loads = found["detection"], found["torch.load"]["kinds"]
    rows = []
    for kind, tried in detection["kinds"].items():
        missed = sum(text.startswith(kind) for text in detection["loaded"])
        stock = loads.get(kind, {})
        silent = f"{stock.get('silent', 0)} of {sum(stock.values())}" if stock else "-"
        rows.append((kind, tried, tried - missed, missed, silent))
    table = measure.markdown(("damage", "tried", "detected", "loaded", "torch.load: silent"), rows)
    back = found["fall_back"]
    runs = f"{back['bit_equal']} of {back['runs']}"
    return f"{table}\n\nReal runs that went on from the checkpoint before, bit-equal: {runs}."


def _recovery(found: Found) -> str:
    parts = [part for part in found if part != "relaunches"]
    return measure.markdown([f"{part}, s" for part in parts], [[f"{found[part]:.2f}" for part in parts]])


TABLES: dict[str, Callable[[Found], str]] = {
    "kills": _kills,
    "stock": _stock,
    "damage": _damage,
    "recovery": _recovery,
}
