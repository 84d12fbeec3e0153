"""The best checkpoint: of those that are there and were evaluated, the one whose held-out text took least.

`<run>/best.json` names it for everybody: {"step", "path", "measure", "value"}. The run keeps that checkpoint,
and writes the file anew with every checkpoint and at every start.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence

from llmtrain.config import UserError
from llmtrain.training.checkpoint.directory import checkpoints
from llmtrain.training.run_directory import RunDirectory, disk_may_refuse

FILE = "best.json"
MEASURE = "eval/bits_per_byte"
"""Of all sources together; lower is better."""

Score = tuple[int, float | None]
"""A step, and what held-out text took after it; None: not finite, or there was nothing to measure."""


def best_of(scores: Iterable[Score], steps: Container[int]) -> tuple[int, float] | None:
    """The lowest score of one of these steps, the earliest of equal ones, or None."""
    known = [(step, value) for step, value in scores if step in steps and value is not None]
    return min(known, key=lambda score: (score[1], score[0]), default=None)


def mark_best(directory: RunDirectory, scores: Sequence[Score]) -> None:
    """Write `best.json` for the checkpoints that there are, or remove it; only rank 0."""
    there = dict(checkpoints(directory.checkpoints))
    best = best_of(scores, there)
    with disk_may_refuse():
        if best is None:
            (directory.path / FILE).unlink(missing_ok=True)
            return
        step, value = best
        path = there[step].relative_to(directory.path)
        directory.write_json(FILE, {"step": step, "path": path, "measure": MEASURE, "value": value})


def best_step(directory: RunDirectory) -> int | None:
    """The step of the best checkpoint as the run marked it; None where no checkpoint was evaluated."""
    found = directory.read_json(FILE)
    if found is None:
        return None
    step = found.get("step") if isinstance(found, dict) else None
    if not isinstance(step, int):
        raise UserError(f"{directory.path / FILE}: not what llmtrain wrote: it names no step; remove it")
    return step if step in dict(checkpoints(directory.checkpoints)) else None
