"""Signals and log lines while libraries are imported. It imports none itself, so that it is there early."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

SAID = {
    signal.SIGINT: b"error: interrupted\n",
    signal.SIGTERM: b"error: stopped by SIGTERM\n",
    signal.SIGUSR1: b"error: stopped by SIGUSR1\n",
}


class _Leave:
    """Ends the process in a signal's handler."""

    def __init__(self, preempted: int | None) -> None:
        self._preempted = preempted

    def __call__(self, number: int, _: object) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            os.write(2, SAID[signal.Signals(number)])
        code = None if number == signal.SIGINT else self._preempted
        os._exit(128 + number if code is None else code)


@contextmanager
def signals_end_it(preempted: int | None = None) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGUSR1 end the process at once, with one line and what the shell calls the signal.

    There is nothing to unwind, and libraries turn an exception amid their imports into others. `preempted` is
    the exit code instead, except after Ctrl-C; inside of another such block that one's codes hold. A signal
    that somebody else takes meanwhile stays theirs.
    """
    leave = _Leave(preempted)
    handlers = {number: signal.getsignal(number) for number in SAID}
    before = {
        number: handler
        for number, handler in handlers.items()
        if handler != signal.SIG_IGN and not isinstance(handler, _Leave)
    }
    for number in before:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) is leave:
                signal.signal(number, handler)


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """No log line below an error: what libraries lack themselves, and we do not use, is no news to a user."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
