"""Directories that are made once: under a lock, aside, and visible only when whole.

A process that holds a lock touches the file as it gets on, and who waits for it sees the time change: that is
how one job knows that another one, on whatever machine, still prepares what both want.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from functools import cache
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
TOUCH = 5.0
"""Seconds between two touches of a lock file by its holder, at least."""
LOOK, WORKS = 1.0, 0.02
"""Seconds between two looks at the processor time of a computation, and the share of them that it uses."""
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP)

Tick = Callable[[], None]
"""Called whenever a piece of work has got on; costs next to nothing."""


def no_tick() -> None:
    """Where nobody wants to know."""


def artefact_key(*parts: Any) -> str:
    """A name that says what a directory was made from: 32 hex digits over JSON-like parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def make_once(directory: Path, build: Callable[[Path], None], what: str, tick: Tick = no_tick) -> Path:
    """Have `build` fill a new directory that then becomes `directory`, unless that exists; return it.

    Any number of processes may ask at once: one builds, the others wait. A builder that is killed leaves
    only a hidden `.tmp-` directory, which the next one clears away before it starts anew. `tick` is called
    as long as somebody gets on: `build` while it computes, here or where the lock is held.
    """
    if directory.is_dir():
        return directory
    if World.from_environment().local_rank > 0:
        time.sleep(HEAD_START)
    with cache_errors(directory.parent, what):
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = directory.with_name(f".{directory.name}.lock")
        with locked(lock, what, tick), computing(touching(lock, tick)):
            if not directory.is_dir():
                _build_aside(directory, build)
    return directory


@contextlib.contextmanager
def cache_errors(directory: Path, what: str) -> Iterator[None]:
    """No permission or a full disk is a UserError (readers name their own files)."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cache_dir: {what} cannot be written to {directory}: {error}") from error


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


def publish(aside: Path, target: Path) -> None:
    """Rename a finished file or directory to where it is looked for, for good.

    A directory that is there already stays: what has the same name was made from the same input.
    """
    target.parent.mkdir(exist_ok=True)
    try:
        aside.rename(target)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    sync(target.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a small file that is either whole or absent, whoever else writes it at the same time."""
    aside = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    aside.write_text(text, encoding="utf-8")
    aside.replace(path)


@contextlib.contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may do the work that the file stands for: False while another one has it.

    The claim is an flock, which the kernel takes back however the process ends. Where the file system knows
    no locks everybody may; the work has to bear being done twice.
    """
    with path.open("a") as file:
        if not take_flock(file.fileno()):
            yield False
            return
        yield True
        path.unlink(missing_ok=True)  # not after an error; who opened it meanwhile will see the work done


@contextlib.contextmanager
def locked(path: Path, what: str, tick: Tick = no_tick) -> Iterator[None]:
    """Hold an flock, which the kernel takes back however the process ends.

    While another process has it `tick` is called whenever that one has touched the file.
    """
    with path.open("a") as file:
        waiting, seen = time.monotonic(), touched_at(path)
        spoke = waiting
        while not take_flock(file.fileno()):
            if (now := touched_at(path)) != seen:
                seen = now
                tick()
            if time.monotonic() - spoke > REMIND:
                spoke = time.monotonic()
                logger.info("%s: another process is at work on it (%.0f s)", what, spoke - waiting)
            time.sleep(POLL)
        yield


def take_flock(descriptor: int, wait: bool = False, without: bool = True) -> bool:
    """Whether this process has an flock now; `without` where the file system has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return without
    return True


def touching(path: Path, tick: Tick) -> Tick:
    """`tick` that other processes notice, too: it touches the lock file that this one holds."""
    last = -TOUCH

    def touch() -> None:
        nonlocal last
        tick()
        if (now := time.monotonic()) - last >= TOUCH:
            last = now
            with contextlib.suppress(OSError):  # a disk in trouble: the work itself will say so
                os.utime(path)

    return touch


def touched_at(path: Path) -> int:
    """When a lock file was touched last, in ns of its file system; 0 where there is none."""
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


@contextlib.contextmanager
def computing(tick: Tick) -> Iterator[None]:
    """Call `tick` as long as this process uses its processors: a library's loop calls nobody."""
    done = threading.Event()

    def look() -> None:
        before = time.process_time()
        while not done.wait(LOOK):
            if (now := time.process_time()) - before > WORKS * LOOK:
                tick()
            before = now

    thread = threading.Thread(target=look, name="llmtrain-computing", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@cache
def kernel() -> str:
    """The name of the running kernel, in each of its containers: among its processes every flock counts."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
