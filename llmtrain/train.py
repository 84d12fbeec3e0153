"""Train a decoder on a mixture of sources; goes on from the newest checkpoint if there is one."""

from __future__ import annotations

from contextlib import ExitStack, closing
from functools import partial
from typing import TYPE_CHECKING

from llmtrain.config import ExitCode
from llmtrain.config.hydra import hydra_door
from llmtrain.importing import signals_end_it
from llmtrain.training import train_config
from llmtrain.training.launcher import (
    launchers,
    tell_code,
    tell_nothing_is_lost,
    tell_nothing_is_lost_yet,
    tell_supervisor,
)

if TYPE_CHECKING:
    from llmtrain.distributed import World
    from llmtrain.training.config import TrainConfig
    from llmtrain.training.signals import StopRequest


def train(config: TrainConfig) -> int:
    """Stop in an orderly way when asked to; tell the launch script of the run."""
    from llmtrain import distributed
    from llmtrain.training.requeue import same_job_goes_on
    from llmtrain.training.signals import StopRequest

    config = same_job_goes_on(config)
    world = distributed.World.from_environment()
    leaving = partial(tell_nothing_is_lost_yet, world.local_world_size)
    stop = StopRequest(config.grace_seconds, config.time_limit, leaving)
    with stop.listening(launchers()):
        if world.local_rank == 0:
            tell_supervisor(config.output_dir, config.grace_seconds)
        code = _train(config, world, stop)
        if world.local_rank == 0 and code == ExitCode.OK:
            tell_supervisor(config.output_dir, config.grace_seconds, done=True)
        if code == ExitCode.PREEMPTED:
            tell_nothing_is_lost()
    return code


def _train(config: TrainConfig, world: World, stop: StopRequest) -> int:
    """Build every part in the order data flows, resume if there is a checkpoint, run the loop."""
    from llmtrain import distributed
    from llmtrain.config.door import exit_code_of
    from llmtrain.data.prepare import prepare
    from llmtrain.training.build import build_run, check_job, is_done, open_run, tokenizer_of
    from llmtrain.training.heartbeat import Heart
    from llmtrain.training.preflight import preflight
    from llmtrain.training.trainer import begin, finish, fit
    from llmtrain.training.watchdog import longest_wait, watched

    heart = Heart()
    tick = partial(heart.beat, "prepare")
    check_job(config, world)
    if is_done(config):
        return ExitCode.OK
    distributed.initialize(world, longest_wait(config.hang_timeout))
    with ExitStack() as ends:
        directory = open_run(config, world)
        ends.callback(directory.unlock)
        watch = watched(directory, world, heart, config.hang_timeout, goes_on=config.resume != "never")
        run_begins = ends.enter_context(watch)
        with distributed.patience():
            tick()
            prepared = prepare(
                config.data,
                tokenizer_of(config),
                config.cache_dir,
                background=config.data.prepares_in_background,
                workers=config.data.workers,
                world=world,
                tick=tick,
            )
            ends.enter_context(closing(prepared))
            preflight(config, world, prepared.tokenizer, tick)
            distributed.barrier()
        run = build_run(config, world, directory, prepared, stop, heart)
        ends.push(lambda kind, error, trace: run.loggers.close(exit_code_of(error)))
        run_begins()
        begin(run)
        fit(run)
        code = finish(run)
        distributed.finalize()
    return code


def main(argv: list[str] | None = None) -> int:
    """The door of `llmtrain train`, `python -m llmtrain.train` and `deepspeed --module llmtrain.train`."""
    launchers()
    with signals_end_it(ExitCode.PREEMPTED):
        code = hydra_door(train_config, train, __doc__, argv)
    tell_code(code)
    from llmtrain import distributed

    distributed.leave_failed(code)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
