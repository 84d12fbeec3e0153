"""Hugging Face datasets: saved to a directory (cut at rows), or of the Hub, streamed (cut at its shards)."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from llmtrain.config import UserError
from llmtrain.data.config import SourceConfig
from llmtrain.data.readers.fields import Fields
from llmtrain.data.readers.formats import is_saved_dataset
from llmtrain.data.readers.tables import ROWS, check_columns, read_rows
from llmtrain.data.records import Document, Rejected, Slice


class Extent(NamedTuple):
    """What can be told of a dataset without reading it."""

    name: str
    rows: int | None
    size: int | None
    """Bytes on disk; None where it is streamed, as `rows` then."""
    shards: int


def dataset_extent(source: SourceConfig) -> Extent:
    """Rows and bytes of a saved dataset, or the shards of one that is streamed."""
    name = f"{source.path}[{source.split}]"
    with _errors(source):
        dataset = _open(source)
        if not is_saved_dataset(source.location):
            return Extent(name, None, None, dataset.num_shards)
        size = sum(Path(file["filename"]).stat().st_size for file in dataset.cache_files)
        return Extent(name, len(dataset), size, 1)


def check_dataset(source: SourceConfig, fields: Fields) -> None:
    """UserError where a saved dataset has no such split or column; a dataset of the Hub is not asked."""
    if is_saved_dataset(source.location):
        with _errors(source):
            dataset = _open(source)
        check_columns(fields, dataset.column_names, f"{source.path}[{source.split}]")


def dataset_mark(source: SourceConfig) -> str:
    """Changes when a dataset on disk may have changed; of the Hub `revision` alone tells, a key."""
    local = Path(source.location).expanduser()
    if not local.is_dir():
        return source.location
    below = sorted(file for file in local.rglob("*") if file.is_file())
    stats = [(file.relative_to(local).as_posix(), file.stat()) for file in below]
    marks = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats]
    return "\n".join([str(local.resolve()), *marks])


def read_dataset(source: SourceConfig, piece: Slice, fields: Fields) -> Iterator[Document | Rejected]:
    """The records of a slice: rows of a saved dataset, or of the shard `#number` of a streamed one."""
    with _errors(source):
        dataset = _open(source)
        if is_saved_dataset(source.location):
            stop = len(dataset) if piece.stop is None else min(piece.stop, len(dataset))
            dataset, skipped = dataset.select(range(piece.start, stop)), 0
        else:
            number, count = int(piece.file.rpartition("#")[2]), dataset.num_shards
            if number >= count:
                raise UserError(
                    f"{piece.file}: the dataset now has {count} shards; set revision to keep it as it was"
                )
            dataset, skipped = dataset.shard(num_shards=count, index=number), piece.start
        if dataset.column_names is not None:
            check_columns(fields, dataset.column_names, piece.file)
            dataset = dataset.select_columns(fields.names)
        first = piece.start - skipped
        records = read_rows(_tables(dataset, piece.file, fields), fields, first)
        yield from itertools.islice(records, skipped, None if piece.stop is None else piece.stop - first)


def _tables(dataset: Any, name: str, fields: Fields) -> Iterator[Any]:
    for table in dataset.with_format("arrow").iter(batch_size=ROWS):
        check_columns(fields, table.column_names, name)
        yield table


def _open(source: SourceConfig) -> Any:
    """The dataset's split: memory-mapped if it was saved to disk, streamed otherwise."""
    path = Path(source.location).expanduser()
    if is_saved_dataset(source.location):
        return _open_saved(path, source)
    if path.is_dir():
        return _stream.__wrapped__(str(path), source.subset, source.split, source.revision)
    return _stream(source.location, source.subset, source.split, source.revision)


@functools.lru_cache(
    maxsize=8
)  # asking the Hub for the files of a dataset takes seconds, and each slice needs them
def _stream(name: str, subset: str | None, split: str, revision: str | None) -> Any:
    import datasets

    return datasets.load_dataset(name, name=subset, split=split, revision=revision, streaming=True)


def _open_saved(path: Path, source: SourceConfig) -> Any:
    import datasets

    for key in ("subset", "revision"):
        if getattr(source, key) is not None:
            raise UserError(f"{source.path}: {key} means nothing for a dataset on disk; leave it out")
    saved = datasets.load_from_disk(str(path))
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    if source.split not in splits:
        raise UserError(f"{source.path}: no split {source.split!r}; there are: {', '.join(splits)}")
    return splits[source.split]


@contextmanager
def _errors(source: SourceConfig) -> Iterator[None]:
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
