"""Finding and opening files, on this machine or behind an fsspec URL.

Everything that reads goes through `open_raw`. Names are paths as the user wrote them, or URLs.
"""

from __future__ import annotations

import functools
import glob
import gzip
import io
import logging
import os
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from llmtrain.config import UserError

logger = logging.getLogger(__name__)

T = TypeVar("T")

CHUNK = 1 << 20
"""Bytes read at a time."""
_REMOTE_BLOCK = 8 << 20  # bytes a remote file is asked for at a time: a slice is read front to back
TRIES = 8
"""Attempts at a block of a remote file that fails for reasons that may pass."""
FIRST_DELAY, MAX_DELAY = 0.5, 30.0
"""Seconds before the second attempt, doubled from attempt to attempt, and the longest."""
_TRANSIENT_LIBRARIES = {"aiohttp", "botocore", "fsspec", "gcsfs", "google", "azure", "requests", "urllib3"}
_PERMANENT_STATUS = {400, 401, 403, 404, 405, 410}
_PERMANENT = (ImportError, FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)
_MARKS = (
    "ETag", "etag", "checksum", "md5", "md5Hash", "Content-MD5", "Digest", "sha256", "blob_id", "generation",
    "mtime", "LastModified", "last_modified", "Last-Modified", "updated", "created",
)  # fmt: skip
"""What the file systems say of a file that changes with its content."""


class InputFile(NamedTuple):
    """A file of a source."""

    name: str
    size: int | None
    """Bytes on disk; None where the server does not say."""
    mark: str
    """Changes when the content may have changed."""
    stamp: str = ""
    """As `stamp_of` says; nothing for a URL."""


def is_url(where: str) -> bool:
    """Whether fsspec has to find it."""
    return "://" in where


def is_directory(where: str) -> bool:
    """Whether it is a directory on this machine, or there is reason to believe so of a URL."""
    return where.endswith("/") if is_url(where) else Path(where).expanduser().is_dir()


def list_files(where: str, suits: Callable[[str], bool]) -> list[InputFile]:
    """The file or the matches of a glob, or the files of a directory that suit; sorted, maybe none."""
    found = _list_remote(where, suits) if is_url(where) else _list_local(where, suits)
    return sorted(found, key=lambda file: file.name.split("/"))


def _list_local(where: str, suits: Callable[[str], bool]) -> list[InputFile]:
    path = Path(where).expanduser()
    if path.is_file():
        return [_local(path)]
    if path.is_dir():
        below = (file for file in path.rglob("*") if not _is_hidden(file.relative_to(path).parts))
        return [_local(file) for file in below if suits(str(file)) and file.is_file()]
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob refuses absolute patterns)
    return [_local(Path(match)) for match in matches if Path(match).is_file()]


def _local(path: Path) -> InputFile:
    stat = path.stat()
    stamp = _stamp(stat)
    return InputFile(str(path), stat.st_size, f"{path.resolve()} {stamp}", stamp)


def stamp_of(name: str) -> str:
    """Size and time of a file on this machine; nothing if it is gone."""
    try:
        return _stamp(Path(name).stat())
    except OSError:
        return ""


def _stamp(stat: os.stat_result) -> str:
    return f"{stat.st_size} {stat.st_mtime_ns}"


def _is_hidden(parts: tuple[str, ...] | list[str]) -> bool:
    return any(part.startswith(".") for part in parts)


# URLs


def _filesystem(url: str) -> tuple[Any, str]:
    """(file system, path in it); UserError for a protocol that is unknown or lacks its package."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(url)
    except ImportError as error:  # fsspec says which package is missing
        raise UserError(f"{url}: {error} (with pip)") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}") from error


@contextmanager
def _listing(url: str) -> Iterator[None]:
    """Whatever a file system raises while it is asked about names is a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each of fsspec's file systems has errors of its own
        raise UserError(f"{url} cannot be listed: {type(error).__name__}: {error}") from error


