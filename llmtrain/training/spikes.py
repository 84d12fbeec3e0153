"""Steps that are not like those before them: robust z-scores of the log loss and the log gradient norm.

z(x) = (log x - median) / max(1.4826 MAD, MIN_SCALE) over a window of steps, where MAD is the median
absolute deviation from the median (Leys et al. 2013); 1.4826 MAD of normal values is a standard deviation.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from statistics import median
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field

from llmtrain.config import Config
from llmtrain.training.engine.guard import Limits
from llmtrain.training.engine.transfer import StepResult

NORMAL = 1.4826
"""Standard deviations in a MAD of normal values."""

MIN_SCALE = 0.005
"""Values of a window count as spread by so much at least: half a percent of the loss."""

Threshold = Annotated[float, Field(gt=0)] | None


class SpikeConfig(Config):
    """Which step is a spike, and what is done about it."""

    action: Literal["log", "skip", "rewind"]
    loss_threshold: Threshold
    grad_norm_threshold: Threshold
    window: Annotated[int, Field(ge=8)]
    warmup_steps: Annotated[int, Field(ge=0)]
    rewind_steps: Annotated[int, Field(gt=0)]
    skip_steps: Annotated[int, Field(gt=0)]
    max_rewinds: Annotated[int, Field(ge=0)]
    max_skipped: Annotated[int, Field(ge=2)]


class Verdict(NamedTuple):
    """What a step was."""

    kind: Literal["", "skip", "spike"] = ""
    """skip: left out because it was not finite; spike: above a threshold, applied or not."""
    loss_z: float | None = None
    """None while there is nothing to compare with."""
    grad_norm_z: float | None = None


class _Scale(NamedTuple):
    """How the logarithms of a window lie."""

    center: float
    spread: float

    @classmethod
    def of(cls, values: Sequence[float]) -> _Scale:
        center = median(values)
        mad = median(abs(value - center) for value in values)
        return cls(center, max(NORMAL * mad, MIN_SCALE))

    def z(self, value: float) -> float:
        return (_log(value) - self.center) / self.spread

    def limit(self, threshold: Threshold) -> float:
        """The value of which z is the threshold."""
        return math.inf if threshold is None else math.exp(self.center + threshold * self.spread)


class SpikeDetector:
    """Judges each step by those before it: a pure function of the losses and norms of the steps applied.

    The step just before is not among them: it may still be computed when one has to be judged. Before
    `warmup_steps` are over and the window is full, no step is a spike. `saved` is the `state` to go on from.
    """

    def __init__(self, config: SpikeConfig, saved: Iterable[Sequence[Any]] = ()) -> None:
        self.config = config
        self._past = deque(((int(s), float(loss), float(norm)) for s, loss, norm in saved), config.window + 1)
        """Step, log loss and log norm of the newest steps that were applied."""

    def limits(self, step: int) -> Limits | None:
        """What a step must not exceed in order to be applied; None where the action is not skip."""
        scales = self._scales(step) if self.config.action == "skip" else None
        if scales is None:
            return None
        loss, norm = scales
        return Limits(loss.limit(self.config.loss_threshold), norm.limit(self.config.grad_norm_threshold))

    def judge(self, step: int, result: StepResult) -> Verdict:
        """What a step was; steps come in their order, each once."""
        verdict = self._judge(step, result)
        if result.applied and _is_finite(result):
            self._past.append((step, _log(result.loss), _log(result.grad_norm)))
        return verdict

    def state(self) -> list[list[float]]:
        """The steps to judge the next one by: rows of step, log loss and log norm."""
        return [list(row) for row in self._past]

    def _judge(self, step: int, result: StepResult) -> Verdict:
        if not _is_finite(result):
            return Verdict("" if result.applied else "skip")
        scales = self._scales(step)
        if scales is None:
            return Verdict()
        z, norm_z = scales[0].z(result.loss), scales[1].z(result.grad_norm)
        spike = _above(z, self.config.loss_threshold) or _above(norm_z, self.config.grad_norm_threshold)
        if self.config.action == "skip":
            spike = not result.applied
        return Verdict("spike" if spike else "", z, norm_z)

    def _scales(self, step: int) -> tuple[_Scale, _Scale] | None:
        """Of the log losses and the log norms that a step is compared with."""
        rows = [row for row in self._past if row[0] < step - 1][-self.config.window :]
        if step <= self.config.warmup_steps or len(rows) < self.config.window:
            return None
        return _Scale.of([loss for _, loss, _ in rows]), _Scale.of([norm for *_, norm in rows])


def _is_finite(result: StepResult) -> bool:
    return math.isfinite(result.loss) and math.isfinite(result.grad_norm)


def _above(z: float, threshold: Threshold) -> bool:
    return threshold is not None and z > threshold


def _log(value: float) -> float:
    """The logarithm; of nothing, that of the smallest number."""
    return math.log(max(value, math.ulp(0.0)))
