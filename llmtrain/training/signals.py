"""SIGTERM and Ctrl-C: finish the step, save, leave."""

from __future__ import annotations

import logging
import signal
from types import FrameType

from llmtrain.config import ExitCode

logger = logging.getLogger(__name__)


class StopRequest:
    """Whether this process was asked to stop. The step's own collective tells the other ranks.

    The first signal asks; a second Ctrl-C interrupts at once. SIGTERM may come several times (a launcher
    forwards it, and the process group gets it too) and still means the same.
    """

    def __init__(self) -> None:
        self.requested = False
        self.agreed = False
        self._signal = 0

    @property
    def exit_code(self) -> int:
        """85 ("requeue me") after SIGTERM, 128 + n after another signal."""
        if self._signal in (0, signal.SIGTERM):
            return ExitCode.PREEMPTED
        return 128 + self._signal

    @property
    def name(self) -> str:
        """The signal that this process got, or that another rank got one."""
        return signal.Signals(self._signal).name if self._signal else "on another rank"

    def listen(self) -> None:
        """Take over SIGTERM and SIGINT of this process."""
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGINT, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        if not self.requested:
            logger.warning("%s: finishing the step and saving", signal.Signals(number).name)
        self.requested = True
        self._signal = number
