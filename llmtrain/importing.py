"""Signals and log lines while libraries are imported. It imports none itself, so that it is there early."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

SAID = {signal.SIGINT: b"error: interrupted\n", signal.SIGTERM: b"error: stopped by SIGTERM\n"}


@contextmanager
def signals_end_it() -> Iterator[None]:
    """Ctrl-C and SIGTERM end the process at once, with one line and what the shell calls the signal.

    There is nothing to unwind, and libraries turn an exception amid their imports into others.
    """
    before = {number: handler for number in SAID if (handler := signal.getsignal(number)) != signal.SIG_IGN}
    for number in before:
        signal.signal(number, _leave)
    try:
        yield
    finally:
        for number, handler in before.items():
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


def _leave(number: int, _: object) -> NoReturn:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, SAID[signal.Signals(number)])
    os._exit(128 + number)
