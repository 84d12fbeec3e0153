"""Train a decoder on a mixture of sources; goes on from the newest checkpoint if there is one."""

from __future__ import annotations

from contextlib import closing
from typing import TYPE_CHECKING

from llmtrain.config.hydra import hydra_door
from llmtrain.training import train_config

if TYPE_CHECKING:
    from llmtrain.training.config import TrainConfig


def train(config: TrainConfig) -> int:
    """Build every part in the order data flows, resume if there is a checkpoint, run the loop."""
    from llmtrain import distributed
    from llmtrain.data.prepare import prepare
    from llmtrain.training.build import build_run, check_start, is_done, open_run, tokenizer_of
    from llmtrain.training.heartbeat import Heart
    from llmtrain.training.trainer import begin, finish, fit
    from llmtrain.training.watchdog import longest_wait, watched

    heart = Heart()
    world = distributed.World.from_environment()
    check_start(config, world)
    if is_done(config):
        return 0
    heart.beat("prepare")
    background = config.data.prepares_in_background
    prepared = prepare(
        config.data,
        tokenizer_of(config),
        config.cache_dir,
        background=background,
        workers=config.data.workers,
    )
    with closing(prepared):
        directory = open_run(config, world)
        distributed.initialize(world, longest_wait(config.hang_timeout))
        with watched(directory, world, heart, config.hang_timeout, goes_on=config.resume != "never"):
            run = build_run(config, world, directory, prepared, heart)
            begin(run)
            fit(run)
            code = finish(run)
            distributed.finalize()
    return code


def main(argv: list[str] | None = None) -> int:
    """The door of `llmtrain train`, `python -m llmtrain.train` and `deepspeed --module llmtrain.train`."""
    return hydra_door(train_config, train, __doc__, argv)


if __name__ == "__main__":
    raise SystemExit(main())
