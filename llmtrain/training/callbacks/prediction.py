"""What was predicted of a run's speed and memory beside what it measures, once."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch

from llmtrain.training.callbacks.base import Callback
from llmtrain.training.clock import Laps
from llmtrain.training.sizing.choose import GIB
from llmtrain.training.sizing.hardware import device_name
from llmtrain.training.sizing.memory import Layout, memory
from llmtrain.training.sizing.model import Model
from llmtrain.training.sizing.speed import step_time

if TYPE_CHECKING:
    from llmtrain.distributed import World
    from llmtrain.training.callbacks.base import Run
    from llmtrain.training.config import TrainConfig
    from llmtrain.training.engine.config import ResolvedPrecision

logger = logging.getLogger(__name__)

WARM_UP, STEPS = 10, 20
"""Steps of this process: by the first compilation and allocation are over, after the second it is told."""


class PredictionCallback(Callback):
    """Writes the event `prediction` after 20 steps of this process; logs it where both sides are known.

    What is measured are steps 11 to 20 themselves, without what lies between them.
    """

    def __init__(
        self, config: TrainConfig, world: World, vocab_size: int, precision: ResolvedPrecision
    ) -> None:
        model = Model.of(config, vocab_size)
        layout = Layout.of(config, world.world_size, precision)
        device = device_name()
        hardware = config.hardware.resolve(device)
        self._unknown = hardware.name if device is None else device
        self._time = step_time(model, layout, hardware)
        self._peak_known = hardware.peak_flops is not None
        self._memory = memory(model, layout)
        self._tokens = config.global_batch_size * config.seq_len
        self._first = 0
        self._warm = Laps()

    def on_start(self, run: Run) -> None:
        """Say where nothing can be predicted, and so no MFU told."""
        self._first = run.step
        if not self._peak_known and run.world.is_main and torch.cuda.is_available():
            logger.info(
                f"hardware={run.config.hardware.name}: the peak of {self._unknown} is not known, so there is "
                "no perf/mfu and no prediction; name one of conf/hardware, or set hardware.bf16_tflops"
            )

    def is_due(self, run: Run, step: int) -> bool:
        return step - self._first in (WARM_UP, STEPS)

    def after_step(self, run: Run, line: dict[str, Any]) -> None:
        if run.step - self._first == WARM_UP:
            self._warm = run.clock.total
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            return
        seconds = run.clock.total.step_since(self._warm)
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
        predicted = self._time.step if self._time else None
        if not run.world.is_main:
            return
        run.directory.append_event(
            "prediction",
            step=run.step,
            predicted_seconds=predicted,
            measured_seconds=seconds,
            predicted_tokens_per_second=self._tokens / predicted if predicted else None,
            measured_tokens_per_second=self._tokens / seconds,
            predicted_memory=self._memory.total,
            measured_memory=peak,
        )
        if words := self._words(predicted, seconds, peak):
            logger.info(words)

    def _words(self, predicted: float | None, seconds: float, peak: int | None) -> str:
        """What was predicted and can be measured here: on a CPU nothing."""
        pairs = [
            ("tokens/s", predicted and self._tokens / predicted, self._tokens / seconds, 0),
            ("ms a step", predicted and predicted * 1000, seconds * 1000, 1),
            ("GiB at the peak", self._memory.total / GIB, peak and peak / GIB, 2),
        ]
        return "; ".join(
            f"{expected:,.{digits}f} {unit} predicted, {measured:,.{digits}f} measured"
            for unit, expected, measured, digits in pairs
            if expected is not None and measured is not None
        )
