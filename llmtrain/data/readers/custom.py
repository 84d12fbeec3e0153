"""Documents of a source that another package reads."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from llmtrain.data.config import CustomSourceConfig
from llmtrain.data.readers.fields import Fields
from llmtrain.data.records import Document, Rejected, Slice

MIXING = {"weight", "epochs"}
"""Keys of a source that say nothing of its text."""


def custom_slices(source: CustomSourceConfig) -> list[Slice]:
    """A slice for each part."""
    return [Slice(name, 0, None, "row", size) for name, size in source.parts().items()]


def read_custom(source: CustomSourceConfig, piece: Slice, fields: Fields) -> Iterator[Document | Rejected]:
    """The documents of a slice; one that is no usable text is a bad record."""
    texts = enumerate(source.documents(piece.file))
    for row, text in islice(texts, piece.start, piece.stop):
        yield fields.of_text(text, row)


def custom_mark(source: CustomSourceConfig) -> str:
    """What changes when the text may have: the class, its keys, and what the source says itself."""
    keys = source.model_dump_json(exclude=MIXING)
    return f"{type(source).__module__}.{type(source).__qualname__} {keys} {source.version()}"
