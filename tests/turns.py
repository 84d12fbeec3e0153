"""Tests in several processes at once (pytest-xdist), and some of them with nothing beside them."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def turn(directory: Path, quiet: bool) -> Iterator[None]:
    """Beside the turns of other processes over the same directory, or, `quiet`, when none of them has one.

    Who waits for quiet holds the queue, so that no turn begins before its own. The locks are a process's own:
    children do not keep them.
    """
    with (directory / "queue").open("w") as queue, (directory / "turns").open("a+") as turns:
        fcntl.lockf(queue, fcntl.LOCK_EX)
        fcntl.lockf(turns, fcntl.LOCK_EX if quiet else fcntl.LOCK_SH)
        fcntl.lockf(queue, fcntl.LOCK_UN)
        yield
