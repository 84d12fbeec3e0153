"""Finding and opening files, on this machine or behind an fsspec URL.

Everything that reads goes through `open_raw`. Names are paths as the user wrote them, or URLs.
"""

from __future__ import annotations

import functools
import glob
import gzip
import io
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from llmtrain.config import UserError

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
    return InputFile(str(path), stat.st_size, f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}")


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
        self._file = self._try(lambda: self._open(block_size=_REMOTE_BLOCK, cache_type="readahead"))

    def _open(self, **options: Any) -> Any:
        return self._filesystem.open(self._path, "rb", **options)

    @staticmethod
    def _try(action: Callable[[], Any]) -> Any:
        try:
            return action()
        except OSError:
            raise
        except Exception as error:  # each of fsspec's file systems has errors of its own
            raise OSError(f"{type(error).__name__}: {error}") from error

    def read(self, size: int | None = -1) -> bytes:
        return self._try(lambda: self._read(-1 if size is None else size))

    def _read(self, size: int) -> bytes:
        try:
            return self._file.read(size)
        except ValueError as error:
            if "range requests" not in str(error):
                raise
        place = self._file.tell()
        self._file.close()
        self._file = self._open(block_size=0)
        while place and (passed := self._file.read(min(CHUNK, place))):
            place -= len(passed)
        return self._file.read(size)

    def readinto(self, target: Any) -> int:
        content = self.read(len(target))
        target[: len(content)] = content
        return len(content)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._file.seekable())

    def seek(self, offset: int, whence: int = 0) -> int:
        return self._try(lambda: self._file.seek(offset, whence))

    def tell(self) -> int:
        return self._try(self._file.tell)

    def close(self) -> None:
        if not self.closed:
            super().close()
            if hasattr(self, "_file"):
                self._file.close()


@contextmanager
def opened(name: str, compression: str) -> Iterator[BinaryIO]:
    """The decompressed stream of a file; one that cannot be read or unpacked is a UserError.

    `compression` is `.gz`, `.zst` or nothing.
    """
    try:
        with open_raw(name) as raw:
            stream: Any = raw
            if compression == ".gz":
                stream = gzip.GzipFile(fileobj=raw)
            elif compression == ".zst":
                stream = _unpack_zstd(raw)
            yield stream
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{name} cannot be read: {error}") from error


def _unpack_zstd(raw: BinaryIO) -> Any:
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
