"""What a run's files say that are no curves: what the model wrote, and the mixture, as rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmtrain.training.report_samples import read_samples
from llmtrain.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Table:
    """Rows of numbers, texts and None under named columns."""

    columns: tuple[str, ...]
    rows: list[list[Any]]


def samples_table(directory: RunDirectory, step: int, tokens: int | None) -> Table | None:
    """What the model wrote after a step, a row a prompt; None where it wrote nothing."""
    file = directory.samples / f"step_{step:08d}.txt"
    if not file.exists():
        return None
    rows = [[step, tokens, prompt, text] for prompt, text in read_samples(file)]
    return Table(("step", "tokens", "prompt", "continuation"), rows)


def mixture_table(directory: RunDirectory) -> Table | None:
    """The newest data.json, a row a source; shares are parts of 1. None where there is none."""
    sources = (directory.read_json(directory.data.name) or {}).get("sources", {})
    if not sources:
        return None
    whole = sum(entry["weight"] for entry in sources.values()) or 1
    rows = [
        [name, entry["weight"] / whole, *(entry.get(key) for key in ("share", "trained", "epochs", "loss"))]
        for name, entry in sources.items()
    ]
    return Table(("source", "asked", "realised", "tokens", "epochs", "loss"), rows)
