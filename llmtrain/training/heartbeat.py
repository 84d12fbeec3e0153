"""Where this rank is and since when: noted by the thread that trains, read by the one that watches it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, NamedTuple, get_args

Phase = Literal[
    "import", "prepare", "build", "verify", "load",
    "data", "forward", "backward", "reduce", "read", "eval", "save",
]  # fmt: skip
"""What a process does, in the order in which it comes to it, within a step or before the first."""

PHASES: tuple[Phase, ...] = get_args(Phase)


class Beat(NamedTuple):
    """A sign of life of the training thread."""

    phase: Phase
    step: int
    """The step that is under way; 0 before there is one."""
    at: float
    """On the monotonic clock."""


class Heart:
    """The newest beat of this rank. Any thread may read `last`; only the one that trains calls `beat`."""

    def __init__(self, spent: Callable[[Beat, float], None] = lambda beat, seconds: None) -> None:
        self.last = Beat("build", 0, time.monotonic())
        self.source: Callable[[], str] = str
        """Says which source's text is awaited; empty where none is."""
        self._spent = spent

    def beat(self, phase: Phase, step: int | None = None) -> None:
        """The rank has come to `phase`, of `step` or of the step it was in; costs about a microsecond.

        Long loops call it on every turn: who has not beaten for `hang_timeout` hangs.
        """
        last, now = self.last, time.monotonic()
        self.last = Beat(phase, last.step if step is None else step, now)
        self._spent(last, now - last.at)
