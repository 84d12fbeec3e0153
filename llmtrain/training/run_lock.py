"""One job a run directory: a lock of the kernel, and a record of who holds it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from llmtrain.config import ExitCode, UserError

logger = logging.getLogger(__name__)

TOUCH_SECONDS = 10.0
"""How often the owner of a lock touches its record."""

LOOK, LONGEST_LOOK = 0.01, 5.0
"""Seconds that `is_taken` may hold a lock of its own; one that is held longer counts as a run's."""


class RunLock:
    """The lock of a run directory; making the object touches nothing."""

    def __init__(self, directory: Path) -> None:
        self._directory, self._file = directory, directory / ".lock"
        self._handle: int | None = None
        self._released = threading.Event()
        self._touching = threading.Thread()

    @property
    def is_held(self) -> bool:
        """Whether this object holds it."""
        return self._handle is not None

    def take(self) -> None:
        """Take the directory for this process, until `release` or the process's end, however it ends.

        A directory that another process holds is a UserError with exit code 73 and one line. Where a file
        system keeps locks on each machine apart, a record that another machine still touches is a lock, too.
        """
        assert self._handle is None, "this object holds the lock already"
        self._directory.mkdir(parents=True, exist_ok=True)
        began = time.monotonic()
        while not self.is_held:
            handle = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(handle)
                if not self.is_taken() and time.monotonic() - began < LONGEST_LOOK:
                    time.sleep(LOOK)
                    continue
                raise self._refusal(_read_owner(self._file)) from None
            if _is_same_file(handle, self._file):
                self._keep(handle)
            else:  # the directory was set aside between our open and our flock: that lock is another run's
                os.close(handle)

    def _keep(self, handle: int) -> None:
        """Write down who holds the lock, and touch the record as long as that is so."""
        owner = _record(self._file)
        if _lives_elsewhere(self._file, owner):
            os.close(handle)
            raise self._refusal(owner)
        os.ftruncate(handle, 0)
        os.pwrite(handle, json.dumps(_this_process()).encode() + b"\n", 0)
        self._handle, self._released = handle, threading.Event()
        touch = partial(_touch, handle, self._released)
        self._touching = threading.Thread(target=touch, daemon=True, name="llmtrain-lock")
        self._touching.start()

    def inherit(self) -> bool:
        """Take a directory whose owner died with the lock; False where there is none such, or it lives."""
        if not _record(self._file):
            return False
        with contextlib.suppress(UserError, OSError):
            self.take()
        return self.is_held

    def refuse_others(self) -> None:
        """The UserError of `take` where another process is at work in the directory; touches nothing."""
        with contextlib.suppress(OSError):  # where this user cannot even look, no run of theirs is at work
            if self.is_taken() or _lives_elsewhere(self._file, _record(self._file)):
                raise self._refusal(_read_owner(self._file))

    def _refusal(self, owner: Mapping[str, Any]) -> UserError:
        return UserError(_locked_message(self._directory, owner), exit_code=ExitCode.LOCKED)

    def is_taken(self) -> bool:
        """Whether some process is at work in this directory.

        It shares a lock with others who look, for a moment: `take` can tell it from a run's, and tries again.
        """
        try:
            handle = os.open(self._file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return False
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(handle)
        return False

    def owner(self) -> dict[str, Any] | None:
        """Who is at work in the directory ({host, pid, started}, as far as it is known); None: nobody.

        Of a lock that only another machine can see, the record tells: as long as its owner touches it.
        """
        if self.is_taken():
            return _read_owner(self._file)
        owner = _record(self._file)
        if owner.get("boot_id") in (None, boot_id()):
            return None
        return owner if time.time() - _touched_at(self._file) / 1e9 < 3 * TOUCH_SECONDS else None

    def release(self) -> None:
        """Give the directory back, with an empty record; without a lock this does nothing."""
        if self._handle is not None:
            self._released.set()
            self._touching.join()
            os.ftruncate(self._handle, 0)
            os.close(self._handle)
            self._handle = None


def _this_process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), "boot_id": boot_id(), "started": time_now()}


def time_now() -> str:
    """The time as files of a run have it: ISO 8601, UTC, to the millisecond."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def boot_id() -> str | None:
    """What tells one boot of this machine from the next (Linux only)."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return None


def _is_same_file(handle: int, file: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), file.stat())
    except FileNotFoundError:
        return False


def _record(file: Path) -> dict[str, Any]:
    """Who holds the lock, or held it and did not come to unlock it; else empty."""
    with contextlib.suppress(OSError, ValueError):
        owner = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(owner, dict):
            return owner
    return {}


def _read_owner(file: Path) -> dict[str, Any]:
    """The record of who holds the lock; the owner writes it a moment after the flock."""
    for _ in range(20):
        if owner := _record(file):
            return owner
        time.sleep(0.05)
    return {}


def _touch(handle: int, released: threading.Event) -> None:
    """What a file system refuses for a moment is tried again: a silent owner's lock is taken over."""
    while not released.wait(TOUCH_SECONDS):
        with contextlib.suppress(OSError):
            os.utime(handle)


def _lives_elsewhere(file: Path, owner: Mapping[str, Any]) -> bool:
    """Whether the owner is at work on another machine, whose lock may not be seen here."""
    return owner.get("boot_id", boot_id()) != boot_id() and _is_touched(file, owner)


def _is_touched(file: Path, owner: Mapping[str, Any]) -> bool:
    """Whether the owner, on another machine, lives: waits for its next touch, for no clock is shared."""
    logger.info(
        "%s: process %s on %s did not unlock it; looking for %.0f s whether it is at work",
        file, owner.get("pid"), owner.get("host"), 3 * TOUCH_SECONDS,
    )  # fmt: skip
    first, until = _touched_at(file), time.monotonic() + 3 * TOUCH_SECONDS
    while time.monotonic() < until:
        time.sleep(TOUCH_SECONDS / 10)
        if _touched_at(file) != first:
            return True
    return False


def _touched_at(file: Path) -> int:
    """When the file was last written or touched; opening it makes a network file system ask its server."""
    with file.open("rb") as stream:
        return os.fstat(stream.fileno()).st_mtime_ns


def _locked_message(path: Path, owner: Mapping[str, Any]) -> str:
    who = f"process {owner['pid']} on {owner['host']}" if {"pid", "host"} <= set(owner) else "another process"
    since = f" since {owner['started']}" if "started" in owner else ""
    return f"{path}: {who} is at work in this run directory{since}; wait for it, or choose another name"
