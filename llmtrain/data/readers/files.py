"""Finding and opening files, on this machine or behind an fsspec URL.

Everything that reads goes through `open_raw`. Names are paths as the user wrote them, or URLs.
"""

from __future__ import annotations

import functools
import glob
import gzip
import io
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

from llmtrain.config import UserError
from llmtrain.data.readers.urls import filesystem, is_missing, reason, retrying

T = TypeVar("T")

CHUNK = 1 << 20
"""Bytes read at a time."""
_REMOTE_BLOCK = 8 << 20  # bytes a remote file is asked for at a time: a slice is read front to back
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
    with _listing(where):
        found = _list_remote(where, suits) if is_url(where) else _list_local(where, suits)
    return sorted(found, key=lambda file: file.name.split("/"))


def _list_local(where: str, suits: Callable[[str], bool]) -> list[InputFile]:
    path = Path(where).expanduser()
    if path.is_file():
        return [_local(path)]
    if path.is_dir():
        return [_local(file) for file in _files_below(path) if suits(str(file)) and file.is_file()]
    _check_readable(path)
    matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob refuses absolute patterns)
    return [_local(Path(match)) for match in matches if Path(match).is_file()]


def _check_readable(pattern: Path) -> None:
    """OSError where a directory that a pattern looks into cannot be read: `glob` leaves it out in silence."""
    parts = [part for part in (pattern, *pattern.parents) if _is_pattern(part.name)]
    for looked_into in {part if part.name == "**" else part.parent for part in parts}:
        for directory in glob.glob(f"{looked_into}/", recursive=True):  # noqa: PTH207
            os.scandir(directory).close()


def _files_below(directory: Path) -> Iterator[Path]:
    """All but hidden ones. OSError where a directory cannot be read: `rglob` leaves it out in silence."""

    def refuse(error: OSError) -> None:
        raise error

    for parent, directories, names in os.walk(directory, onerror=refuse):
        directories[:] = [name for name in directories if not name.startswith(".")]
        yield from (Path(parent, name) for name in names if not name.startswith("."))


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


@contextmanager
def _listing(url: str) -> Iterator[None]:
    """Whatever a file system raises while it is asked about names is a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # each of fsspec's file systems has errors of its own
        raise UserError(f"{url} cannot be listed: {reason(error)}") from error


@functools.lru_cache(maxsize=256)
def holds(url: str, name: str) -> bool:
    """Whether a directory behind a URL holds a file of this name; asked once a process."""
    if _is_pattern(url):
        return False
    with _listing(url):
        files, path = filesystem(url)
        # Not `isfile`, which takes a server that does not answer for one without the file. Some say
        # "forbidden" of every file that they do not have.
        with suppress(FileNotFoundError, PermissionError):
            return bool(retrying(lambda: files.info(f"{path.rstrip('/')}/{name}"), url)["type"] == "file")
        return False


def _is_pattern(url: str) -> bool:
    return any(sign in url for sign in _signs(url))


def _signs(url: str) -> str:
    """What makes a pattern of a URL; a `?` in a web address begins its query."""
    return "*[" if url.startswith(("http://", "https://")) else "*?["


def _list_remote(url: str, suits: Callable[[str], bool]) -> list[InputFile]:
    files, path = filesystem(url)
    if "::" in url:  # a chain, such as an archive behind a server, is one exact file
        return [_remote(url, retrying(lambda: files.info(path), url))]
    if _is_pattern(url):
        found = _matches(files, path, url)
        if "/." not in url:  # as the shell does, and Python's glob
            found = {name: info for name, info in found.items() if not _is_hidden(name.split("/"))}
    else:
        try:
            info = retrying(lambda: files.info(path), url)
        except FileNotFoundError as error:
            if not is_missing(error):
                raise
            return []
        if info["type"] == "file" and not url.endswith("/"):
            return [_remote(url, info)]
        below = _below(files, path, math.inf, url)
        depth = len(path.rstrip("/").split("/"))
        found = {
            name: info
            for name, info in below.items()
            if suits(name) and not _is_hidden(name.split("/")[depth:])
        }
    return [_remote(files.unstrip_protocol(name), _sized(files, name, info)) for name, info in found.items()]


def _matches(files: Any, path: str, url: str) -> dict[str, dict[str, Any]]:
    """What a file system says of each file that a pattern matches, by path."""
    from fsspec.utils import glob_translate

    first = min(path.find(sign) for sign in _signs(url) if sign in path)
    root = path[: path.rfind("/", 0, first) + 1]
    depth = math.inf if "**" in path else path.count("/", len(root)) + 1
    pattern = re.compile(glob_translate(path))
    return {name: info for name, info in _below(files, root, depth, url).items() if pattern.match(name)}


def _below(files: Any, root: str, depth: float, url: str) -> dict[str, dict[str, Any]]:
    """What a file system says of each file up to `depth` levels below a directory, by path.

    Its own `find` is not asked: it leaves out a directory whose server does not answer.
    """
    found: dict[str, dict[str, Any]] = {}
    level = [root]
    while level and depth > 0:
        below = []
        for directory in level:
            for info in _entries(files, directory, url):
                if info["type"] == "file":
                    found[info["name"]] = info
                elif info["name"].strip("/") != directory.strip("/"):  # some list the directory, too
                    below.append(info["name"])
        level, depth = below, depth - 1
    return found


def _entries(files: Any, directory: str, url: str) -> list[dict[str, Any]]:
    try:
        return list(retrying(lambda: files.ls(directory, detail=True), url))
    except FileNotFoundError as error:
        if not is_missing(error):
            raise
        return []


def _sized(files: Any, name: str, info: dict[str, Any]) -> dict[str, Any]:
    """A listing page tells no sizes; the file's own header may."""
    return info if info.get("size") is not None else retrying(lambda: files.info(name), name)


def _remote(url: str, info: dict[str, Any]) -> InputFile:
    size = info.get("size")
    marks = [f"{key}={info[key]}" for key in _MARKS if info.get(key) is not None]
    return InputFile(url, None if size is None else int(size), " ".join([url, f"size={size}", *marks]))


# Opening


def open_raw(name: str) -> BinaryIO:
    """The bytes of a file as they are stored; OSError where it cannot be opened or, later, read on."""
    if not is_url(name):
        return Path(name).open("rb")
    return cast("BinaryIO", _RemoteFile(name))


class _RemoteFile(io.RawIOBase):
    """A file behind fsspec, read ahead in blocks, whose every failure is an OSError.

    A web server that sends whole files only is read from the start, and what is not wanted is passed over.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self._name = name
        self._filesystem, self._path = filesystem(name)  # kept: an archive's file system closes its files
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
        def attempt() -> T:
            try:
                return action()
            except Exception:
                self._let_go()  # nobody knows how far it came
                raise

        try:
            return retrying(attempt, self._name)
        except OSError:
            raise
        except Exception as error:  # each of fsspec's file systems has errors of its own
            raise OSError(reason(error)) from error

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
