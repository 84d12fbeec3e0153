"""Shards of a prepared directory behind a URL: fetched ahead of their use into a cache of bounded size.

How the cache looks is described in remote_cache.py. Threads fetch what is wanted soon; whoever needs a
shard now waits for the one that fetches it, and every 30 seconds says for what.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from llmtrain.config import UserError
from llmtrain.data.readers.urls import LOCAL_TROUBLE, filesystem, is_missing, reason, retrying
from llmtrain.data.remote_cache import ShardCache, lock_of, locked, size_of
from llmtrain.data.shard_format import (
    ENTRY,
    INDEX,
    MANIFEST,
    TABLE,
    TABLES,
    TOKENS,
    digests_of_file,
    entry_of,
    load_index,
    load_manifest,
    shard_path,
)
from llmtrain.data.shards import MAX_OPEN
from llmtrain.files import sync

logger = logging.getLogger(__name__)

T = TypeVar("T")

HASH_TRIES = 3
"""Fetches of a file whose content is not what the index says."""
THREADS = 3
"""Shards fetched ahead at the same time."""
SPEAK_AFTER, SPEAK_EVERY = 5.0, 30.0
"""Seconds of waiting before it is said, and between two times."""
POLL = 0.2
FEWEST_OPEN = 8
"""Shards to keep mapped at least, however small the cache."""
_NPY_HEADER = 128  # bytes before the values of a one-dimensional array


def open_remote(url: str, cache_dir: Path, limit_bytes: int, name: str) -> RemoteShards:
    """The shards of a prepared directory behind an fsspec URL; `name` is the source's, for messages.

    UserError where the URL is no prepared directory, or cannot be reached.
    """
    return RemoteShards(url.rstrip("/"), cache_dir / "remote", limit_bytes, name)


def _asked(action: Callable[[], T], what: str) -> T:
    """The result of `action`, tried again as `retrying` does; UserError that names `what` (a URL) if none."""
    try:
        return retrying(action, what)
    except Exception as error:
        of_library = type(error).__module__.partition(".")[0] not in ("builtins", "llmtrain")
        if not isinstance(error, OSError) and not of_library:
            raise
        if is_missing(error):
            raise UserError(f"{what} does not exist") from error
        cannot = "kept" if getattr(error, "errno", None) in LOCAL_TROUBLE else "read"
        raise UserError(f"{what} cannot be {cannot}: {reason(error)}") from error


class _WrongContentError(Exception):
    """What arrived is not what the index says."""


class _Remote:
    """The files below a URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._filesystem, root = filesystem(url)
        self._root = root.rstrip("/")
        self.received = 0
        """Bytes of files so far."""

    def read(self, name: str) -> bytes:
        """A small file."""
        return _asked(lambda: bytes(self._filesystem.cat_file(f"{self._root}/{name}")), f"{self.url}/{name}")

    def fetch(self, name: str, file: Path, size: int) -> None:
        """Write a file of `size` bytes to disk; _WrongContentError where it is another, soon where longer."""
        from fsspec.callbacks import Callback

        remote = self

        class Bounded(Callback):
            def relative_update(self, inc: int = 1) -> None:
                self.value += inc
                remote.received += inc
                if self.value > size:
                    raise _WrongContentError(f"has more than {size} bytes")

        def get() -> None:
            self._filesystem.get_file(f"{self._root}/{name}", str(file), callback=Bounded())

        _asked(get, f"{self.url}/{name}")
        if file.stat().st_size != size:
            raise _WrongContentError(f"has {file.stat().st_size} bytes instead of {size}")


class _Fetch:
    """One shard on its way; `path` waits for `done`."""

    def __init__(self, shard: int, urgent: bool) -> None:
        self.shard, self.urgent = shard, urgent
        self.done = threading.Event()
        self.error: BaseException | None = None
        self.what = "its turn"