@functools.lru_cache(maxsize=256)
def holds(url: str, name: str) -> bool:
    """Whether a directory behind a URL holds a file of this name; asked once a process."""
    if _is_pattern(url):
        return False
    filesystem, path = _filesystem(url)
    with _listing(url):
        return bool(filesystem.isfile(f"{path.rstrip('/')}/{name}"))


def _is_pattern(url: str) -> bool:
    """A `?` in a web address begins its query."""
    return any(sign in url for sign in ("*[" if url.startswith(("http://", "https://")) else "*?["))


def _list_remote(url: str, suits: Callable[[str], bool]) -> list[InputFile]:
    filesystem, path = _filesystem(url)
    with _listing(url):
        if "::" in url:  # a chain, such as an archive behind a server, is one exact file
            return [_remote(url, filesystem.info(path))]
        if _is_pattern(url):
            found = filesystem.glob(path, detail=True)
            if "/." not in url:  # as the shell does, and Python's glob
                found = {name: info for name, info in found.items() if not _is_hidden(name.split("/"))}
        else:
            try:
                info = filesystem.info(path)
            except FileNotFoundError as error:
                _check_answered(url, error)
                return []
            if info["type"] == "file" and not url.endswith("/"):
                return [_remote(url, info)]
            below = filesystem.find(path, detail=True)
            depth = len(path.rstrip("/").split("/"))
            found = {
                name: info
                for name, info in below.items()
                if suits(name) and not _is_hidden(name.split("/")[depth:])
            }
        infos = [(name, info) for name, info in found.items() if info["type"] == "file"]
        return [
            _remote(filesystem.unstrip_protocol(name), _sized(filesystem, name, info)) for name, info in infos
        ]


def _check_answered(url: str, error: FileNotFoundError) -> None:
    """fsspec's http says of a server that does not answer that the file is not there."""
    cause = error.__cause__
    if cause is not None and getattr(cause, "status", 404) != 404:
        raise UserError(f"{url}: the server answers {getattr(cause, 'status', '')}: {cause}") from error
    if cause is not None and not hasattr(cause, "status") and not isinstance(cause, FileNotFoundError):
        raise UserError(f"{url} cannot be reached: {cause}") from error


def _sized(filesystem: Any, name: str, info: dict[str, Any]) -> dict[str, Any]:
    """A listing page tells no sizes; the file's own header may."""
    return info if info.get("size") is not None else filesystem.info(name)


def _remote(url: str, info: dict[str, Any]) -> InputFile:
    size = info.get("size")
    marks = [f"{key}={info[key]}" for key in _MARKS if info.get(key) is not None]
    return InputFile(url, None if size is None else int(size), " ".join([url, f"size={size}", *marks]))


# Opening


def open_raw(name: str) -> BinaryIO:
    """The bytes of a file as they are stored; OSError where it cannot be opened or, later, read on."""
    if not is_url(name):
        return Path(name).open("rb")
    filesystem, path = _filesystem(name)
    return cast("BinaryIO", _RemoteFile(filesystem, path))


