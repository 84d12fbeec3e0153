"""What a run's files say that are no curves: what the model wrote, and the mixture, as rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from llmtrain.training.report_samples import MOST_SAMPLES, read_samples, sample_files, spread, step_of
from llmtrain.training.run_directory import RunDirectory


@dataclass(frozen=True)
class Table:
    """Rows of numbers, texts and None under named columns."""

    columns: tuple[str, ...]
    rows: list[list[Any]]


def samples_table(directory: RunDirectory) -> Table | None:
    """What the model wrote, a row a prompt and step, of at most a dozen steps; None where there is none."""
    files = spread(sample_files(directory.samples), MOST_SAMPLES)
    rows = [[step_of(file), prompt, text] for file in files for prompt, text in read_samples(file)]
    return Table(("step", "prompt", "continuation"), rows) if rows else None


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
