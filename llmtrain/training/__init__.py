"""The run: engine, loop, checkpoints, callbacks, loggers and report."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from llmtrain.training.config import TrainConfig


def train_config() -> type[TrainConfig]:
    """The class of the root config. Imported when asked for: torch comes with it, `--help` does without."""
    from llmtrain.training.config import TrainConfig

    return TrainConfig
