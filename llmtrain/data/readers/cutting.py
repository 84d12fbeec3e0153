"""How a source's input is cut: from names and sizes alone, so that every process finds the same parts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from itertools import pairwise

from llmtrain.config import UserError
from llmtrain.data.config import CustomSourceConfig, SourceConfig
from llmtrain.data.readers.custom import custom_mark, custom_slices
from llmtrain.data.readers.embedded import embedded_fingerprint, embedded_slices
from llmtrain.data.readers.fields import Fields
from llmtrain.data.readers.files import InputFile, is_url
from llmtrain.data.readers.formats import compression, file_format, input_files, resolve_format
from llmtrain.data.readers.huggingface import check_dataset, dataset_extent, dataset_mark
from llmtrain.data.readers.parquet import check_parquet, row_groups
from llmtrain.data.records import Part, Slice

SMALLEST, LARGEST = 16 << 20, 512 << 20
"""Bytes of input a part."""
MOST_PARTS = 4096
"""About so many parts a source has, until they have reached LARGEST."""


def part_bytes(total: int) -> int:
    """Bytes that a part of a source of `total` bytes has at most, where its input can be cut."""
    wanted = -(-total // MOST_PARTS)
    return min(LARGEST, max(SMALLEST, 1 << max(0, wanted - 1).bit_length()))


def parts(source: SourceConfig) -> list[Part]:
    """The parts of a source in their fixed order; names, sizes and parquet's footers tell them."""
    slices = list(_slices(source, resolve_format(source)))
    return [
        Part(tuple(group)) for group in _groups(slices, part_bytes(sum(piece.size or 0 for piece in slices)))
    ]


def _groups(slices: Iterable[Slice], limit: int) -> Iterator[list[Slice]]:
    """Consecutive slices of together `limit` bytes at most; one of unknown size stays alone."""
    group: list[Slice] = []
    held = 0
    for piece in slices:
        size = limit if piece.size is None else piece.size
        if group and held + size > limit:
            yield group
            group, held = [], 0
        group.append(piece)
        held += size
    if group:
        yield group


def _slices(source: SourceConfig, kind: str) -> Iterator[Slice]:
    if isinstance(source, CustomSourceConfig):
        yield from custom_slices(source)
    elif kind == "embedded":
        yield from embedded_slices(source.location)
    elif kind == "huggingface":
        yield from _dataset_slices(source)
    else:
        found = input_files(source)
        limit = part_bytes(sum(file.size or 0 for file in found))
        for file in found:
            yield from _file_slices(file, file_format(file.name, source), limit)


def _file_slices(file: InputFile, kind: str, limit: int) -> Iterator[Slice]:
    unit = "byte" if kind in ("jsonl", "json", "text") else "row"
    count = 1 if file.size is None else max(1, -(-file.size // limit))
    if kind not in ("jsonl", "parquet") or compression(file.name) or count == 1:
        yield Slice(file.name, 0, None, unit, file.size, file.stamp)
        return
    assert file.size is not None
    if kind == "jsonl":
        cuts = [file.size * number // count for number in range(count + 1)]
    else:
        cuts = _thinned(row_groups(file.name), count)
    yield from _cut(file.name, cuts, unit, file.size, file.stamp)


def _thinned(places: list[int], count: int) -> list[int]:
    """Of the places where a file can be cut those just below even cuts into `count` pieces, and both ends."""
    rows = places[-1]
    chosen = {0, rows}
    for number in range(1, count):
        chosen.add(max(place for place in places if place <= rows * number // count))
    return sorted(chosen)


def _cut(name: str, cuts: list[int], unit: str, size: int, mark: str = "") -> Iterator[Slice]:
    """Slices between cuts, which share the bytes on disk by their lengths."""
    whole = max(1, cuts[-1])
    for start, stop in pairwise(cuts):
        yield Slice(name, start, stop, unit, size * stop // whole - size * start // whole, mark)


def _dataset_slices(source: SourceConfig) -> Iterator[Slice]:
    extent = dataset_extent(source)
    if extent.rows is None:
        for shard in range(extent.shards):
            yield Slice(f"{extent.name}#{shard}", 0, None, "row", None)
        return
    size = extent.size or 0
    count = -(-size // part_bytes(size)) or 1
    yield from _cut(extent.name, [extent.rows * number // count for number in range(count + 1)], "row", size)


def check(source: SourceConfig) -> None:
    """Raise a UserError if a source's input is not there or its keys do not suit it; no content is read."""
    if source.path is None:
        raise UserError("has tokens and no path, which is enough for `plan` alone: say where the text is")
    kind = resolve_format(source)
    fields = Fields(source, 0)
    if isinstance(source, CustomSourceConfig):
        source.parts()
    elif kind == "huggingface":
        check_dataset(source, fields)
    elif kind not in ("embedded", "shards"):
        kinds = {file.name: file_format(file.name, source) for file in input_files(source)}
        tables = [name for name, of_file in kinds.items() if of_file == "parquet" and not is_url(name)]
        for name in tables[:1]:
            check_parquet(name, fields)


def fingerprint(source: SourceConfig) -> str:
    """Hex sha256 that changes when the source's text may have: names, sizes, times, or embedded content."""
    kind = resolve_format(source)
    how = [kind, source.text_key, source.template, source.split, source.subset, source.revision]
    return hashlib.sha256(json.dumps([how, *_marks(source, kind)]).encode()).hexdigest()


def _marks(source: SourceConfig, kind: str) -> list[str]:
    if isinstance(source, CustomSourceConfig):
        return [custom_mark(source)]
    if kind == "embedded":
        return [source.location, embedded_fingerprint(source.location)]
    if kind == "huggingface":
        return [dataset_mark(source)]
    return [file.mark for file in input_files(source)]
