"""Try a run before it is paid for: text, tokenizer, memory, disk, then one real step, saved and loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

from llmtrain.config.door import sigterm_is_like_ctrl_c
from llmtrain.config.hydra import hydra_door
from llmtrain.training import train_config

if TYPE_CHECKING:
    from llmtrain.training.config import TrainConfig


def check(config: TrainConfig) -> None:
    """Look at everything, a line each; a group with mistakes ends it with 78 and all of them.

    The run directory is left as it is; text that was prepared stays in the cache, where the run finds it.
    """
    from llmtrain import distributed
    from llmtrain.training.launcher import tell_supervisor
    from llmtrain.training.preflight import (
        Report,
        check_disk,
        check_epochs,
        check_memory,
        check_rewinds,
        check_samples,
        open_tokenizer,
        plan_text,
        start_notes,
        tokenizer_notes,
    )
    from llmtrain.training.sizing.model import Model
    from llmtrain.training.trial import trial

    world = distributed.World.from_environment()
    report = Report(world)
    report.look("start", lambda: start_notes(config, world))
    report.end_group()
    tokenizer = open_tokenizer(config)
    report.look("tokenizer", lambda: tokenizer_notes(config, tokenizer))
    model = Model.of(config, tokenizer.vocab_size)
    report.look("memory", lambda: [check_memory(config, world, model)])
    report.end_group()
    report.look("disk", lambda: [check_disk(config, model)])
    report.look("rewind", lambda: check_rewinds(config))
    report.end_group()
    plan = plan_text(config, tokenizer)
    report.look("text", lambda: check_epochs(plan))
    report.look("sample", lambda: check_samples(config, tokenizer))
    report.end_group()
    distributed.initialize(world)
    trial(config, world, tokenizer, plan, report)
    distributed.finalize()
    if world.local_rank == 0:
        tell_supervisor(None, done=True)


def main(argv: list[str] | None = None) -> int:
    """The door of `llmtrain check`, `python -m llmtrain.check` and `deepspeed --module llmtrain.check`."""
    with sigterm_is_like_ctrl_c():
        return hydra_door(train_config, check, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
