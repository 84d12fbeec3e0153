"""A JSON object a line. A file is cut anywhere: a line belongs to the slice in which its first byte lies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import BinaryIO

from llmtrain.data.readers.fields import Fields
from llmtrain.data.readers.files import CHUNK, advance, opened
from llmtrain.data.records import KEPT_BYTES, Document, Rejected, Slice

BOM = b"\xef\xbb\xbf"


def read_jsonl(piece: Slice, compression: str, fields: Fields) -> Iterator[Document | Rejected]:
    """The records of the lines that begin in the slice; blank lines are none."""
    limit, document = fields.max_bytes, fields.document
    with opened(piece.file, compression) as stream:
        if piece.start:
            advance(stream, piece.start - 1, bool(compression))
        for position, line, size in _lines(stream, piece.start, piece.stop, limit):
            if size > limit:
                yield fields.too_long(line, size, position)
                continue
            if line.startswith(BOM):  # of the file, or of one of those that it was put together from
                line = line[len(BOM) :]
            if line and not line.isspace():
                yield document(line, position)


def _lines(stream: BinaryIO, start: int, stop: int | None, limit: int) -> Iterator[tuple[int, bytes, int]]:
    """(position, line, bytes) of the lines that begin at start .. stop - 1; split at \\n alone.

    The stream stands at start - 1: where that byte ends a line, the slice begins with a whole one. Of a line
    longer than `limit` only the first bytes are given.
    """
    stop = sys.maxsize if stop is None else stop
    partial = _Partial(limit)
    position = max(0, start - 1)  # where the line under way begins
    skip = start > 0  # it belongs to the slice before
    while position < stop and (chunk := stream.read(CHUNK)):
        first, *others = chunk.split(b"\n")
        partial.add(first)
        if not others:
            continue
        line, size = partial.take()
        if not skip:
            yield position, line, size
        skip = False
        position += size + 1
        partial.add(others.pop())
        for line in others:
            if position >= stop:
                return
            yield position, line, len(line)
            position += len(line) + 1
    if not skip and partial.size and position < stop:
        yield position, *partial.take()


class _Partial:
    """The start of a line whose end has not been read; of one that is too long its first bytes only.

    These are KEPT_BYTES at least, wherever chunks end: what is kept of a record is told by the file alone.
    """

    def __init__(self, limit: int) -> None:
        self.size = 0
        self._limit = max(limit, KEPT_BYTES)
        self._held: list[bytes] = []

    def add(self, content: bytes) -> None:
        if self.size <= self._limit:
            self._held.append(content)
        self.size += len(content)
        if self.size > self._limit and len(self._held) > 1:
            self._held = [b"".join(self._held)[:KEPT_BYTES]]

    def take(self) -> tuple[bytes, int]:
        """(line or its first bytes, its size); the next line begins."""
        taken = b"".join(self._held), self.size
        self._held, self.size = [], 0
        return taken
