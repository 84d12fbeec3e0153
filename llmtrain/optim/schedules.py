"""Learning-rate schedules: pure functions of the step, so that resuming needs no state.

A schedule maps a step (1-based, as everywhere outside the data engine) to a factor of the peak learning
rate. Warm-up is linear and ends at the peak; intervals longer than the run are clipped to it, so that
`max_steps` can be lowered alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Annotated, Literal

from pydantic import Field

from llmtrain.config import Config

Schedule = Callable[[int], float]
Ratio = Annotated[float, Field(ge=0, le=1)]


class SchedulerConfig(Config):
    """Base of every schedule: a linear warm-up over `warmup_steps`, then the subclass's own `decay`."""

    warmup_steps: Annotated[int, Field(ge=0)]

    def build(self, max_steps: int) -> Schedule:
        """The factor of the peak learning rate as a function of the step, 1 to `max_steps`."""
        warmup = min(self.warmup_steps, max_steps)

        def factor(step: int) -> float:
            if step <= warmup:
                return step / warmup
            return self.decay((step - warmup) / (max_steps - warmup) if max_steps > warmup else 1.0)

        return factor

    def decay(self, progress: float) -> float:
        """Factor after warm-up; `progress` runs from just above 0 to 1 at the last step."""
        raise NotImplementedError


class CosineConfig(SchedulerConfig):
    """Half a cosine from the peak down to `min_lr_ratio` of it (Loshchilov and Hutter 2017)."""

    kind: Literal["cosine"]
    min_lr_ratio: Ratio

    def decay(self, progress: float) -> float:
        return self.min_lr_ratio + (1 - self.min_lr_ratio) * 0.5 * (1 + math.cos(math.pi * progress))


class LinearConfig(SchedulerConfig):
    """A straight line from the peak down to `min_lr_ratio` of it."""

    kind: Literal["linear"]
    min_lr_ratio: Ratio

    def decay(self, progress: float) -> float:
        return 1 - (1 - self.min_lr_ratio) * progress


class ConstantConfig(SchedulerConfig):
    """The peak until the end."""

    kind: Literal["constant"]

    def decay(self, progress: float) -> float:
        return 1.0


class WsdConfig(SchedulerConfig):
    """Warm-up, stable, decay (Hu et al. 2024, MiniCPM): the peak, then a line down over the last part.

    `decay_ratio` is the part of the steps after warm-up in which the rate falls to `min_lr_ratio`.
    """

    kind: Literal["wsd"]
    decay_ratio: Ratio
    min_lr_ratio: Ratio

    def decay(self, progress: float) -> float:
        stable = 1 - self.decay_ratio
        if progress <= stable:
            return 1.0
        return 1 - (1 - self.min_lr_ratio) * (progress - stable) / self.decay_ratio
