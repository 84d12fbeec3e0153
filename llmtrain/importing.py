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
UNTOUCHED = (signal.SIG_DFL, signal.default_int_handler)


@contextmanager
def signals_end_it(preempted: int | None = None) -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGUSR1 end the process at once, with one line and what the shell calls the signal.

    There is nothing to unwind, and libraries turn an exception amid their imports into others. `preempted` is
    the exit code instead, except after Ctrl-C. A signal that somebody else takes, before or meanwhile, stays
    theirs.
    """

    def leave(number: int, _: object) -> NoReturn:
        if os.environ.get("RANK", "0") == "0":
            os.write(2, SAID[signal.Signals(number)])
        os._exit(128 + number if preempted is None or number == signal.SIGINT else preempted)

    before = {number: handler for number in SAID if (handler := signal.getsignal(number)) in UNTOUCHED}
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
