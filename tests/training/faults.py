"""Faults of hardware, put into a rank before it trains (PATCH of tests/ranks.py)."""

from __future__ import annotations

import errno
import os
import resource
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmtrain.config import UserError, door
from llmtrain.data.batch import Batch
from llmtrain.data.workers import Crew, Job
from llmtrain.training.engine.engine import Engine
from llmtrain.training.heartbeat import Heart, Phase
from llmtrain.training.run_directory import RunDirectory
from tests.training.wandb_files import offline_files, step_numbers

STEP = "LLMTRAIN_TEST_FAULT_STEP"
"""The step after which the fault comes."""
WHERE = "LLMTRAIN_TEST_FAULT_WHERE"
"""The parameter that is hit; `optimizer` before it: in its first moment."""


def flip_a_bit() -> None:
    """One bit of one element of what rank 1 holds turns over, between a step and what comes after it."""
    if os.environ["RANK"] == "1":
        _after_step(_flip)


def compute_wrongly() -> None:
    """From a step on, rank 1 is off by the last bit in every loss that it computes without gradient."""
    if os.environ["RANK"] == "1":
        _after_step(lambda engine: _perturb(engine, always=True))


def compute_unsteadily() -> None:
    """From a step on, rank 1 is off by the last bit in every other loss."""
    if os.environ["RANK"] == "1":
        _after_step(lambda engine: _perturb(engine, always=False))


def spoil() -> None:
    """From a step on, what rank 1 computes is not finite."""
    if os.environ["RANK"] == "1":
        _after_step(
            lambda engine: engine.model.final_norm.register_forward_hook(
                lambda module, inputs, output: output * float("nan")
            )
        )


def die() -> None:
    """Every rank is killed after a step was given to its device."""
    _after_step(lambda engine: os.kill(os.getpid(), signal.SIGKILL))


def be_stopped() -> None:
    """SIGTERM comes after a step was given to the device."""
    _after_step(lambda engine: os.kill(os.getpid(), signal.SIGTERM))


def die_recorded() -> None:
    """Every rank is killed after a step, once wandb's file has the lines of all steps before it."""

    def fault(_: Engine) -> None:
        (run,) = Path.cwd().glob("*/metrics.jsonl")
        while len(run.read_text().splitlines()) > sum(map(len, map(step_numbers, offline_files(run.parent)))):
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGKILL)

    _after_step(fault)


def _after_step(fault) -> None:
    train_step, done = Engine.train_step, [0]

    def step_and_fault(self: Engine, *arguments, **named):
        pending = train_step(self, *arguments, **named)
        done[0] += 1
        if done[0] == int(os.environ[STEP]):
            fault(self)
        return pending

    Engine.train_step = step_and_fault


def _flip(engine: Engine) -> None:
    kind, _, name = os.environ[WHERE].rpartition(" ")
    (parameter,) = [p for found, p in engine.model.named_parameters() if name == found]
    held = engine.deepspeed.optimizer.state[parameter]["exp_avg"] if kind == "optimizer" else parameter.data
    if held.numel() != getattr(parameter, "ds_numel", held.numel()):  # stage 3: all but its own part is gone
        held = parameter.ds_tensor.data
    bits = held.view(-1).view({2: torch.int16, 4: torch.int32}[held.element_size()])
    bits[len(bits) // 2] ^= 1


def _perturb(engine: Engine, always: bool) -> None:
    loss, calls = Engine.loss, [0]

    def wrong(self: Engine, batch: Batch) -> torch.Tensor:
        calls[0] += 1
        rows = loss(self, batch)
        rows.view(torch.int32)[0] ^= int(always or calls[0] % 2 == 0)
        return rows

    Engine.loss = wrong


# Ranks that do not get on

PHASE = "LLMTRAIN_TEST_FAULT_PHASE"
"""The phase of a step (STEP) to which rank 1 comes, and no further."""

KEY = "hf_" + 10 * "abcd"
"""What looks like a key."""


def stand_still() -> None:
    """Rank 1 waits for ever."""
    _at_beat(lambda: os.read(os.pipe()[0], 1))


def write_nothing() -> None:
    """The disk of rank 1 takes nothing more of the second checkpoint, and says nothing."""
    from llmtrain.training.checkpoint import attempt

    write = attempt.write_tensors

    def block(file: Path, *arguments: Any) -> Any:
        if "step_00000010" in str(file):
            os.read(os.pipe()[0], 1)
        return write(file, *arguments)

    if os.environ["RANK"] == "1":
        attempt.write_tensors = block


def wait_for_others() -> None:
    """A rank that tells a mistake waits for its peer, however long that takes."""
    door.SECONDS_FOR_OTHERS = 240.0


def lose_lines() -> None:
    """What a check reads of its step has no loss."""
    read = RunDirectory.read_metrics
    RunDirectory.read_metrics = lambda self: [line | {"train/loss": None} for line in read(self)]


def refuse_export() -> None:
    """The disk has no room for an export."""
    from llmtrain.training import trial

    def refused(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    trial.export = refused


def refuse_profile() -> None:
    """The disk has no room for a trace."""

    def refused(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    torch.profiler.profile.export_chrome_trace = refused  # type: ignore[method-assign]


def fill_the_disk() -> None:
    """Rank 1 may write no file as large as its part of a checkpoint any more."""
    _at_beat(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000)))


def refuse_done() -> None:
    """Not a byte of DONE can be written."""
    mark_done = RunDirectory.mark_done

    def refused(self: RunDirectory) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        try:
            mark_done(self)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))

    RunDirectory.mark_done = refused  # type: ignore[method-assign]


