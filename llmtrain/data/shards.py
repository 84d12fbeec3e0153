"""Token shards, read by memory map; each block is checked at its first read, before any token of it is used.

shard_format.py describes the files. No library but numpy is needed to read them (here within a directory):

    offsets = np.load("shard-00000/offsets.npy", mmap_mode="r")
    tokens = np.memmap("shard-00000/tokens.bin", "<u2", "r")  # the `dtype` in manifest.json
    document = tokens[offsets[1] : offsets[2]]  # the second; of an empty shard there is nothing to map
    text_bytes = np.load("shard-00000/text_bytes.npy")[1]

A source is complete, with an index over its shards, or it grows: shards are awaited one by one, and what each
holds is known from its manifest.
"""

from __future__ import annotations

import mmap
import os
import threading
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.shard_format import (
    BLOCK,
    ENTRY,
    INDEX,
    MANIFEST,
    SUMS,
    TABLES,
    TOKENS,
    Header,
    block_digest,
    damaged,
    digests_of_file,
    entry_of,
    load_index,
    load_manifest,
    load_npy,
    manifest_hash,
    open_file,
    shard_path,
)
from llmtrain.data.shard_writer import ShardWriter, write_index
from llmtrain.files import allow_open_files, sync

__all__ = [
    "INDEX", "Header", "LocalShards", "Origin", "ShardWriter", "ShardedSource", "Shards", "load_index",
    "shard_path", "write_index",
]  # fmt: skip

MAX_OPEN = 128
"""Shards a source keeps mapped, and of their tables as many: each takes a file descriptor."""
MAX_MANIFESTS = 16
"""Manifests a source keeps parsed: those of many small files are long."""


class Shards(Protocol):
    """Where the shards of a source are, and when."""

    @property
    def count(self) -> int:
        """How many there are, known from the start."""

    @property
    def header(self) -> Header:
        """What they have in common."""

    @property
    def fingerprint(self) -> str:
        """Names what they are made from; known from the start."""

    @property
    def directory(self) -> Path:
        """What stands here may be written beside the shards."""

    @property
    def max_open(self) -> int:
        """How many of them to keep mapped at most."""

    @property
    def complete(self) -> bool:
        """Whether there is an index over all of them; cheap to ask, and never False again once True."""

    def table(self) -> NDArray[np.void] | None:
        """The index, ENTRY [count], when complete."""

    def path(self, shard: int) -> Path:
        """The local directory of a shard; waits until it is there: made, or fetched."""

    def manifest(self, shard: int) -> dict[str, Any]:
        """The checked manifest of a shard, which may be there before the shard is; waits."""

    def want(self, shards: Sequence[int]) -> None:
        """These are needed soon, in this order: a hint, and returns at once."""


class LocalShards:
    """A complete prepared directory of this machine."""

    complete, max_open = True, MAX_OPEN

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.index, self.header, self._table = load_index(directory)
        self.count = len(self._table)
        self.fingerprint: str = self.index.get("fingerprint", self.index["manifest_hash"])

    def table(self) -> NDArray[np.void]:
        return self._table

    def path(self, shard: int) -> Path:
        return shard_path(self.directory, shard)

    def manifest(self, shard: int) -> dict[str, Any]:
        return load_manifest(self.path(shard), self.header)

    def want(self, shards: Sequence[int]) -> None:
        """They are here already."""


class Origin(NamedTuple):
    """Where a document comes from."""

    file: str
    unit: str
    """What `position` counts: `byte` or `row`."""
    position: int


class _Content(NamedTuple):
    """What the index says of all shards together."""

    table: NDArray[np.void]
    manifest_hash: str
    sums: dict[str, int]


