"""Tokens of other trainers: Megatron-LM's indexed datasets, read and written, and nanoGPT's flat files, read.

Megatron-LM (megatron/core/datasets/indexed_dataset.py), all little-endian:
    <prefix>.idx   b"MMIDIDX\\0\\0", version 1 (u64), dtype code (u8), sequences S (u64), documents + 1 (u64),
                   tokens of each sequence (i32 [S]), where each begins in the .bin in bytes (i64 [S]),
                   the first sequence of each document, and S (i64 [documents + 1])
    <prefix>.bin   the ids, sequence after sequence
nanoGPT: uint16 ids and nothing else. llm.c and modded-nanogpt put 256 int32 in front: magic, version, tokens.
"""

from __future__ import annotations

import logging
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llmtrain.config import UserError
from llmtrain.data.records import TokenDocument
from llmtrain.files import sync
from llmtrain.tokenizer.base import Ids

logger = logging.getLogger(__name__)

MAGIC, VERSION = b"MMIDIDX\x00\x00", 1
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
"""Ids by dtype code; 6 and 7 are floats, which no tokens are."""
CHUNK = 1 << 20
"""Tokens, or entries of an index, that are looked at at once."""
MAX_DOCUMENT = 1 << 26
"""Tokens of a flat file without an end-of-text id among them: it cannot be the right one."""

_HEADER = struct.Struct("<9sQBQQ")
_FLAT_HEADER = 256 * 4
_FLAT_VERSIONS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
"""By magic number, as llm.c writes them: the version that is known, and the ids' dtype."""


class Prepared(Protocol):
    """What is written: documents of ids in shards."""

    @property
    def shards(self) -> int: ...
    @property
    def index(self) -> dict[str, Any]: ...
    def read(self, shard: int, start: int, stop: int) -> NDArray[Any]: ...
    def offsets(self, shard: int) -> NDArray[np.int64]: ...


class Written(NamedTuple):
    """What `write_megatron` wrote."""

    documents: int
    tokens: int
    dtype: str
    """`uint16` or `int32`."""


def paths(prefix_or_file: Path | str) -> tuple[Path, Path]:
    """The .bin and the .idx of a dataset that is named by its prefix or by either file."""
    prefix = Path(prefix_or_file)
    if prefix.suffix in (".bin", ".idx"):
        prefix = prefix.with_suffix("")
    return prefix.with_name(prefix.name + ".bin"), prefix.with_name(prefix.name + ".idx")


