"""Whether held-out text still gets better: every evaluation so far, and when to stop for it.

What counts is bits per byte of all sources together. A checkpoint keeps every evaluation of its history: a
run that goes on from it, after a kill or a rewind, stops after the step after which it would have stopped.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llmtrain.config.secrets import redact
from llmtrain.training.changes import Change, changes, other_text
from llmtrain.training.checkpoint import DamagedError, Score, read_record

if TYPE_CHECKING:
    from llmtrain.training.config import TrainConfig
    from llmtrain.training.run_directory import RunDirectory


class EarlyStop:
    """The evaluations of a run; `is_due` after `patience` in a row that were no better than the best before.

    Better is lower by more than `min_delta`. Without `patience` it is never due.
    """

    def __init__(self, patience: int | None, min_delta: float, scores: Iterable[Score] = ()) -> None:
        self._patience, self._min_delta = patience, min_delta
        self._waited = 0
        self.best: tuple[int, float] | None = None
        """The evaluation that none was better than."""
        self.scores: list[Score] = []
        for step, value in scores:
            self.add(step, value)

    def add(self, step: int, value: float | None) -> None:
        """Count the evaluation of a step; another one of the same step is none."""
        if self.has(step):
            return
        value = value if value is not None and math.isfinite(value) else None
        self.scores.append((step, value))
        if value is not None and (self.best is None or value < self.best[1] - self._min_delta):
            self.best, self._waited = (step, value), 0
        else:
            self._waited += 1

    def has(self, step: int) -> bool:
        """Whether the newest evaluation is that of `step`."""
        return bool(self.scores) and self.scores[-1][0] == step

    @property
    def is_due(self) -> bool:
        """Whether the run ends for want of better evaluations; all ranks say the same."""
        return self._patience is not None and self._waited >= self._patience


def has_stopped(config: TrainConfig, directory: RunDirectory, checkpoint: Path) -> bool:
    """Whether a run ended early at its checkpoint; one that is damaged, or of other held-out text, is no end.

    An evaluation that a stop cut short is made up for when the checkpoint stands already: an event has it.
    """
    if config.callbacks.evaluation.patience is None:
        return False
    try:
        saved = read_record(checkpoint)
    except DamagedError:
        return False
    if other_text(changes(saved, {**saved, "config": redact(config.model_dump(mode="json"))})):
        return False
    stop = early_stop_of(config, saved)
    for event in reversed(directory.read_events()):
        if event["event"] == "evaluation" and event["step"] == saved["step"]:
            stop.add(event["step"], event["bits_per_byte"])
    return stop.is_due


def early_stop_of(config: TrainConfig, saved: Mapping[str, Any], changed: Sequence[Change] = ()) -> EarlyStop:
    """What the evaluations so far come to; of other text than today's they do not count."""
    evaluation = config.callbacks.evaluation
    scores = saved.get("scores", ()) if not other_text(changed) else ()
    return EarlyStop(evaluation.patience, evaluation.min_delta, scores)
