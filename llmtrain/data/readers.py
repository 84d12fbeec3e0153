"""Documents from files: jsonl, parquet, plain text, Hugging Face datasets, Python's own text.

Each reader streams: it never holds more of a file than a record, a row group's batch or, for plain text,
the one document that the file is. The order is fixed: paths sorted, records as they stand.
"""

from __future__ import annotations

import functools
import glob
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from llmtrain.config import UserError
from llmtrain.config.errors import did_you_mean
from llmtrain.data.config import SourceConfig
from llmtrain.data.embedded import embedded_documents, embedded_fingerprint, embedded_size
from llmtrain.data.shards import INDEX

_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
    ".txt": "text",
    ".text": "text",
    ".md": "text",
}
_COMPRESSED = (".gz", ".zst")
_PARQUET_ROWS = 256  # rows decoded at a time


class Document(NamedTuple):
    """A text and where it stands."""

    text: str
    file: str
    row: int
    """Line of a jsonl file, row of a table, both from 1; 1 for a file that is one document."""
    consumed: int
    """Bytes of the input read so far (before decompression): for progress, not for arithmetic."""

    @property
    def origin(self) -> str:
        """`file:row`, for people."""
        return f"{self.file}:{self.row}"


@dataclass(frozen=True)
class Input:
    """A part of a source that is read from its start: a file, or a whole dataset."""

    name: str
    size: int | None
    """Bytes on disk; None where nobody knows before reading."""
    fingerprint: str
    """Changes when the content may have changed."""
    read: Callable[[], Iterator[Document]]


def inputs(source: SourceConfig) -> list[Input]:
    """The inputs of a source in their fixed order; UserError where there are none."""
    kind = resolve_format(source)
    if kind == "embedded":
        return [_embedded_input(source.path)]
    if kind == "huggingface":
        return [_huggingface_input(source)]
    return [_file_input(path, _format_of(path, source), source) for path in _files(source)]


def documents(source: SourceConfig) -> Iterator[Document]:
    """Every document of a source in its fixed order, empty ones too."""
    for one in inputs(source):
        yield from one.read()


def input_fingerprint(source: SourceConfig) -> str:
    """Hex sha256 that changes when the source's text may have: names, sizes, times, or embedded content."""
    how = [resolve_format(source), source.text_key, source.split, source.subset, source.revision]
    parts = [how, *([one.name, one.fingerprint] for one in inputs(source))]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def resolve_format(source: SourceConfig) -> str:
    """The format of a source; `files` where each file tells its own by its suffix.

    UserError where the source sets a key that this format does not look at.
    """
    if source.format != "auto":
        return source.format
    path = Path(source.path).expanduser()
    if (path / INDEX).is_file():
        return _checked("shards", source)
    return _checked("huggingface", source) if _is_saved_dataset(path) else "files"


def _checked(kind: str, source: SourceConfig) -> str:
    if unused := source.keys_without_meaning(kind):
        raise UserError(f"{source.path}: {unused[0]} means nothing for format={kind}; leave it out")
    return kind


def _is_saved_dataset(path: Path) -> bool:
    return (path / "dataset_info.json").is_file() or (path / "dataset_dict.json").is_file()


# Files


def _files(source: SourceConfig) -> list[Path]:
    """Paths of a file, directory or glob, sorted; in a directory those of a suitable suffix."""
    path = Path(source.path).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        below = (file for file in path.rglob("*") if file.is_file() and not _is_hidden(file, path))
        found = [file for file in below if _suits(file, source)]
    else:
        matches = glob.glob(str(path), recursive=True)  # noqa: PTH207 (Path.glob refuses absolute patterns)
        found = [Path(match) for match in matches if Path(match).is_file()]
    if not found:
        raise UserError(_nothing_found(path, source))
    return sorted(found)