class _OpenShard:
    """A shard's mapped tokens and, for each of its blocks, whether it has been checked."""

    def __init__(
        self,
        path: Path,
        tokens: NDArray[Any],
        mapped: mmap.mmap | bytes,
        digests: list[str],
        checked: bytearray,
    ) -> None:
        self.path, self.tokens, self.mapped = path, tokens, mapped
        self.digests, self.checked = digests, checked

    def forget(self, start: int, stop: int) -> None:
        """Count these bytes, which begin a page, no longer as memory of this process."""
        if isinstance(self.mapped, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
            self.mapped.madvise(mmap.MADV_DONTNEED, start, min(stop, len(self.mapped)) - start)


class ShardedSource:
    """The shards of one source, read by (shard, token span); safe to read from several threads.

    A shard's files are mapped when first wanted, and those mapped first are let go beyond `max_open`.
    Whatever is damaged raises a UserError that names the file, before any token of it is given away.
    """

    def __init__(self, shards: Shards) -> None:
        allow_open_files()
        self.shards = shards.count
        self.header, self.fingerprint = shards.header, shards.fingerprint
        self._shards = shards
        self._lengths = np.full(shards.count, -1, np.int64)  # -1: not known yet
        self._content: _Content | None = None
        self._dtype = np.dtype(shards.header.dtype)
        self._open_shards: dict[int, _OpenShard] = {}
        self._tables: dict[tuple[str, int], NDArray[np.int64]] = {}
        # It outlives the maps, so that a block is checked once: which file a shard was, and its blocks.
        self._checked: dict[int, tuple[tuple[int, int], bytearray]] = {}
        self._manifest = lru_cache(MAX_MANIFESTS)(self._load_manifest)
        self._input_ends = lru_cache(MAX_MANIFESTS)(self._sum_inputs)
        self._lock = threading.Lock()
        self._learn()

    @classmethod
    def open(cls, directory: Path) -> ShardedSource:
        """Open a complete prepared directory; UserError where it is none, or where its index is damaged."""
        return cls(LocalShards(directory))

    @property
    def complete(self) -> bool:
        """Whether all lengths are known."""
        return self._learn() is not None

    @property
    def manifest_hash(self) -> str | None:
        """Names the content: equal hashes, equal tokens. None until complete."""
        content = self._learn()
        return content and content.manifest_hash

    @property
    def tokens(self) -> int | None:
        """Tokens in all shards; None until complete."""
        return self._sum("tokens")

    @property
    def documents(self) -> int | None:
        """Documents in all shards; None until complete."""
        return self._sum("documents")

    @property
    def index(self) -> dict[str, Any]:
        """index.json of a complete source: what follows from the table, and the rest if `Shards` has it."""
        content = self._learn()
        assert content is not None
        known = {"shards": self.shards, **content.sums, "manifest_hash": content.manifest_hash}
        return {**self.header.as_dict(), **known, **(getattr(self._shards, "index", None) or {})}

    def lengths(self, shards: NDArray[np.integer[Any]]) -> NDArray[np.int64]:
        """Tokens of these shards, int64; waits until all of them are there."""
        found = self._lengths[shards]
        if (found < 0).any() and self._learn() is None:
            for shard in np.asarray(shards)[found < 0].tolist():
                self._manifest(shard)
        return self._lengths[shards]

    def want(self, shards: Sequence[int]) -> None:
        """These shards are needed soon, in this order: a hint, and returns at once.

        Of the others those that were removed are let go: while they are mapped they take their disk.
        """
        with self._lock:
            for shard in self._open_shards.keys() - set(shards):
                if self._was_removed(shard):
                    del self._open_shards[shard]
                    for name in TABLES:
                        self._tables.pop((name, shard), None)
        self._shards.want(shards)

    def read(self, shard: int, start: int, stop: int) -> NDArray[Any]:
        """The ids start .. stop - 1 of a shard, a read-only view in the dtype on disk; waits."""
        opened = self._open_shards.get(shard) or self._map(shard)
        if start < stop:
            size = self._dtype.itemsize
            first, last = start * size // BLOCK, (stop * size - 1) // BLOCK + 1
            while (block := opened.checked.find(0, first, last)) >= 0:
                self._check_block(opened, block)
        return opened.tokens[start:stop]

    def offsets(self, shard: int) -> NDArray[np.int64]:
        """Token offsets of a shard's documents, int64 [documents + 1], mapped; waits."""
        return self._documents_table("offsets", shard)

    def text_bytes(self, shard: int) -> NDArray[np.int64]:
        """UTF-8 bytes of the text of each of a shard's documents, int64 [documents], mapped; waits."""
        return self._documents_table("text_bytes", shard)

    # Where documents come from

    def remembered(self, name: str) -> NDArray[np.int64]:
        """A number a shard, int64 [shards]: -1 where nobody has written it; kept beside the shards.

        Where that directory cannot be written, or holds something else, it lives as long as this process.
        """
        path = self._shards.directory / f"{name}-{self.fingerprint[:16]}.int64"
        try:
            if not path.exists() or path.stat().st_size != 8 * self.shards:
                aside = path.with_name(f".{path.name}.{os.getpid()}")
                np.full(self.shards, -1, "<i8").tofile(aside)
                sync(aside)
                aside.replace(path)
            return np.memmap(path, "<i8", "r+", shape=(self.shards,)).view(np.ndarray)
        except OSError:
            return np.full(self.shards, -1, np.int64)

    def inputs(self, shard: int) -> list[dict[str, Any]]:
        """The files behind a shard in the order of its documents, {file, unit, documents} each; waits."""
        return list(self._manifest(shard)["inputs"])

    def positions(self, shard: int) -> NDArray[np.int64]:
        """The byte or row of each of a shard's documents in its file, int64 [documents], mapped; waits."""
        return self._documents_table("origins", shard)

    def origin(self, shard: int, document: int) -> Origin:
        """Where a shard's document comes from; waits."""
        position = int(self.positions(shard)[document])
        one = self._manifest(shard)["inputs"][bisect_right(self._input_ends(shard), document)]
        return Origin(one["file"], one["unit"], position)

    def _sum_inputs(self, shard: int) -> list[int]:
        return list(accumulate(one["documents"] for one in self._manifest(shard)["inputs"]))

    # What is known of the shards

    def _learn(self) -> _Content | None:
        """The content once the shards are complete: from then on their index has the word."""
        if self._content is None and self._shards.complete:
            table = self._shards.table()
            assert table is not None
            with self._lock:
                known = np.flatnonzero(self._lengths >= 0)
                other = known[self._lengths[known] != table["tokens"][known]]
                if len(other):
                    shard = int(other[0])
                    raise damaged(self._shards.path(shard) / MANIFEST, f"does not belong to {INDEX}")
                self._lengths = table["tokens"].astype(np.int64)
                sums = {name: int(table[name].sum()) for name in SUMS}
                self._content = _Content(table, manifest_hash(self.header, table), sums)
            self._manifest.cache_clear()  # so that what was read by its own word is held against the index
        return self._content

    def _sum(self, name: str) -> int | None:
        content = self._learn()
        return content and content.sums[name]

    def _load_manifest(self, shard: int) -> dict[str, Any]:
        """The checked manifest of a shard; waits until it is there."""
        manifest = self._shards.manifest(shard)
        content = self._learn()
        if content is not None:
            entry = np.array(entry_of(manifest), ENTRY)
            if entry.tobytes() != content.table[shard].tobytes():
                file = shard_path(self._shards.directory, shard) / MANIFEST
                raise damaged(file, f"does not belong to {INDEX}")
        with self._lock:
            self._lengths[shard] = manifest["tokens"]
        return manifest

    # Maps

    def _map(self, shard: int) -> _OpenShard:
        directory, manifest = self._shards.path(shard), self._manifest(shard)  # waits: hold no lock
        path, digests = directory / TOKENS, manifest["block_digests"][TOKENS]
        expected = manifest["tokens"] * self._dtype.itemsize
        with open_file(path) as file:
            status = os.fstat(file.fileno())
            if status.st_size != expected:
                raise damaged(path, f"has {status.st_size} bytes instead of {expected}")
            # Nothing cannot be mapped.
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if expected else b""
        identity = _identity(status)
        with self._lock:
            before = self._checked.get(shard)
            if before is None or before[0] != identity:  # a file that was fetched again is another one
                before = self._checked[shard] = identity, bytearray(len(digests))
            if shard not in self._open_shards:
                _make_room(self._open_shards, self._shards.max_open)
                tokens = np.frombuffer(mapped, self._dtype)
                self._open_shards[shard] = _OpenShard(path, tokens, mapped, digests, before[1])
            return self._open_shards[shard]

    def _was_removed(self, shard: int) -> bool:
        """Whether the file that is mapped is gone; another of its name may have been fetched since."""
        try:
            return _identity(self._open_shards[shard].path.stat()) != self._checked[shard][0]
        except OSError:
            return True

    def _check_block(self, opened: _OpenShard, block: int) -> None:
        size = BLOCK // self._dtype.itemsize
        ids = opened.tokens[block * size : (block + 1) * size]
        if block_digest(ids.view(np.uint8)) != opened.digests[block]:
            raise damaged(opened.path, f"block {block} (1 MiB) has a wrong digest")
        if int(ids.max()) >= self.header.vocab_size:
            position = block * size + int(ids.argmax())
            outside = f"outside the vocabulary of {self.header.vocab_size}"
            raise damaged(opened.path, f"token {position} is {ids.max()}, {outside}")
        opened.checked[block] = 1
        opened.forget(block * BLOCK, (block + 1) * BLOCK)  # all of it was read, and little is needed now

    def _documents_table(self, name: str, shard: int) -> NDArray[np.int64]:
        key = (name, shard)
        table = self._tables.get(key)
        if table is None:
            table = self._load_documents_table(name, shard)
            with self._lock:
                _make_room(self._tables, self._shards.max_open)
                self._tables[key] = table
        return table

    def _load_documents_table(self, name: str, shard: int) -> NDArray[np.int64]:
        path, manifest = self._shards.path(shard) / f"{name}.npy", self._manifest(shard)
        if digests_of_file(path) != manifest["block_digests"][path.name]:
            raise damaged(path, "has a wrong digest")
        table = load_npy(path, np.dtype("<i8"), manifest["documents"] + (name == "offsets"))
        if name == "offsets":  # begin at 0, end at the last token, and grow: no document is empty
            sound = table[0] == 0 and table[-1] == manifest["tokens"] and (np.diff(table) > 0).all()
        else:
            sound = table.min(initial=0) >= 0
        if name == "text_bytes":
            sound = sound and table.sum() == manifest["text_bytes"]
        if not sound:
            raise damaged(path, f"does not fit {MANIFEST}")
        return table


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_ino, status.st_mtime_ns


def _make_room(opened: dict[Any, Any], most: int) -> None:
    while len(opened) >= most:
        del opened[next(iter(opened))]
