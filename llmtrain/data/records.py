"""What readers give and what they read: records, and the parts into which a source's input is cut."""

from __future__ import annotations

from typing import NamedTuple

from llmtrain.tokenizer.base import Ids

KEPT_BYTES = 1 << 16
"""Of a bad record, so much is kept."""


class Document(NamedTuple):
    """A text and where it stands."""

    text: str
    position: int
    """Byte offset of its record in the file, or its row: as the slice's `unit` says; both from 0."""


class TokenDocument(NamedTuple):
    """A document that is tokens already, control ids included."""

    ids: Ids
    position: int


class Rejected(NamedTuple):
    """A record without usable text."""

    reason: str
    """One of REASONS."""
    position: int
    record: bytes
    """Its first KEPT_BYTES bytes."""
    size: int
    """All its bytes."""
    detail: str = ""
    """What exactly is wrong, for people."""


Record = Document | TokenDocument | Rejected

EMPTY = "empty"
"""No visible character: the one reason that is no mistake. It is counted, but never held against a file."""
REASONS = (
    EMPTY,
    "malformed JSON",
    "not an object",
    "duplicate key",
    "missing field",
    "null",
    "not text",
    "not UTF-8",
    "half a surrogate pair",
    "NUL",
    "too long",
)


class Slice(NamedTuple):
    """A stretch of one file (or dataset) that is read from its start."""

    file: str
    """Path, URL or name."""
    start: int
    stop: int | None
    """Bytes, rows or row groups start .. stop - 1; None where nobody knows before reading."""
    unit: str
    """What a document's position counts: `byte`, or `row`."""
    size: int | None
    """Bytes on disk, for progress and order; None where nobody knows."""
    mark: str = ""
    """Size and time of a file on this machine when the input was cut; nothing where that is not watched."""


class Part(NamedTuple):
    """Consecutive slices that become one shard."""

    slices: tuple[Slice, ...]

    @property
    def size(self) -> int | None:
        """Bytes on disk; None where nobody knows."""
        sizes = [piece.size for piece in self.slices]
        return None if None in sizes else sum(size or 0 for size in sizes)