def _nothing_found(path: Path, source: SourceConfig) -> str:
    if path.is_dir():
        known = f"{', '.join(_SUFFIXES)} file" if source.format == "auto" else f"{source.format} file"
        return f"{source.path}: the directory holds no {known}"
    hub = "; a dataset on the Hugging Face Hub needs format=huggingface" if "*" not in source.path else ""
    return f"{source.path}: no file matches (looked in {Path.cwd()}){hub}"


def _is_hidden(file: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _plain_suffix(path: Path) -> str:
    """The suffix that tells the format: that below .gz and .zst."""
    return Path(path.stem).suffix if path.suffix in _COMPRESSED else path.suffix


def _suits(path: Path, source: SourceConfig) -> bool:
    kind = _SUFFIXES.get(_plain_suffix(path))
    return source.format == "text" or (kind is not None and source.format in ("auto", kind))


def _format_of(path: Path, source: SourceConfig) -> str:
    if source.format != "auto":
        return source.format
    try:
        return _checked(_SUFFIXES[_plain_suffix(path)], source)
    except KeyError:
        raise UserError(
            f"{source.path}: {path} has an unknown suffix; known are {', '.join(_SUFFIXES)}"
            " (each also with .gz or .zst), or set format to jsonl, parquet or text"
        ) from None


def _file_input(path: Path, kind: str, source: SourceConfig) -> Input:
    stat = path.stat()
    readers = {"jsonl": _read_jsonl, "parquet": _read_parquet, "text": _read_text}
    return Input(
        name=str(path),
        size=stat.st_size,
        fingerprint=f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}",
        read=functools.partial(readers[kind], path, source.text_key),
    )


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(decompressed stream, file below it); a file that cannot be read or unpacked is a UserError."""
    try:
        with path.open("rb") as raw:
            stream: Any = raw
            if path.suffix == ".gz":
                stream = gzip.GzipFile(fileobj=raw)
            elif path.suffix == ".zst":
                stream = _unpack_zstd(raw)
            yield stream, raw
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _unpack_zstd(raw: BinaryIO) -> Any:
    """Arrow's reader: the `zstandard` package ends a truncated file as if it were whole (0.25)."""
    import pyarrow

    return pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd")


def _read_text(path: Path, _: str) -> Iterator[Document]:
    with _opened(path) as (stream, raw):
        content = stream.read()
        consumed = raw.tell()
    yield Document(_decode(content, f"{path}:1"), str(path), 1, consumed)


def _read_jsonl(path: Path, text_key: str) -> Iterator[Document]:
    with _opened(path) as (stream, raw):
        for row, line in enumerate(_lines(stream), start=1):
            if line.strip():
                yield Document(_json_text(line, text_key, f"{path}:{row}"), str(path), row, raw.tell())


def _lines(stream: BinaryIO) -> Iterator[bytes]:
    """Lines of a binary stream, split at \\n alone (Arrow's stream has no fast readline)."""
    rest: list[bytes] = []
    while chunk := stream.read(1 << 20):
        first, *others = chunk.split(b"\n")
        rest.append(first)
        if others:
            yield b"".join(rest)
            yield from others[:-1]
            rest = [others[-1]]
    yield b"".join(rest)


def _json_text(line: bytes, text_key: str, origin: str) -> str:
    try:
        record = json.loads(_decode(line, origin))
    except ValueError as error:
        raise UserError(f"{origin}: malformed JSON: {error}") from error
    except RecursionError:
        raise UserError(f"{origin}: malformed JSON: nested too deeply") from None
    if not isinstance(record, dict):
        raise UserError(f"{origin}: holds a {type(record).__name__}, not an object with a key {text_key!r}")
    return _text_of(record, text_key, origin)


def _decode(content: bytes, origin: str) -> str:
    try:
        return content.decode("utf-8-sig")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise UserError(f"{origin}: not UTF-8: byte {error.start} is 0x{content[error.start]:02x}") from error


