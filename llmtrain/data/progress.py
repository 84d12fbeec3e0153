"""How a long preparation shows that it lives: a bar on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

logger = logging.getLogger(__name__)

SECONDS = 5.0
"""Between two lines where there is no terminal."""


class Progress(Protocol):
    """Told how far a piece of work has come."""

    def start(self, label: str, total: int | None) -> None:
        """A piece of work begins; `total` bytes of input, or None where nobody knows."""

    def update(self, consumed: int, documents: int, text_bytes: int, tokens: int) -> None:
        """So much of the input has been read, and so much come out of it."""

    def finish(self) -> None:
        """The piece of work is done."""


class SilentProgress:
    """Nothing: another process of this machine speaks."""

    def start(self, label: str, total: int | None) -> None:
        """See Progress."""

    def update(self, consumed: int, documents: int, text_bytes: int, tokens: int) -> None:
        """See Progress."""

    def finish(self) -> None:
        """See Progress."""


class LogProgress:
    """A log line every `seconds`, and none for work that is over sooner."""

    def __init__(self, seconds: float = SECONDS) -> None:
        self._seconds = seconds
        self._label, self._began, self._spoke = "", 0.0, 0.0
        self._total: int | None = None

    def start(self, label: str, total: int | None) -> None:
        """See Progress."""
        self._label, self._total = label, total
        self._began = self._spoke = time.monotonic()

    def update(self, consumed: int, documents: int, text_bytes: int, tokens: int) -> None:
        """See Progress."""
        now = time.monotonic()
        if now - self._spoke < self._seconds:
            return
        self._spoke = now
        part = f", {consumed / self._total:.0%} of the input" if self._total and consumed else ""
        logger.info("%s: %s%s", self._label, _so_far(documents, text_bytes, tokens, now - self._began), part)

    def finish(self) -> None:
        """See Progress."""


class BarProgress:
    """A bar on standard error that is gone when the work is done."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as RichProgress

        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[so_far]}")
        self._bar = RichProgress(
            *columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True
        )
        self._began = 0.0

    def start(self, label: str, total: int | None) -> None:
        """See Progress."""
        self._began = time.monotonic()
        self._task = self._bar.add_task(label, total=total, so_far="")
        self._bar.start()

    def update(self, consumed: int, documents: int, text_bytes: int, tokens: int) -> None:
        """See Progress."""
        so_far = _so_far(documents, text_bytes, tokens, time.monotonic() - self._began)
        self._bar.update(self._task, completed=consumed, so_far=so_far)

    def finish(self) -> None:
        """See Progress."""
        self._bar.remove_task(self._task)
        self._bar.stop()


def console_progress() -> Progress:
    """A bar where standard error is a terminal, log lines elsewhere."""
    return BarProgress() if sys.stderr.isatty() else LogProgress()


@contextmanager
def work(progress: Progress, label: str, total: int | None) -> Iterator[None]:
    """A piece of work that is finished, as far as anyone can see, however it ends."""
    progress.start(label, total)
    try:
        yield
    finally:
        progress.finish()


def _so_far(documents: int, text_bytes: int, tokens: int, seconds: float) -> str:
    megabytes = text_bytes / 1e6
    return (
        f"{documents:,} documents, {tokens:,} tokens, {megabytes:,.1f} MB of text,"
        f" {megabytes / max(seconds, 1e-9):.1f} MB/s"
    )
