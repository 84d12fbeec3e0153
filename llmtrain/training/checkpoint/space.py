"""Room on the disk for the checkpoints that a run will write."""

from __future__ import annotations

import shutil
from pathlib import Path

from llmtrain import distributed
from llmtrain.config import UserError
from llmtrain.training.checkpoint.config import CheckpointConfig
from llmtrain.training.checkpoint.directory import checkpoints
from llmtrain.training.places import existing


def free_bytes(directory: Path) -> int:
    """Bytes that may be written in `directory`, which need not be there yet."""
    return shutil.disk_usage(existing(directory)).free


def most_at_a_time(config: CheckpointConfig, *, evaluated: bool) -> int:
    """Checkpoints that may stand beside those that stay for ever: the newest, the best, one under way."""
    return config.keep + 1 + evaluated


def check_space(directory: Path, size: int, config: CheckpointConfig, *, evaluated: bool) -> None:
    """UserError where checkpoints of `size` bytes, as many as a run keeps at a time, will not fit.

    Those that stand already count as room, as they go when newer ones come. `evaluated`: one may be kept as
    the best. Collective: rank 0 looks, and all ranks say the same.
    """
    free, there = distributed.broadcast_object((free_bytes(directory), len(checkpoints(directory))))
    coming = max(1, most_at_a_time(config, evaluated=evaluated) - there)
    if coming * size > free:
        raise UserError(
            f"checkpoint.keep={config.keep}: {coming} checkpoints of {size:,} bytes need {coming * size:,} "
            f"bytes in {directory}, where {free:,} are free; make room, or choose another output_dir"
        )