def _text_of(record: dict[str, Any], text_key: str, origin: str) -> str:
    if text_key not in record:
        raise UserError(_no_such_key(text_key, list(record), origin))
    text = record[text_key]
    if not isinstance(text, str):
        raise UserError(f"{origin}: {text_key!r} holds a {type(text).__name__}, not text")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{origin}: {text_key!r} holds half a surrogate pair at {error.start}") from error
    return text


def _no_such_key(text_key: str, there: list[str], origin: str) -> str:
    listed = ", ".join(there[:20]) or "nothing"
    return f"{origin}: no key {text_key!r} (text_key); there are: {listed}{did_you_mean(text_key, there)}"


def _read_parquet(path: Path, text_key: str) -> Iterator[Document]:
    import pyarrow
    from pyarrow import parquet

    row, size = 0, path.stat().st_size
    try:
        with parquet.ParquetFile(path) as file:
            if text_key not in (names := file.schema_arrow.names):
                raise UserError(_no_such_key(text_key, names, f"{path}:1"))
            rows = max(1, file.metadata.num_rows)
            for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=[text_key]):
                for text in batch.column(0).to_pylist():
                    row += 1
                    checked = _text_of({text_key: text}, text_key, f"{path}:{row}")
                    yield Document(checked, str(path), row, size * row // rows)
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{path}:{row + 1} cannot be read as parquet: {error}") from error


# Datasets


def _embedded_input(name: str) -> Input:
    size = embedded_size(name)

    def read() -> Iterator[Document]:
        consumed = 0
        for text, file, row in embedded_documents(name):
            consumed += len(text)
            yield Document(text, file, row, consumed)

    return Input(f"embedded {name}", size, embedded_fingerprint(name), read)


def _huggingface_input(source: SourceConfig) -> Input:
    local = Path(source.path).expanduser()
    if local.is_dir():
        below = sorted(file for file in local.rglob("*") if file.is_file())
        stats = [(file.relative_to(local).as_posix(), file.stat()) for file in below]
        prints = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
        size, mark = sum(stat.st_size for _, stat in stats), "\n".join([str(local.resolve()), *prints])
    else:
        size, mark = None, source.path  # a hub name; `revision` is part of the source's fingerprint
    return Input(source.path, size, mark, functools.partial(_read_huggingface, source))


def _read_huggingface(source: SourceConfig) -> Iterator[Document]:
    name = f"{source.path}[{source.split}]"
    row = 0
    with _huggingface_errors(source):
        dataset = _open_huggingface(source)
        columns = getattr(dataset, "column_names", None)
        if columns and source.text_key in columns:
            dataset = dataset.select_columns([source.text_key])
        for row, record in enumerate(dataset, start=1):
            text = _text_of(cast("dict[str, Any]", record), source.text_key, f"{name}:{row}")
            yield Document(text, name, row, 0)


def _open_huggingface(source: SourceConfig) -> Any:
    """The dataset's split: memory-mapped if it was saved to disk, streamed otherwise."""
    import datasets

    path = Path(source.path).expanduser()
    if not _is_saved_dataset(path):
        where = str(path) if path.is_dir() else source.path
        return datasets.load_dataset(
            where, name=source.subset, split=source.split, revision=source.revision, streaming=True
        )
    for key in ("subset", "revision"):
        if getattr(source, key) is not None:
            raise UserError(f"{source.path}: {key} means nothing for a dataset on disk; leave it out")
    saved = datasets.load_from_disk(str(path))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    if source.split not in splits:
        raise UserError(f"{source.path}: no split {source.split!r}; there are: {', '.join(splits)}")
    return splits[source.split]


@contextmanager
def _huggingface_errors(source: SourceConfig) -> Iterator[None]:
    """Turn what `datasets` raises for a name, split or network that is not there into a UserError."""
    import pyarrow

    try:
        yield
    except (OSError, ValueError, RuntimeError, pyarrow.ArrowException) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"Hugging Face dataset {source.path}: {type(error).__name__}: {reason}; is the name right,"
            " and is the Hub reachable (HF_HUB_OFFLINE unset)?"
        ) from error