class MegatronIndex:
    """An indexed dataset whose index is mapped and was found to fit its tokens."""

    def __init__(self, prefix_or_file: Path | str) -> None:
        self.tokens_file, self.index_file = paths(prefix_or_file)
        header, size = _read_header(self.index_file)
        _, _, code, sequences, edges = header
        self.dtype = np.dtype(DTYPES[code])
        """The ids' type on disk."""
        _check_index_size(self.index_file, size, sequences, edges)
        mapped = np.memmap(self.index_file, np.uint8, "r").view(np.ndarray)[_HEADER.size :]
        self._sequences = sequences
        self._lengths = mapped[: 4 * sequences].view("<i4")
        self._pointers = mapped[4 * sequences : 12 * sequences].view("<i8")
        self._edges = mapped[12 * sequences : 12 * sequences + 8 * edges].view("<i8")
        self.count = edges - 1
        """Documents; each is made of consecutive sequences, usually of one."""
        self.tokens = self._check()
        """In all documents."""

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each document, int64 [documents]; computed anew. There may be empty ones."""
        return np.diff(self._first_tokens(0, self.count + 1))

    def read(self, start_document: int = 0, stop_document: int | None = None) -> Iterator[TokenDocument]:
        """The documents start .. stop - 1 (None: to the last one), held one at a time.

        A document's position is its number. UserError for an id that int32 does not hold; whether all are in
        the vocabulary is not looked at.
        """
        stop_document = self.count if stop_document is None else min(stop_document, self.count)
        with self.tokens_file.open("rb", buffering=1 << 20) as file:
            for first in range(start_document, stop_document, CHUNK):
                firsts = self._first_tokens(first, min(first + CHUNK, stop_document) + 1)
                file.seek(int(firsts[0]) * self.dtype.itemsize)
                for document, length in enumerate(np.diff(firsts).tolist(), first):
                    ids = _read_ids(self.tokens_file, file, length, self.dtype)
                    yield TokenDocument(self._as_int32(ids, document), document)

    def _first_tokens(self, start: int, stop: int) -> NDArray[np.int64]:
        """The first token of each of these documents; of the one after the last, the number of tokens."""
        edges = self._edges[start:stop]
        out = np.full(len(edges), self.tokens, np.int64)
        inside = edges < self._sequences
        out[inside] = self._pointers[edges[inside]] // self.dtype.itemsize
        return out

    def _as_int32(self, ids: NDArray[Any], document: int) -> Ids:
        narrow = ids.astype(np.int32)
        if self.dtype.itemsize > 4 and not np.array_equal(narrow, ids):
            wrong = ids[narrow != ids][0]
            raise UserError(f"{self.tokens_file}: document {document} has the id {wrong}, which no token is")
        return narrow

    def _check(self) -> int:
        """How many tokens there are; UserError where the parts of the index contradict each other."""
        if self._edges[0] != 0 or self._edges[-1] != self._sequences or not _ascends(self._edges):
            raise _damaged(
                self.index_file,
                f"its documents do not begin at sequence 0, ascend and end at sequence {self._sequences}",
            )
        tokens = 0
        for first in range(0, self._sequences, CHUNK):
            lengths = self._lengths[first : first + CHUNK].astype(np.int64)
            begins = (tokens + np.cumsum(lengths) - lengths) * self.dtype.itemsize
            wrong = np.flatnonzero((lengths < 0) | (begins != self._pointers[first : first + CHUNK]))
            if len(wrong):
                raise _damaged(
                    self.index_file,
                    f"sequence {first + int(wrong[0])} of {int(lengths[wrong[0]])} tokens should begin at"
                    f" byte {int(begins[wrong[0]])}, not {int(self._pointers[first + wrong[0]])}",
                )
            tokens += int(lengths.sum())
        size, expected = _size(self.tokens_file), tokens * self.dtype.itemsize
        if size != expected:
            raise _damaged(
                self.tokens_file,
                f"has {size} bytes, and {self.index_file.name} says {expected} ({tokens} tokens of"
                f" {self.dtype.itemsize} bytes)",
            )
        return tokens


def megatron_documents(prefix_or_file: Path | str) -> MegatronIndex:
    """Open an indexed dataset by its prefix, .idx or .bin; UserError where its files are none or damaged."""
    return MegatronIndex(prefix_or_file)


def _read_header(path: Path) -> tuple[tuple[bytes, int, int, int, int], int]:
    """The fields of an index's header, of which only supported ones are let through, and the file's size."""
    size = _size(path)
    with path.open("rb") as file:
        data = file.read(_HEADER.size)
    if data[: len(MAGIC)] != MAGIC:
        raise UserError(f"{path}: begins with {data[:9]!r}, not {MAGIC!r}: it is no Megatron-LM index")
    if len(data) < _HEADER.size:
        raise _damaged(path, f"has {size} bytes and ends in its header of {_HEADER.size}")
    magic, version, code, sequences, edges = _HEADER.unpack(data)
    if version != VERSION:
        raise UserError(f"{path}: version {version} of the format is not {VERSION}, the only one known")
    if code not in DTYPES:
        known = ", ".join(f"{code} {np.dtype(dtype)}" for code, dtype in DTYPES.items())
        raise UserError(f"{path}: dtype code {code} is none of ids ({known}); write the dataset anew")
    return (magic, version, code, sequences, edges), size


def _check_index_size(path: Path, size: int, sequences: int, edges: int) -> None:
    expected = _HEADER.size + 12 * sequences + 8 * edges
    if edges and size == expected + sequences and sequences:
        raise UserError(f"{path}: its sequences have modes, as of images: only text can be read")
    if not edges or size != expected:
        raise _damaged(
            path, f"has {size} bytes instead of {expected} ({sequences} sequences, {edges - 1} documents)"
        )


def nanogpt_documents(
    file: Path | str, eos_id: int, vocab_size: int, start: int = 0
) -> Iterator[TokenDocument]:
    """The documents of a flat file from token `start` on, which begins one; held one at a time.

    They are told apart by the end-of-text id, the only sign there is. nanoGPT puts it behind every document;
    files with llm.c's header, and files that begin with it, have it in front. No token is left out: before
    the first of those there may be the rest of a document of the file before. A document's position is its
    first token's place in the file. UserError for a damaged header, an id outside the vocabulary and a file
    in which the id does not occur.
    """
    file = Path(file)
    begin, dtype, tokens = flat_layout(file)
    with file.open("rb") as opened:
        opened.seek(begin)
        leads = begin > 0 or _read_ids(file, opened, min(1, tokens), dtype).tolist() == [eos_id]
        opened.seek(begin + start * dtype.itemsize)
        rest: list[NDArray[Any]] = []  # of a document that has not ended, in parts
        position = start
        for place in range(start, tokens, CHUNK):
            ids = _read_ids(file, opened, min(CHUNK, tokens - place), dtype)
            _check_vocabulary(file, ids, place, vocab_size)
            cuts = np.flatnonzero(ids == eos_id) + (not leads)
            for part, ends in _parts(ids, cuts):
                rest.append(part)
                length = sum(map(len, rest))
                if ends and length:
                    yield TokenDocument(np.concatenate(rest).astype(np.int32), position)
                    position, rest = position + length, []
                elif length > MAX_DOCUMENT:
                    raise UserError(
                        f"{file}: no end-of-text id {eos_id} in the {length} tokens after token {position}:"
                        " was it written with the tokenizer of this run?"
                    )
        if 0 == position < tokens:
            logger.warning(
                "%s: no end-of-text id %d in %d tokens: read as one document", file, eos_id, tokens
            )
        if position < tokens:
            yield TokenDocument(np.concatenate(rest).astype(np.int32), position)


def _parts(ids: NDArray[Any], cuts: NDArray[np.int64]) -> Iterator[tuple[NDArray[Any], bool]]:
    """What lies between the cuts, and whether a document ends with it; what follows the last cut does not."""
    first = 0
    for cut in cuts.tolist():
        yield ids[first:cut], True
        first = cut
    yield ids[first:], False


def flat_layout(path: Path) -> tuple[int, np.dtype[Any], int]:
    """Where a flat file's ids begin in bytes, their dtype, and how many there are."""
    size = _size(path)
    with path.open("rb") as file:
        head = np.frombuffer(file.read(_FLAT_HEADER), np.uint8)
    magic, version, tokens = (head[:12].view("<i4")).tolist() if len(head) == _FLAT_HEADER else (0, 0, 0)
    if magic not in _FLAT_VERSIONS:
        if size % 2:
            raise _damaged(path, f"has {size} bytes, which are no uint16 ids")
        return 0, np.dtype("<u2"), size // 2
    known, dtype = _FLAT_VERSIONS[magic]
    if version != known:
        raise UserError(f"{path}: version {version} of its header is not {known}, the only one known")
    expected = _FLAT_HEADER + tokens * np.dtype(dtype).itemsize
    if size != expected:
        raise _damaged(path, f"has {size} bytes instead of {expected} for the {tokens} tokens of its header")
    return _FLAT_HEADER, np.dtype(dtype), tokens


