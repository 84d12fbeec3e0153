"""How many tokens each source holds: exact where it is prepared, from a small sample where it is raw."""

from __future__ import annotations

import gzip
import math
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from llmtrain.data import readers
from llmtrain.data.config import DataConfig, SourceConfig
from llmtrain.data.megatron import flat_layout, megatron_documents
from llmtrain.data.plan import Size
from llmtrain.data.readers.files import CHUNK, open_raw, unpack_zstd
from llmtrain.data.readers.formats import compression, file_format
from llmtrain.data.records import Record, Rejected, Slice, TokenDocument
from llmtrain.tokenizer.base import Tokenizer

SAMPLE_BYTES = 4_000_000
"""Text tokenised of each source, about."""
PLACES = 32
"""Evenly spaced places in a source's bytes at which the sample is taken."""
PLACE_BYTES = SAMPLE_BYTES // PLACES
READ_TIMES = 16
"""Of a file that can only be read from its beginning, so many times the text is read that is tokenised."""
RATIO_BYTES = 8 << 20
"""Content unpacked to learn how far a file is compressed."""

Prepared = Callable[[str, SourceConfig], int | None]
"""The exact tokens of a source that has its shards already, by name and config; None where it has not."""


def source_sizes(data: DataConfig, tokenizer: Tokenizer | None, prepared: Prepared) -> dict[str, Size]:
    """The size of every source; the tokenizer is needed where a source is text that is not yet prepared.

    The sizes are those of the training text, without the documents that are held out.
    """
    return {name: _size(name, source, data, tokenizer, prepared) for name, source in data.sources.items()}


def needs_tokenizer(source: SourceConfig) -> bool:
    """Whether the size of a source depends on the tokenizer: not for a bare size, and not for tokens."""
    return source.path is not None and readers.resolve_format(source) not in ("shards", *_TOKEN_BYTES)


def _size(
    name: str, source: SourceConfig, data: DataConfig, tokenizer: Tokenizer | None, prepared: Prepared
) -> Size:
    if source.tokens is not None:
        return Size(source.tokens, True, "declared")
    tokens = prepared(name, source)
    if tokens is not None:
        return Size(tokens, True, "prepared")
    return estimate(source, data, tokenizer)


def estimate(source: SourceConfig, data: DataConfig, tokenizer: Tokenizer | None) -> Size:
    """Bytes on disk times the tokens a byte of a sample, less what will be held out."""
    slices = [piece for part in readers.parts(source) for piece in part.slices]
    kept = 1 - data.validation_fraction
    kind = readers.resolve_format(source)
    if kind in _TOKEN_BYTES:
        return Size(
            round(kept * sum(_TOKEN_BYTES[kind](piece) for piece in slices)), False, "files of tokens"
        )
    sizes = [piece.size for piece in slices]
    if None in sizes:
        return Size(None, False, "nobody knows how large it is before it is read")
    assert tokenizer is not None, "text is measured with the tokenizer"
    total = sum(size or 0 for size in sizes)
    sample = _Sample(tokenizer, {"bos_eos": 2, "bos": 1, "eos": 1, "none": 0}[data.boundary])
    weights = _places([_bounded(piece, source) for piece in slices], total)
    wanted = SAMPLE_BYTES / max(1, sum(weights.values()))
    weighted = (
        weight * sample.density(piece, readers.read(source, piece, data.max_document_bytes), wanted * weight)
        for piece, weight in weights.items()
    )
    density = sum(weighted) / max(1, sum(weights.values()))
    if not density:
        why = f": {sample.refused}" if sample.refused else ""
        return Size(None, False, f"there is no text in a sample of it{why}")
    sampled = f"{density:.4g} tokens a byte in a sample of {sample.encoded_bytes / 1e6:.1f} MB"
    how = f"{total / 1e6:,.1f} MB on disk, {sampled}"
    return Size(round(kept * total * density), False, how)


