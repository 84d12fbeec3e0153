"""Asked to stop: by a signal, by the end of the allotted time, or by the death of the launcher."""

from __future__ import annotations

import logging
import os
import select
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Annotated, Any, NoReturn

import torch
from pydantic import BeforeValidator, Field

from llmtrain import distributed
from llmtrain.config import ExitCode
from llmtrain.training.heartbeat import process_age

logger = logging.getLogger(__name__)

POLL_SECONDS = 0.5
"""How often clocks are looked at; signals and launchers wake the thread."""

SPARE_SHARE, SPARE_SECONDS = 1.5, 10.0
"""Finishing gets this many times the slowest step and the last save, and these seconds for the rest."""

STARTED = "LLMTRAIN_STARTED"
"""Environment: when the job began, in Unix seconds, where a launcher has started its ranks more than once."""


def parse_seconds(value: Any) -> Any:
    """`HH:MM:SS` as seconds; everything else as it came."""
    parts = value.split(":") if isinstance(value, str) else []
    if len(parts) != 3:
        return value
    if not all(part.isdecimal() for part in parts):
        raise ValueError("must be seconds or HH:MM:SS")
    hours, minutes, seconds = map(int, parts)
    return hours * 3600 + minutes * 60 + seconds


Seconds = Annotated[float, BeforeValidator(parse_seconds), Field(gt=0)]


def job_age() -> float:
    """Seconds since the job, or else this process, was started."""
    started = os.environ.get(STARTED)
    return time.time() - float(started) if started else process_age()


class StopRequest:
    """Whether this process was asked to stop, and what becomes of it then.

    A thread hears of it at once, also while the main thread waits in a collective. As long as there is
    nothing to save it ends the process, with 85. Later the step's own collective tells the other ranks; all
    finish the step, save and leave. A process that has not left `grace_seconds` later is ended: with 85 if
    its steps are saved, else with 128 + n. Further signals change nothing, except that a second Ctrl-C
    interrupts.
    """

    def __init__(
        self,
        grace_seconds: float = 60.0,
        time_limit: float | None = None,
        leaving: Callable[[], None] = lambda: None,
        age: Callable[[], float] = job_age,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`leaving` is called where the process ends here, by itself, and nothing is lost."""
        self.agreed = False
        self.trained = False
        """Whether this process has done a step: something can be lost."""
        self.saved = True
        """Whether no step of this process would be lost."""
        self.polled = False
        """Whether the ranks keep looking together whether one was asked: then they leave together."""
        self._grace, self._clock, self._leaving = grace_seconds, clock, leaving
        self._end = None if time_limit is None else clock() - age() + time_limit
        self._number, self._name = 0, "on another rank"
        self._since: float | None = None
        self._interrupts = 0
        self._steps, self._slowest_step = 0, 0.0
        self._save_seconds: float | None = None

    @property
    def requested(self) -> bool:
        """Whether this process itself was asked."""
        return self._number != 0

    @property
    def name(self) -> str:
        """What asked: a signal, `time_limit`, `launcher`, or that it was on another rank."""
        return self._name

    @property
    def exit_code(self) -> int:
        """85 ("requeue me") where nothing is lost; 128 + n after Ctrl-C, or if steps are not saved."""
        if self._number == signal.SIGINT or not self.saved:
            return 128 + (self._number or signal.SIGTERM)
        return ExitCode.PREEMPTED

    @contextmanager
    def listening(self, launchers: Sequence[int] = ()) -> Iterator[None]:
        """Take over SIGTERM, SIGUSR1 and SIGINT; afterwards the exit code stands, and they change nothing.

        `launchers` are file descriptors that become readable when a process dies that this one must not
        outlive.
        """
        self._listen(launchers)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, signal.SIG_IGN)

    def _listen(self, launchers: Sequence[int]) -> None:
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)
        watch = threading.Thread(
            target=self._watch, args=(reading, list(launchers)), daemon=True, name="llmtrain-stop"
        )
        watch.start()

    def agree(self, stop: bool) -> bool:
        """Take note of what the ranks found out together: whether any of them was asked; returns it."""
        if stop:
            self.agreed = True
            self._since = self._since or self._clock()
        return stop

    def poll(self, device: torch.device) -> bool:
        """Whether any rank was asked by now; collective."""
        asked = torch.full((), int(self.requested), device=device)
        return self.agree(distributed.all_reduce_sum(asked).item() > 0)

    def step_took(self, seconds: float) -> None:
        """A step is done, and is in no checkpoint yet; it took so long.

        The first one of a process compiles and allocates: it counts only until there are others.
        """
        self.trained, self.saved = True, False
        self._steps += 1
        self._slowest_step = seconds if self._steps <= 2 else max(self._slowest_step, seconds)

    def save_took(self, seconds: float) -> None:
        """Writing a checkpoint took so long."""
        self._save_seconds = seconds

    def seconds_to_finish(self) -> float:
        """What finishing may take: `grace_seconds` until a save was measured."""
        if self._save_seconds is None:
            return self._grace
        return SPARE_SHARE * (self._slowest_step + self._save_seconds) + SPARE_SECONDS

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """The main thread's part; the other thread has heard of the signal through the wake-up descriptor."""
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1 or not self.trained:
                raise KeyboardInterrupt

    def _watch(self, reading: int, launchers: list[int]) -> None:
        while True:
            ready, _, _ = select.select([reading, *launchers], [], [], POLL_SECONDS)
            for number in os.read(reading, 64) if reading in ready else b"":
                self._ask(number, signal.Signals(number).name)
            if any(launcher in ready for launcher in launchers):
                launchers = []
                self._ask(signal.SIGTERM, "launcher")
            self.look_at_clocks()

    def look_at_clocks(self) -> None:
        now = self._clock()
        if self._end is not None and now >= self._end - self.seconds_to_finish():
            self._ask(signal.SIGALRM, "time_limit")
        if self._since is not None and now >= self._since + self._grace:
            self._leave(f"{self._name}: not done after grace_seconds={self._grace:g}")

    def _ask(self, number: int, name: str) -> None:
        """The first one to ask decides. Ctrl-C with nothing to save is the main thread's to handle."""
        asks = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGALRM)
        if self._number or number not in asks or (number == signal.SIGINT and not self.trained):
            return
        self._name, self._number = name, number
        self._since = self._since or self._clock()
        if not (self.trained or self.polled):
            self._leave(f"{name}: nothing to save yet")
        logger.warning("%s: finishing the step and saving", name)

    def _leave(self, reason: str) -> NoReturn:
        """End the process, also where the main thread holds every lock or nobody reads what we print."""
        code = self.exit_code
        if code == ExitCode.PREEMPTED:
            self._leaving()
        if select.select([], [2], [], 0)[1]:
            os.write(2, f"{reason}; leaving with exit code {code}\n".encode())
        os._exit(code)
