"""Where this rank is and since when: noted by the thread that trains, read by the one that watches it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal, NamedTuple

import psutil

from llmtrain.training.goodput import Goodput

Phase = Literal[
    "import", "prepare", "build", "verify", "load",
    "data", "forward", "backward", "reduce", "read", "eval", "save",
]  # fmt: skip
"""What a process does, in the order in which it comes to it, before its first step or within one."""


class Beat(NamedTuple):
    """A sign of life of the training thread."""

    phase: Phase
    step: int
    """The step that is under way; 0 before there is one."""
    turn: int
    """Changes of phase since the step began: the same on every rank that has come equally far."""
    at: float
    """On the monotonic clock."""


class Heart:
    """The newest beat of this rank. Any thread may read `last`; only the one that trains calls `beat`.

    While that one is inside a library's long computation another may, in its place.
    """

    def __init__(self) -> None:
        age = process_age()
        self.started = time.time() - age
        """When this process began, on the wall clock."""
        self.last = Beat("import", 0, 0, time.monotonic() - age)
        self.source: Callable[[], str] = str
        """Says which source's text is awaited; empty where none is."""
        self.goodput = Goodput()

    def beat(self, phase: Phase, step: int | None = None) -> None:
        """The rank has come to `phase`, of `step` or of the step it was in; costs about a microsecond.

        Long loops call it on every turn: who has not beaten for `hang_timeout` hangs.
        """
        last, now = self.last, time.monotonic()
        if step is None or step == last.step:
            self.last = Beat(phase, last.step, last.turn + (phase != last.phase), now)
        else:
            self.last = Beat(phase, step, 0, now)
        self.goodput.spend(last.phase, last.step, now - last.at)


def process_age() -> float:
    """Seconds since this process began (proc_pid_stat(5), field 22: psutil rounds to a second)."""
    status = Path("/proc/self/stat")
    if not status.exists():
        return time.time() - psutil.Process().create_time()
    ticks = int(status.read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
