"""Rows of Arrow tables to records: what parquet files and Hugging Face datasets have in common."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from llmtrain.config import UserError
from llmtrain.data.readers.fields import BadRecordError, Fields
from llmtrain.data.records import Document, Rejected

ROWS = 256
"""Rows that are decoded at a time."""


def check_columns(fields: Fields, there: list[str], name: str) -> None:
    """UserError where a column is missing: in a table that is no matter of single records."""
    for field in fields.names:
        if field not in there:
            raise UserError(f"{name}: {fields.no_such_key(field, there)}")


def read_rows(batches: Iterable[Any], fields: Fields, position: int) -> Iterator[Document | Rejected]:
    """The records of Arrow batches or tables that have the columns; `position` is that of the first row."""
    for batch in batches:
        columns = [_values(batch.column(name)) for name in fields.names]
        for values in zip(*columns, strict=True):
            row = dict(zip(fields.names, values, strict=True))
            try:
                yield Document(fields.text(row), position)
            except BadRecordError as bad:
                yield bad.rejected(position, _as_bytes(row))
            position += 1


def _values(column: Any) -> list[Any]:
    """Python values; UnicodeDecodeError objects in the place of text that is none."""
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        return [_decoded(value) for value in column.cast("large_binary").to_pylist()]


def _decoded(value: bytes | None) -> Any:
    try:
        return None if value is None else value.decode()
    except UnicodeDecodeError as error:
        return error


def _as_bytes(row: Mapping[str, Any]) -> bytes:
    """What is kept of a row that is rejected: its one text, or its fields as JSON."""
    shown = {
        name: value.object if isinstance(value, UnicodeDecodeError) else value for name, value in row.items()
    }
    if len(shown) == 1:
        (value,) = shown.values()
        if isinstance(value, bytes):
            return value
        if isinstance(value, str):
            return value.encode()
    return json.dumps(shown, ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")
