"""Directories that are made once: under a lock, aside, and visible only when whole."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from llmtrain.config import UserError
from llmtrain.distributed import World
from llmtrain.files import sync

logger = logging.getLogger(__name__)

HEAD_START = 1.0
"""Seconds that local rank 0 has the lock to itself: people watch its console."""
POLL = 0.2
REMIND = 5.0


def artefact_key(*parts: Any) -> str:
    """A name that says what a directory was made from: 32 hex digits over JSON-like parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def make_once(directory: Path, build: Callable[[Path], None], what: str) -> Path:
    """Have `build` fill a new directory that then becomes `directory`, unless that exists; return it.

    Any number of processes may ask at once: one builds, the others wait. A builder that is killed leaves
    only a hidden `.tmp-` directory, which the next one clears away before it starts anew.
    """
    if directory.is_dir():
        return directory
    if World.from_environment().local_rank > 0:
        time.sleep(HEAD_START)
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with _locked(directory.with_name(f".{directory.name}.lock"), what):
            if not directory.is_dir():
                _build_aside(directory, build)
    except OSError as error:  # no permission, a full disk: readers name their own files
        raise UserError(f"cache_dir: {what} cannot be written to {directory.parent}: {error}") from error
    return directory


def _build_aside(directory: Path, build: Callable[[Path], None]) -> None:
    aside = directory.with_name(f".tmp-{directory.name}")
    shutil.rmtree(aside, ignore_errors=True)  # what a killed process left
    aside.mkdir()
    try:
        build(aside)
        sync(aside)
        aside.rename(directory)
        sync(directory.parent)
    except BaseException:  # Ctrl-C too: leave no rubbish behind
        shutil.rmtree(aside, ignore_errors=True)
        raise


@contextlib.contextmanager
def _locked(path: Path, what: str) -> Iterator[None]:
    """Hold an flock, which the kernel takes back however the process ends."""
    with path.open("a") as file:
        waiting = spoke = time.monotonic()
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() - spoke > REMIND:
                    spoke = time.monotonic()
                    logger.info("%s: another process is at work on it (%.0f s)", what, spoke - waiting)
                time.sleep(POLL)
        yield