class RemoteShards:
    """The shards behind a URL, as shards.Shards has it; safe to use from several threads."""

    complete = True

    def __init__(self, url: str, cache: Path, limit: int, name: str) -> None:
        self.url, self.name = url, name
        self._remote = _Remote(url)
        self._cache = ShardCache(cache, limit)
        self.directory = self._checked(INDEX, self._fetch_index)
        self.index, self.header, self._table = load_index(self.directory)
        self.count = len(self._table)
        # The disk of a shard that was removed is free only when nobody maps it any more.
        largest = int(self._table["tokens"].max(initial=1)) * np.dtype(self.header.dtype).itemsize
        self.max_open = min(MAX_OPEN, max(FEWEST_OPEN, limit // (2 * largest)))
        self.fingerprint: str = self.index.get("fingerprint", self.index["manifest_hash"])
        self._manifest = lru_cache(16)(self._fetch_manifest)  # asked for again while there is no room
        self._wanted: list[int] = []
        self._fetches: dict[int, _Fetch] = {}
        self._failed: set[int] = set()  # ahead of their use; whoever asks for one tries again
        self._threads: list[threading.Thread] = []
        self._changed = threading.Condition()
        self._closed = False

    def table(self) -> NDArray[np.void]:
        """The index, ENTRY [count]."""
        return self._table

    def want(self, shards: Sequence[int]) -> None:
        """These are needed soon, in this order: they are fetched ahead; returns at once."""
        with self._changed:
            self._wanted = [int(shard) for shard in shards]
            self._failed.clear()
            while len(self._threads) < THREADS and not self._closed:
                self._threads.append(threading.Thread(target=self._fetch_ahead, daemon=True))
                self._threads[-1].start()
            self._changed.notify_all()

    def path(self, shard: int) -> Path:
        """The local directory of a shard; waits until it is there, and says so when that takes long."""
        directory = shard_path(self.directory, shard)
        while not self._cache.take(directory):
            with self._changed:
                fetch = self._fetches.get(shard)
                if fetch is None:
                    fetch = self._fetches[shard] = _Fetch(shard, urgent=True)
                    threading.Thread(target=self._run, args=[fetch], daemon=True).start()
                fetch.urgent = True
            self._await(fetch)
        with self._changed:
            if shard in self._wanted:  # it has its use now, and may go when room is needed
                self._wanted.remove(shard)
                self._changed.notify_all()
        return directory

    @property
    def received(self) -> int:
        """Grows as long as shards are being fetched."""
        return self._remote.received

    def manifest(self, shard: int) -> dict[str, Any]:
        """The checked manifest of a shard, without the shard where that is not here."""
        directory = shard_path(self.directory, shard)
        if self._cache.take(directory):
            return load_manifest(directory, self.header)
        return self._manifest(shard)[0]

    def close(self) -> None:
        """Fetch nothing ahead any more; a fetch under way comes to its end."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    # Waiting

    def _await(self, fetch: _Fetch) -> None:
        speak = time.monotonic() + SPEAK_AFTER
        while not fetch.done.wait(POLL):
            if self._closed:
                raise RuntimeError(f"{self.url} was closed while its shards were still wanted")
            if time.monotonic() > speak:
                logger.info("waiting for %s: %s", self.name, self._progress(fetch))
                speak = time.monotonic() + SPEAK_EVERY
        if fetch.error is not None:
            raise fetch.error

    def _progress(self, fetch: _Fetch) -> str:
        shard = shard_path(self.directory, fetch.shard).name
        for aside in self.directory.glob(f".tmp-{shard}-*"):  # this process's, or another's
            size = int(aside.name.rpartition("-")[2])
            with contextlib.suppress(OSError):
                return f"fetching {self.url}/{shard} ({size_of(aside) / 1e6:.1f} MB of {size / 1e6:.1f})"
        return f"{self.url}/{shard} waits for {fetch.what}"

    # Fetching

    def _fetch_ahead(self) -> None:
        """A thread: the next shard that is wanted and not here, as long as there are any."""
        while not self._closed:
            with self._changed:
                fetch = self._next()
                if fetch is None:
                    self._changed.wait()
                    continue
            self._run(fetch)
            if fetch.what == "room" and not fetch.urgent:
                with self._changed:
                    self._changed.wait(timeout=1.0)  # others may make room: they do not tell

    def _next(self) -> _Fetch | None:
        for shard in self._wanted:
            busy = shard in self._fetches or shard in self._failed
            if not busy and not shard_path(self.directory, shard).is_dir():
                self._fetches[shard] = _Fetch(shard, urgent=False)
                return self._fetches[shard]
        return None

    def _run(self, fetch: _Fetch) -> None:
        try:
            self._fetch(fetch)
        except BaseException as error:
            fetch.error = error
        with self._changed:
            if fetch.error is not None:
                self._failed.add(fetch.shard)
            del self._fetches[fetch.shard]
        fetch.done.set()

    def _fetch(self, fetch: _Fetch) -> None:
        """Bring one shard into the cache; what is fetched ahead gives up where there is no room."""
        directory = shard_path(self.directory, fetch.shard)
        fetch.what = "another process that fetches it"
        with locked(lock_of(directory)):
            if directory.is_dir():
                return
            for left in directory.parent.glob(f".tmp-{directory.name}-*"):  # by one who was killed
                shutil.rmtree(left, ignore_errors=True)
            fetch.what = "its manifest"
            manifest, content = self._manifest(fetch.shard)
            sizes = self._sizes(fetch.shard)
            total = sum(sizes.values()) + len(content)
            fetch.what = "room"
            while (aside := self._cache.reserve(directory, total, self._keep(), fetch.urgent)) is None:
                if not fetch.urgent:
                    return
                time.sleep(POLL)
            fetch.what = "its files"
            try:
                for name, size in sizes.items():
                    self._fetch_file(
                        f"{directory.name}/{name}", aside / name, size, manifest["block_digests"][name]
                    )
                (aside / MANIFEST).write_bytes(content)
                for file in aside.iterdir():
                    sync(file)
                sync(aside)
                self._cache.publish(aside, directory)
            except BaseException:
                shutil.rmtree(aside, ignore_errors=True)
                raise

    def _keep(self) -> list[Path]:
        with self._changed:
            return [shard_path(self.directory, shard) for shard in self._wanted]

    def _sizes(self, shard: int) -> dict[str, int]:
        """Bytes of each file of a shard but its manifest."""
        entry = self._table[shard]
        documents, tokens = int(entry["documents"]), int(entry["tokens"])
        sizes = {f"{name}.npy": _NPY_HEADER + 8 * (documents + (name == "offsets")) for name in TABLES}
        return {TOKENS: tokens * np.dtype(self.header.dtype).itemsize, **sizes}

    def _fetch_file(self, remote: str, file: Path, size: int, digests: list[str]) -> None:
        def fetch() -> None:
            self._remote.fetch(remote, file, size)
            if digests_of_file(file) != digests:
                raise _WrongContentError("has a wrong digest")

        self._checked(remote, fetch)

    def _fetch_manifest(self, shard: int) -> tuple[dict[str, Any], bytes]:
        """manifest.json of a shard, which has to be the one that the index names; and its bytes."""
        remote = f"{shard_path(Path(), shard)}/{MANIFEST}"

        def fetch() -> tuple[dict[str, Any], bytes]:
            content = self._remote.read(remote)
            with tempfile.TemporaryDirectory() as scratch:
                (Path(scratch) / MANIFEST).write_bytes(content)
                try:
                    manifest = load_manifest(Path(scratch), self.header)
                except UserError as error:
                    raise _WrongContentError(_what(error, Path(scratch) / MANIFEST)) from error
            if np.array(entry_of(manifest), ENTRY).tobytes() != self._table[shard].tobytes():
                raise _WrongContentError(f"does not belong to {INDEX}")
            return manifest, content

        return self._checked(remote, fetch)

    def _fetch_index(self) -> Path:
        """The directory of this content in the cache, with its index."""
        content = self._remote.read(INDEX)
        try:
            key = json.dumps([self.url, json.loads(content)["manifest_hash"]])
        except (ValueError, KeyError, TypeError) as error:
            raise _WrongContentError(f"is not an index: {error!r}") from error
        directory = self._cache.directory / hashlib.sha256(key.encode()).hexdigest()[:32]
        directory.mkdir(exist_ok=True)
        if _content(directory / INDEX) == content:
            with contextlib.suppress(UserError):  # damaged: fetched again
                load_index(directory)
                return directory
        table = self._remote.read(TABLE)
        with tempfile.TemporaryDirectory() as scratch:
            for name, data in ((TABLE, table), (INDEX, content)):
                (Path(scratch) / name).write_bytes(data)
            try:
                load_index(Path(scratch))
            except UserError as error:
                raise _WrongContentError(_what(error, Path(scratch) / INDEX)) from error
        for name, data in ((TABLE, table), (INDEX, content)):
            _replace(directory / name, data)
        return directory

    def _checked(self, remote: str, fetch: Callable[[], T]) -> T:
        """What `fetch` gives, tried HASH_TRIES times where the content is not right."""
        for attempt in range(1, HASH_TRIES + 1):
            try:
                return fetch()
            except _WrongContentError as error:
                if attempt == HASH_TRIES:
                    raise self._not_right(remote, error) from error
                logger.warning("%s/%s %s; fetching it again", self.url, remote, error)
        raise AssertionError("HASH_TRIES is at least 1")

    def _not_right(self, remote: str, error: Exception) -> UserError:
        return UserError(f"{self.url}/{remote}: {error} ({HASH_TRIES} attempts); upload the directory again")


def _what(error: UserError, file: Path) -> str:
    """What is wrong with a file, without its path and the advice for local directories."""
    return str(error).replace(f"{file}: ", "").replace(f"{file.parent}/", "").partition("; delete")[0]


def _content(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        return None


def _replace(file: Path, content: bytes) -> None:
    """Write a file that other processes may read or write at the same time."""
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=f".{file.name}-", delete=False) as aside:
        aside.write(content)
        aside.flush()
        os.fsync(aside.fileno())
    Path(aside.name).replace(file)
