"""What ties a rank to the processes that started it: it hears of their death, and tells them of the run."""

from __future__ import annotations

import json
import math
import os
from contextlib import suppress
from functools import cache
from pathlib import Path

import psutil

SUPERVISOR = "LLMTRAIN_SUPERVISOR"
"""Environment: the file in which launch/supervise.py reads about the run that it started."""

PROGRAMS = ("deepspeed", "torchrun")
MODULES = ("deepspeed.launcher.", "torch.distributed.run", "torch.distributed.launch")


@cache
def launchers() -> tuple[int, ...]:
    """File descriptors that become readable when a launcher above this process ends; none but on Linux.

    `deepspeed` -> launch.py -> rank, and torchrun -> rank. Nobody else is watched: under nohup a process
    outlives its shell rightly, and srun ends its tasks itself. Asked for early, so that a launcher that dies
    while libraries are imported is noticed. PR_SET_PDEATHSIG would tell of the parent alone, and also when
    only the thread is gone that started the rank.
    """
    found: list[int] = []
    try:
        for process in psutil.Process().parents():
            if not is_launcher(process.cmdline()):
                break
            found.append(os.pidfd_open(process.pid))
    except (AttributeError, OSError, psutil.Error):  # another system, an old kernel, or no right to look
        return tuple(found)
    return tuple(found)


def tell_nothing_is_lost() -> None:
    """Tell launch/supervise.py that this rank leaves with 85, whatever others and launchers make of that."""
    _mark("preempted")


def tell_code(code: int) -> None:
    """Tell launch/supervise.py with what this rank ends: torchrun makes 1 of every failure."""
    if code > 1:
        _mark(str(code))


def _mark(word: str) -> None:
    """Leave a word for the script; where there is no place for it any more, the rank ends all the same."""
    if file := os.environ.get(SUPERVISOR):
        with suppress(OSError):
            Path(f"{file}.{word}").touch()


def tell_nothing_is_lost_yet(local_ranks: int) -> None:
    """The same where a rank ends itself, unless one of the `local_ranks` here ended before.

    When a rank fails, its launcher asks the others to stop: they leave as after any SIGTERM, and only what
    the one failed of is true of the job.
    """
    with suppress(psutil.AccessDenied):
        if _living_beside_this_one() < local_ranks:
            return
    tell_nothing_is_lost()


def _living_beside_this_one() -> float:
    """Processes of the launcher that started this one, itself included; no end of them without one."""
    try:
        parent = psutil.Process(os.getppid())
        if not is_launcher(parent.cmdline()):
            return math.inf
        ranks = parent.children()
    except psutil.NoSuchProcess:
        return math.inf
    return sum(_lives(rank) for rank in ranks)


def _lives(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def is_launcher(command: list[str]) -> bool:
    """Whether `python [-u] [-m] <one of the launchers> ...` is this command line."""
    words = command[:4]
    return any(Path(word).name in PROGRAMS or word.startswith(MODULES) for word in words)


def tell_supervisor(run: Path | None, grace_seconds: float = 0, done: bool = False) -> None:
    """Tell launch/supervise.py, if it started us, which run this is (None: no run), and whether it is done.

    Under srun it is on the first node, and ranks on others have nobody to tell.
    """
    if file := os.environ.get(SUPERVISOR):
        aside = Path(f"{file}.new-{os.getpid()}")
        facts = {"run": run and str(run.resolve()), "grace_seconds": grace_seconds, "done": done}
        with suppress(FileNotFoundError):
            aside.write_text(json.dumps(facts))
            aside.replace(file)
