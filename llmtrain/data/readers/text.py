"""A file that is one document."""

from __future__ import annotations

from collections.abc import Iterator

from llmtrain.data.readers.fields import BadRecordError, Fields, decode
from llmtrain.data.readers.files import CHUNK, opened
from llmtrain.data.readers.jsonl import BOM
from llmtrain.data.records import KEPT_BYTES, Document, Rejected, Slice


def read_text(piece: Slice, compression: str, fields: Fields) -> Iterator[Document | Rejected]:
    """The file's text, without a byte order mark."""
    if piece.start > 0:
        return  # the document is at position 0
    with opened(piece.file, compression) as stream:
        held: list[bytes] = []
        size = 0
        while chunk := stream.read(CHUNK):
            held.append(chunk)
            size += len(chunk)
            if size > fields.max_bytes + len(BOM):  # read on all the same: a damaged file is to be noticed
                held = [b"".join(held)[:KEPT_BYTES]]
    content = b"".join(held)
    if size > fields.max_bytes + len(BOM):
        yield fields.too_long(content, size, 0)
        return
    content = content.removeprefix(BOM)
    try:
        text = decode(content)
        yield Document(fields.checked(text, text, "the file"), 0)
    except BadRecordError as bad:
        yield bad.rejected(0, content)