def _check_vocabulary(path: Path, ids: NDArray[Any], place: int, vocab_size: int) -> None:
    if len(ids) and int(ids.max()) >= vocab_size:
        worst = int(np.argmax(ids >= vocab_size))
        raise UserError(
            f"{path}: token {place + worst} is the id {int(ids[worst])}, outside the vocabulary of"
            f" {vocab_size}; take the tokenizer that it was written with"
        )


def write_megatron(source: Prepared, prefix: Path) -> Written:
    """Write <prefix>.bin and <prefix>.idx, a sequence a document, in the order of the shards.

    Neither is visible before it is whole and on disk, and the index comes last. Ids are uint16 where
    Megatron-LM would take that for the vocabulary, int32 otherwise. UserError where a file exists already,
    and where there is no document: Megatron-LM opens no empty dataset.
    """
    tokens_file, index_file = paths(prefix)
    for path in (index_file, tokens_file):
        if path.exists():
            raise UserError(f"{path}: exists already; name another prefix, or delete it")
    sizes = [(len(offsets) - 1, int(offsets[-1])) for offsets in map(source.offsets, range(source.shards))]
    documents, tokens = (sum(column) for column in zip(*sizes, strict=True)) if sizes else (0, 0)
    if not documents:
        raise UserError(f"{prefix}: there is no document to write; prepare some text first")
    code, dtype = (8, "<u2") if source.index["vocab_size"] < 65_500 else (4, "<i4")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    _write_aside(tokens_file, lambda file: _write_tokens(source, file, dtype))
    itemsize = np.dtype(dtype).itemsize
    _write_aside(index_file, lambda file: _write_index(source, documents, file, code, itemsize))
    return Written(documents, tokens, np.dtype(dtype).name)


def _write_tokens(source: Prepared, file: BinaryIO, dtype: str) -> None:
    for shard in range(source.shards):
        length = int(source.offsets(shard)[-1])
        for start in range(0, length, CHUNK):
            file.write(source.read(shard, start, min(start + CHUNK, length)).astype(dtype).tobytes())


def _write_index(source: Prepared, documents: int, file: BinaryIO, code: int, itemsize: int) -> None:
    """Two passes over the shards' offsets, of which one shard's are held at a time."""
    file.write(_HEADER.pack(MAGIC, VERSION, code, documents, documents + 1))
    for shard in range(source.shards):
        lengths = np.diff(source.offsets(shard))
        assert lengths.max(initial=0) < 2**31
        file.write(lengths.astype("<i4").tobytes())
    before = 0
    for shard in range(source.shards):
        offsets = np.asarray(source.offsets(shard))
        file.write(((offsets[:-1] + before) * itemsize).astype("<i8").tobytes())
        before += int(offsets[-1])
    for first in range(0, documents + 1, CHUNK):
        file.write(np.arange(first, min(first + CHUNK, documents + 1), dtype="<i8").tobytes())


def _write_aside(path: Path, write: Callable[[BinaryIO], None]) -> None:
    """Write a file under another name and give it its own once it is on disk."""
    aside = path.with_name(path.name + ".tmp")
    try:
        with aside.open("wb", buffering=1 << 20) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def _read_ids(path: Path, file: BinaryIO, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    ids = np.frombuffer(file.read(count * dtype.itemsize), dtype)
    if len(ids) != count:
        raise _damaged(path, "became shorter while it was read")
    return ids


def _ascends(values: NDArray[np.int64]) -> bool:
    starts = range(0, len(values), CHUNK)
    return all((np.diff(values[start : start + CHUNK + 1]) >= 0).all() for start in starts)


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise UserError(
            f"{path}: {error.strerror}; a dataset is a .bin and, of Megatron-LM, an .idx"
        ) from error


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"{path}: {what}; copy or write it again")
