"""How long steps take, on the clock of the device that computes them."""

from __future__ import annotations

import torch

from llmtrain.training.engine.transfer import Moment


class StepClock:
    """Seconds a step, from the end of one to the end of another."""

    def __init__(self, device: torch.device, step: int) -> None:
        self._device, self._step = device, step
        self._since = Moment(device)

    def restart(self, step: int) -> None:
        """Count from now, after `step`: what was done since the last step is no part of any."""
        self._step, self._since = step, Moment(self._device)

    def lap(self, step: int, done: Moment) -> float:
        """Seconds a step since the last lap or restart; `step` was over at `done`, which has come."""
        seconds = done.seconds_since(self._since) / (step - self._step)
        self._step, self._since = step, done
        return seconds