def make_nothing() -> None:
    """No text is tokenised."""
    Crew._hand_out = lambda self: None


def make_all_but_one() -> None:
    """The part of the text that is wanted last is not tokenised."""
    next_part, given = Crew._next, []

    def all_but_one(self: Crew) -> Job | None:
        job = next_part(self) if len(given) < len(self._jobs) - 1 else None
        given.extend([job] if job else [])
        return job

    Crew._next = all_but_one  # type: ignore[method-assign]


def make_slowly() -> None:
    """Text is tokenised for SLOW seconds before the first of it is there."""
    began, hand_out = time.monotonic(), Crew._hand_out

    def wait_first(self: Crew) -> None:
        self.heard += 1
        if time.monotonic() > began + SLOW:
            hand_out(self)

    Crew._hand_out = wait_first


def verify_slowly() -> None:
    """Rank 1 reads its part of a checkpoint for SLOW seconds; gloo would wait 15."""
    from llmtrain.training import watchdog
    from llmtrain.training.checkpoint import choosing

    watchdog.longest_wait = lambda hang_timeout: 15.0
    damages = choosing.damages

    def slowly(*arguments: Any, tick: Callable[[], None]) -> Any:
        end = time.monotonic() + SLOW
        while time.monotonic() < end:
            tick()
            time.sleep(0.2)
        return damages(*arguments, tick=tick)

    if os.environ["RANK"] == "1":
        choosing.damages = slowly


SLOW = 24.0


def fail() -> None:
    """Rank 1 raises an error that tells a key."""

    def fault() -> None:
        raise LookupError(f"no such thing as {KEY}")

    _at_beat(fault)


def fail_as_a_user_may() -> None:
    """Rank 1 raises a UserError."""

    def fault() -> None:
        raise UserError("data.sources.prose: its disk is gone; bring it back", exit_code=78)

    _at_beat(fault)


def end_at_once() -> None:
    """Rank 1 is killed."""
    _at_beat(lambda: os.kill(os.getpid(), signal.SIGKILL))


def stand_still_longer_than_gloo_waits() -> None:
    """Rank 1 waits for ever, and gloo complains of it before any watchdog."""
    from llmtrain.training import watchdog

    watchdog.longest_wait = lambda hang_timeout: 15.0
    stand_still()


def take_time() -> None:
    """Every rank spends the seconds of TIMES whenever it comes to a phase."""
    beat = Heart.beat

    def slow_beat(self: Heart, phase: Phase, step: int | None = None) -> None:
        comes = phase != self.last.phase
        beat(self, phase, step)
        if comes:
            time.sleep(TIMES.get(phase, 0.0))

    Heart.beat = slow_beat


TIMES: dict[str, float] = {"data": 0.1, "backward": 0.25, "save": 0.6}


def _at_beat(fault: Callable[[], object]) -> None:
    if os.environ["RANK"] == "1":
        beat = Heart.beat

        def beat_once(self: Heart, phase: Phase, step: int | None = None) -> None:
            beat(self, phase, step)
            if (phase, self.last.step) == (os.environ[PHASE], int(os.environ[STEP])):
                fault()

        Heart.beat = beat_once
