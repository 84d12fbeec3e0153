"""Parquet files. They are cut at row groups; positions, starts and stops are rows of the file."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from llmtrain.config import UserError
from llmtrain.data.readers.fields import Fields
from llmtrain.data.readers.files import open_raw
from llmtrain.data.readers.tables import ROWS, check_columns, read_rows
from llmtrain.data.records import Document, Rejected, Slice


def read_parquet(piece: Slice, fields: Fields) -> Iterator[Document | Rejected]:
    """The records of rows start .. stop - 1; a file that is damaged is a UserError naming the row."""
    with _opened(piece.file) as (file, place):
        check_columns(fields, file.schema_arrow.names, piece.file)
        starts = _starts(file)
        stop = starts[-1] if piece.stop is None else min(piece.stop, starts[-1])
        groups = [
            number
            for number, (first, last) in enumerate(pairwise(starts))
            if first < stop and last > piece.start and first < last
        ]
        if not groups:
            return
        place[0] = starts[groups[0]]
        batches = (  # group by group: a batch of several would put a damaged page's row too far ahead
            batch
            for group in groups
            for batch in file.iter_batches(batch_size=ROWS, row_groups=[group], columns=fields.names)
        )
        for record in read_rows(batches, fields, place[0]):
            place[0] = record.position + 1
            if record.position >= stop:
                return
            if record.position >= piece.start:
                yield record


def row_groups(name: str) -> list[int]:
    """The rows at which the groups of a file begin, and at last their number; reads the footer alone."""
    with _opened(name) as (file, _):
        return _starts(file)


def check_parquet(name: str, fields: Fields) -> None:
    """UserError where a column is missing; reads the footer alone."""
    with _opened(name) as (file, _):
        check_columns(fields, file.schema_arrow.names, name)


def _starts(file: Any) -> list[int]:
    metadata = file.metadata
    starts = [0]
    for number in range(metadata.num_row_groups):
        starts.append(starts[-1] + metadata.row_group(number).num_rows)
    return starts


@contextmanager
def _opened(name: str) -> Iterator[tuple[Any, list[int]]]:
    """(parquet file, [row that is being read]); what pyarrow raises is a UserError naming file and row."""
    import pyarrow
    from pyarrow import parquet

    place = [0]
    try:
        with open_raw(name) as raw, parquet.ParquetFile(raw, page_checksum_verification=True) as file:
            yield file, place
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"{name}: row {place[0]} cannot be read as parquet: {error}") from error
