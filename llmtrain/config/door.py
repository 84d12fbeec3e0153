"""What every door does around its work: logging, one line for a mistake, an exit code."""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Literal, NoReturn

from llmtrain.config.errors import ExitCode, UserError
from llmtrain.config.secrets import without_secrets
from llmtrain.distributed import World, quiet_threads

SECONDS_FOR_OTHERS = 3.0
"""How long a rank that told a mistake waits at most for others here that come with the same one."""


def plain_door(run: Callable[[], int | None]) -> int:
    """Calls `run` and returns the process's exit code; a mistake (UserError) is printed once."""
    return rank_door(lambda _: run())


def rank_door(run: Callable[[World], int | None]) -> int:
    """`plain_door` for work that wants to know its rank."""
    world = World()
    quiet_threads()
    try:
        world = World.from_environment()
        _set_up_logging(world)
        return int(run(world) or 0)
    except UserError as error:
        return _report(error.lines, error.exit_code, world)
    except KeyboardInterrupt as stop:
        said = "stopped by SIGTERM" if isinstance(stop, Terminated) else "interrupted"
        return _report(["; ".join([said, *_notes(stop)])], exit_code_of(stop), world)
    except Exception:  # a bug, or a machine's trouble: told as Python would, but for secrets
        sys.stderr.write(without_secrets(traceback.format_exc()))
        return 1


def exit_code_of(error: BaseException | None) -> int:
    """What a door that `error` has come to ends with; None: nothing went wrong."""
    match error:
        case None:
            return ExitCode.OK
        case UserError():
            return error.exit_code
        case KeyboardInterrupt():
            return 128 + (signal.SIGTERM if isinstance(error, Terminated) else signal.SIGINT)
    return 1


class Parser(argparse.ArgumentParser):
    """Of a door's arguments: a mistake is one line and exit code 78."""

    def error(self, message: str) -> NoReturn:
        self.exit(ExitCode.CONFIG, f"error: {message}; see {self.prog} --help\n")


def step_or_best(text: str) -> int | Literal["best"]:
    """The value of `--step`: of a checkpoint, or the word `best`."""
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} must be a step, such as 100, or best")
    return "best" if text == "best" else int(text)


def _notes(stop: KeyboardInterrupt) -> list[str]:
    """What the work that was stopped has to say of it."""
    return getattr(stop, "__notes__", [])


def _report(lines: Sequence[str], exit_code: int, world: World) -> int:
    """Print in one write, unless another rank on this machine says the same already."""
    is_signal = exit_code > 128
    if is_signal and not world.is_main:
        return exit_code
    with _only_speaker(lines, world) as claim:
        if claim is not None:
            where = "" if world.is_main else f" (rank {world.rank} on {socket.gethostname()})"
            sys.stderr.write("".join(f"error: {without_secrets(line)}{where}\n" for line in lines))
            sys.stderr.flush()
            if not is_signal:
                _await_others(claim, world.local_world_size - 1 or world.world_size - 1)
    return exit_code


@contextmanager
def _only_speaker(lines: Sequence[str], world: World) -> Iterator[socket.socket | None]:
    """A claim for the first of a job's ranks on this machine that comes with these lines, None for others.

    The claim is a socket in Linux's abstract name space, which leaves nothing behind; others knock at it.
    """
    job = (os.getppid(), os.environ.get("MASTER_PORT"), os.environ.get("SLURM_JOB_ID"), *lines)
    name = hashlib.sha256(repr(job).encode()).hexdigest()[:32]
    with socket.socket(socket.AF_UNIX) as claim:
        if world.world_size > 1 and sys.platform == "linux":
            address = f"\0llmtrain-{name}"
            try:
                claim.bind(address)
                claim.listen(world.world_size)
            except OSError:
                with suppress(OSError):  # it may just leave
                    claim.connect(address)
                yield None
                return
        yield claim


def _await_others(claim: socket.socket, others: int) -> None:
    """Return when so many have knocked, or SECONDS_FOR_OTHERS later; at once where nobody can."""
    deadline = time.monotonic() + SECONDS_FOR_OTHERS
    with suppress(OSError):
        for _ in range(others):
            claim.settimeout(max(0.001, deadline - time.monotonic()))
            claim.accept()[0].close()


class _WithoutSecrets(logging.Formatter):
    """Records as they are, tracebacks too, but for keys, passwords and what signs a URL."""

    def format(self, record: logging.LogRecord) -> str:
        return without_secrets(super().format(record))


def _set_up_logging(world: World) -> None:
    """Our own notes from rank 0, warnings from everybody, on standard error."""
    prefix = "" if world.is_main else f"[rank {world.rank}] "
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    for handler in logging.getLogger().handlers:
        handler.setFormatter(_WithoutSecrets(f"{prefix}%(message)s"))
    logging.getLogger("llmtrain").setLevel(logging.INFO if world.is_main else logging.WARNING)


class Terminated(KeyboardInterrupt):
    """SIGTERM came."""


@contextmanager
def sigterm_is_like_ctrl_c() -> Iterator[None]:
    """SIGTERM unwinds what is half made; the door says so, and ends with what the shell calls the signal."""

    def stop(*_: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
