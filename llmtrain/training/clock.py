"""How long steps take, on the clock of the device that computes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from llmtrain.training.engine.transfer import Moment


class StepClock:
    """Seconds a step, from the end of one to the end of another."""

    def __init__(self, device: torch.device, step: int) -> None:
        self._device, self._step = device, step
        self._since = Moment(device)
        self.total = Laps()

    def restart(self, step: int) -> None:
        """Count from now, after `step`: what was done since the last step is no part of any."""
        self._step, self._since = step, Moment(self._device)

    def lap(self, step: int, done: Moment) -> float:
        """Seconds a step since the last lap or restart; `step` was over at `done`, which has come."""
        lap = Laps(step - self._step, done.seconds_since(self._since))
        self.total = Laps(self.total.steps + lap.steps, self.total.seconds + lap.seconds)
        self._step, self._since = step, done
        return lap.seconds / lap.steps


@dataclass(frozen=True)
class Laps:
    """Steps that were counted, and the seconds they took; nothing between them."""

    steps: int = 0
    seconds: float = 0.0

    def step_since(self, earlier: Laps) -> float:
        """Seconds a step of those that were counted later than `earlier`, of which there must be one."""
        return (self.seconds - earlier.seconds) / (self.steps - earlier.steps)
