"""A directory of fetched shards that never takes more than its limit, shared by the processes of a machine.

    <cache_dir>/remote/.lock                        held for moments: room is made, a shard is taken into use
    <cache_dir>/remote/<key>/index.json, index.npy  key: URL and content
                             shard-00017            whole and checked; its mtime: when it was last asked for
                             .shard-00017.lock      held by whoever fetches it
                             .tmp-shard-00018-<n>   being fetched; n bytes of room are reserved

All processes of a machine share the cache: a shard is fetched once, and every byte under remote/ counts
against the limit, those that are still to arrive too. All locks are flocks, which the kernel takes back
however a process ends; on a file system without them the cache is for one process.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from llmtrain.config import UserError
from llmtrain.data.artefacts import take_flock
from llmtrain.files import sync

GRACE = 10.0
"""Seconds that a shard stays after it was asked for: whoever asked is about to open it."""


class _Cached(NamedTuple):
    """A shard in the cache, of whatever source."""

    used: float
    directory: Path
    size: int


class ShardCache:
    """Everything below one directory, bounded; shared with other processes."""

    def __init__(self, directory: Path, limit: int) -> None:
        self.directory, self.limit = directory, limit
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cache_dir: {directory} cannot be made: {error.strerror}") from error

    def take(self, shard: Path) -> bool:
        """Whether a shard is here; it stays for GRACE seconds then."""
        with locked(self.directory / ".lock"):
            try:
                os.utime(shard)
            except FileNotFoundError:
                return False
            return True

    def reserve(self, shard: Path, size: int, keep: Sequence[Path], urgent: bool) -> Path | None:
        """A new directory for the files of a shard, `size` bytes; None where there is no room for them now.

        Shards that nobody asked for lately are removed, the least recently used first; those of `keep` only
        if it is urgent, the last of them first.
        """
        with locked(self.directory / ".lock"):
            cached, rest = self._scan()
            if rest.fixed + size > self.limit:
                raise UserError(
                    f"data.remote_cache_gb={self.limit / 1e9:g} ({self.limit} bytes) is too small: one shard,"
                    f" {shard.name}, takes {size / 1e9:.3g} GB ({size} bytes) and indices {rest.fixed} bytes"
                )
            room = self.limit - rest.fixed - rest.reserved - sum(one.size for one in cached)
            victims = self._victims(cached, keep, urgent)
            while room < size:
                if not victims:
                    return None
                room += _remove(victims.pop(0))
            aside = shard.with_name(f".tmp-{shard.name}-{size}")
            aside.mkdir()
            return aside

    def publish(self, aside: Path, shard: Path) -> None:
        """Make a fetched shard visible, as one that was asked for just now."""
        with locked(self.directory / ".lock"):  # nobody counts between the two names
            os.utime(aside)
            aside.rename(shard)
        sync(shard.parent)

    @staticmethod
    def _victims(cached: list[_Cached], keep: Sequence[Path], urgent: bool) -> list[_Cached]:
        now, order = time.time(), {path: -place for place, path in enumerate(keep)}
        old = [one for one in cached if not 0 <= now - one.used < GRACE]
        unwanted = sorted(one for one in old if one.directory not in order)
        wanted = sorted((one for one in old if one.directory in order), key=lambda one: order[one.directory])
        return unwanted + (wanted if urgent else [])

    class _Rest(NamedTuple):
        reserved: int  # by fetches under way
        fixed: int  # what is never removed

    def _scan(self) -> tuple[list[_Cached], _Rest]:
        cached, reserved, fixed = [], 0, 0
        for source in [entry for entry in os.scandir(self.directory) if entry.is_dir()]:
            for entry in os.scandir(source.path):
                path = Path(entry.path)
                if entry.name.startswith("shard-"):
                    cached.append(_Cached(entry.stat().st_mtime, path, size_of(path)))
                elif entry.name.startswith(".tmp-shard-"):
                    reserved += self._reserved(path)
                elif entry.name.startswith(".gone-"):  # its remover was killed
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    with contextlib.suppress(FileNotFoundError):  # an index may be replaced at any time
                        fixed += entry.stat().st_size
        return cached, self._Rest(reserved, fixed)

    @staticmethod
    def _reserved(aside: Path) -> int:
        """The bytes that a fetch has reserved; none where its process was killed: its rubbish goes."""
        shard, _, size = aside.name.removeprefix(".tmp-").rpartition("-")
        with locked(lock_of(aside.with_name(shard)), wait=False) as free:
            if free:
                shutil.rmtree(aside, ignore_errors=True)
                return 0
        return int(size)


def _remove(one: _Cached) -> int:
    """Remove a shard at once for everybody; maps of it stay readable."""
    aside = one.directory.with_name(f".gone-{one.directory.name}")
    shutil.rmtree(aside, ignore_errors=True)
    one.directory.rename(aside)
    shutil.rmtree(aside)
    return one.size


def size_of(directory: Path) -> int:
    """Bytes of the files in a directory."""
    return sum(entry.stat().st_size for entry in os.scandir(directory))


def lock_of(shard: Path) -> Path:
    """The lock of whoever fetches a shard."""
    return shard.with_name(f".{shard.name}.lock")


_THREADS: dict[Path, threading.Lock] = {}
"""What keeps the threads of this process apart, also where the file system knows no locks."""


@contextlib.contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold an flock; gives whether it is held, which is always so after waiting.

    Where the file system knows no locks it only holds among the threads of this process.
    """
    among_threads = _THREADS.setdefault(path, threading.Lock())
    if not among_threads.acquire(blocking=wait):
        yield False
        return
    try:
        with path.open("a") as file:
            yield take_flock(file.fileno(), wait)
    finally:
        among_threads.release()
