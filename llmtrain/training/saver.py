"""The saver of a run: what it saves is told in events.jsonl, what it cannot save on the console too."""

from __future__ import annotations

import logging
from pathlib import Path

from llmtrain.distributed import World
from llmtrain.training.checkpoint import CheckpointConfig, Failed, Saved, Saver, mark_best
from llmtrain.training.heartbeat import Heart
from llmtrain.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)


def build_saver(
    config: CheckpointConfig,
    world: World,
    directory: RunDirectory,
    heart: Heart,
    *,
    checkpoint: Path | None,
    step: int,
) -> Saver:
    """The run's saver; it knows that `checkpoint`, of `step`, is whole, if that is the run's own."""
    own = checkpoint is not None and directory.owns(checkpoint)

    def on_saved(saved: Saved) -> None:
        directory.append_event(
            "save",
            step=saved.step,
            path=saved.path.name,
            seconds=saved.seconds,
            bytes=saved.bytes,
            stall_seconds=saved.stall_seconds,
        )
        mark_best(directory, saved.scores)

    def on_failed(failed: Failed) -> None:
        if world.is_main:
            directory.append_event(
                "save_failed", step=failed.step, reason=failed.reason, needed=failed.needed, free=failed.free
            )
            logger.warning("%s", failed)

    return Saver(
        directory.checkpoints,
        config,
        world,
        on_saved=on_saved,
        on_failed=on_failed,
        verified={step} if own else (),
        tick=lambda: heart.beat("save"),
    )