class _RemoteFile(io.RawIOBase):
    """A file behind fsspec, read ahead in blocks, whose every failure is an OSError.

    A web server that sends whole files only is read from the start, and what is not wanted is passed over.
    """

    def __init__(self, filesystem: Any, path: str) -> None:
        super().__init__()
        self._filesystem, self._path = filesystem, path  # kept: an archive's file system closes its files
        self._file: Any = None
        self._place = 0  # the next byte to read
        self._whole = False  # the server sends whole files only
        self._retry(self._reopen)

    def _open(self, **options: Any) -> Any:
        return self._filesystem.open(self._path, "rb", **options)

    def _reopen(self) -> None:
        """Open the file, again if it is open, at the place that has been reached."""
        self._let_go()
        if not self._whole:
            self._file = self._open(block_size=_REMOTE_BLOCK, cache_type="readahead")
            if self._place:
                self._file.seek(self._place)
            return
        self._file = self._open(block_size=0)
        left = self._place
        while left and (passed := self._file.read(min(CHUNK, left))):
            left -= len(passed)

    def _retry(self, action: Callable[[], T]) -> T:
        """The result of `action`, tried again, ever later, while it fails for reasons that may pass."""
        delay = FIRST_DELAY
        for attempt in range(1, TRIES + 1):
            try:
                return action()
            except Exception as error:  # each of fsspec's file systems has errors of its own
                reason = f"{type(error).__name__}: {error}".rstrip(": ")
                if not _may_pass(error):
                    raise error if isinstance(error, OSError) else OSError(reason) from error
                if attempt == TRIES:
                    raise OSError(f"{TRIES} attempts failed; the last: {reason}") from error
                logger.warning(
                    "%s: %s; attempt %d of %d in %.1f s", self._path, reason, attempt + 1, TRIES, delay
                )
            self._let_go()  # nobody knows how far it came
            time.sleep(delay)
            delay = min(2 * delay, MAX_DELAY)
        raise AssertionError("TRIES is at least 1")

    def read(self, size: int | None = -1) -> bytes:
        content = self._retry(lambda: self._read(-1 if size is None else size))
        self._place += len(content)
        return content

    def _read(self, size: int) -> bytes:
        if self._file is None:
            self._reopen()
        try:
            return bytes(self._file.read(size))
        except ValueError as error:
            if "range requests" not in str(error):
                raise
        self._whole = True
        self._reopen()
        return bytes(self._file.read(size))

    def readinto(self, target: Any) -> int:
        content = self.read(len(target))
        target[: len(content)] = content
        return len(content)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self._file is None or bool(self._file.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        self._place = self._retry(lambda: self._seek(offset, whence))
        return self._place

    def _seek(self, offset: int, whence: int) -> int:
        if self._file is None:
            self._reopen()
        self._file.seek(offset, whence)
        return int(self._file.tell())

    def tell(self) -> int:
        return self._place

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._let_go()

    def _let_go(self) -> None:
        file, self._file = getattr(self, "_file", None), None
        if file is not None:
            with suppress(Exception):  # it was only read
                file.close()


def _may_pass(error: Exception) -> bool:
    """Whether an error is about the network or a server; libraries have their own kinds, imported or not."""
    cause: BaseException = error
    if isinstance(error, FileNotFoundError) and error.__cause__ is not None:
        cause = error.__cause__  # fsspec's http says so of a server that does not answer, too
    if isinstance(cause, _PERMANENT) or getattr(cause, "status", None) in _PERMANENT_STATUS:
        return False
    modules = {kind.__module__.partition(".")[0] for kind in type(cause).__mro__}
    return isinstance(cause, OSError) or bool(modules & _TRANSIENT_LIBRARIES)


@contextmanager
def opened(name: str, compression: str) -> Iterator[BinaryIO]:
    """The decompressed stream of a file; one that cannot be read or unpacked is a UserError.

    `compression` is `.gz`, `.zst` or nothing.
    """
    try:
        with open_raw(name) as raw:
            stream: Any = raw
            if compression:
                raw = _filled(raw, name, compression)
            if compression == ".gz":
                stream = gzip.GzipFile(fileobj=raw)
            elif compression == ".zst":
                stream = unpack_zstd(raw)
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name} cannot be read: {error}") from error


def _filled(raw: BinaryIO, name: str, compression: str) -> BinaryIO:
    """The same bytes; UserError if there are none, which decompressors take for a file without content."""
    buffered = raw if isinstance(raw, io.BufferedReader) else io.BufferedReader(cast("Any", raw), CHUNK)
    if not buffered.peek(1):
        kind = {".gz": "gzip", ".zst": "zstd"}[compression]
        raise UserError(f"{name} is empty, not a {kind} file: fetch it again, or leave it out")
    return cast("BinaryIO", buffered)


def unpack_zstd(raw: BinaryIO) -> Any:
    """Arrow's reader: the `zstandard` package ends a truncated file as if it were whole (0.25)."""
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")


def advance(stream: BinaryIO, count: int, compressed: bool) -> None:
    """Go to byte `count` of a stream that stands at its start, in bounded memory."""
    if not compressed and stream.seekable():
        stream.seek(count)
        return
    while count and (chunk := stream.read(min(CHUNK, count))):
        count -= len(chunk)