_TOKEN_BYTES: dict[str, Callable[[Slice], int]] = {
    "megatron": lambda piece: int(megatron_documents(piece.file).lengths.sum()),
    "nanogpt": lambda piece: flat_layout(Path(piece.file))[2],
}
"""Tokens of a slice in the formats that are tokens already."""


def _bounded(piece: Slice, source: SourceConfig) -> Slice:
    """The slice with its end where it can be cut, also if nobody has cut it yet."""
    if piece.unit == "byte" and not compression(piece.file) and file_format(piece.file, source) == "jsonl":
        return piece._replace(stop=piece.size if piece.stop is None else piece.stop)
    return piece


def _places(slices: Sequence[Slice], total: int) -> dict[Slice, int]:
    """Pieces to read and the weight of each: all of a small source, else pieces at evenly spaced bytes.

    A piece that is found in proportion to its size counts once each time, whatever its size.
    """
    if total <= SAMPLE_BYTES:
        return {piece: piece.size for piece in slices if piece.size}
    ends = list(accumulate(piece.size or 0 for piece in slices))
    found = Counter[Slice]()
    for place in range(PLACES):
        at = (2 * place + 1) * total // (2 * PLACES)
        number = bisect_right(ends, at)
        before = ends[number - 1] if number else 0
        found[_cut(slices[number], at - before)] += 1
    return found


def _cut(piece: Slice, at: int) -> Slice:
    """About PLACE_BYTES of a slice around its byte `at`, if it can be cut."""
    size = piece.size or 0
    if piece.stop is None or size <= PLACE_BYTES:
        return piece
    units = piece.stop - piece.start  # bytes or rows, each row taken to be of the same size
    length = max(1, units * PLACE_BYTES // size)
    start = piece.start + min(units - length, max(0, units * at // size - length // 2))
    return piece._replace(start=start, stop=start + length, size=max(1, size * length // units))


class _Sample:
    """Reads pieces and counts."""

    def __init__(self, tokenizer: Tokenizer, control_ids: int) -> None:
        self._tokenizer, self._control_ids = tokenizer, control_ids
        self.encoded_bytes = 0
        self.refused = ""
        """Why the first record that was not used was not."""

    def density(self, piece: Slice, records: Iterator[Record], wanted: float) -> float:
        """Tokens, control ids included, a byte on disk of a piece, from about `wanted` bytes of its text.

        A large piece is not read to its end if the place of a record says how much of it lies before.
        """
        texts, text_bytes, held, documents = list[str](), 0, 0, 0
        disk_bytes = piece.size or 1
        every = min(READ_TIMES, max(1, disk_bytes / wanted))  # part of the text that is tokenised
        for record in records:
            if text_bytes > READ_TIMES * wanted and piece.unit == "byte":
                disk_bytes = max(1, _consumed(piece, record.position))
                break
            if isinstance(record, Rejected):
                self.refused = self.refused or record.detail or record.reason
                continue
            assert not isinstance(record, TokenDocument), "files of tokens are not sampled"
            documents += 1
            text_bytes += len(record.text.encode())
            if held < wanted and held <= text_bytes / every:
                texts.append(record.text[: math.ceil(wanted - held)])
                held += len(texts[-1].encode())
        if not held:
            return 0
        self.encoded_bytes += held
        ids = sum(len(ids) for ids in self._tokenizer.encode_batch(texts))
        return (ids * text_bytes / held + documents * self._control_ids) / disk_bytes


def _consumed(piece: Slice, position: int) -> int:
    """Bytes on disk before the record at `position`, a byte of the content."""
    packed = compression(piece.file)
    return round(position * _packing(piece.file, packed)) if packed else position - piece.start


def _packing(name: str, packed: str) -> float:
    """Bytes on disk a byte of content, from the beginning of a compressed file."""
    with open_raw(name) as raw:
        stream: Any = gzip.GzipFile(fileobj=raw) if packed == ".gz" else unpack_zstd(raw)
        content = 0
        while content < RATIO_BYTES and (chunk := stream.read(CHUNK)):
            content += len(chunk)
        return raw.tell() / max(1, content)
