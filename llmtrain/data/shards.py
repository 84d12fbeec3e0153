"""Token shards on disk: written once, atomically; read by memory map, each block checked at its first read.

    <directory>/index.json                    everything that opening needs; written last
    <directory>/shard-00000/tokens.bin        ids, little-endian uint16 or uint32
                            offsets.npy       int64 [documents + 1], token offsets of the documents
                            text_bytes.npy    int64 [documents], UTF-8 bytes of each document's text
                            manifest.json     what the shard holds, and a digest of each 1 MiB block

No document crosses a shard. `manifest_hash` in the index depends on the content alone, so two machines that
prepared the same text agree on it.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from array import array
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llmtrain.config import UserError
from llmtrain.files import sync

VERSION = 1
INDEX = "index.json"
SHARD_TOKENS = 2**26
"""Tokens after which a shard is closed: 128 or 256 MiB, small enough to copy and large enough to be few."""
BLOCK = 2**20
"""Bytes a digest covers: checked in about a millisecond."""
MAX_OPEN = 256
"""Shards a source keeps mapped; far below the usual limit of open files and maps."""
_DIGEST = 16  # hex digits of sha256 kept for a block
_HASHED = ("version", "tokenizer", "vocab_size", "boundary", "dtype")
_HASHED_OF_SHARD = ("tokens", "documents", "text_bytes", "min_id", "max_id", "sha256", "blocks")


def id_dtype(vocab_size: int) -> str:
    """The smallest of "<u2" and "<u4" that holds ids 0 .. vocab_size - 1."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that is either whole or absent, and on disk when this returns."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        _sync(file)
    aside.replace(path)
    sync(path.parent)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


class _Digests:
    """sha256 of a byte stream and a digest of each of its blocks, computed as the bytes pass."""

    def __init__(self) -> None:
        self.whole = hashlib.sha256()
        self.blocks: list[str] = []
        self._block = hashlib.sha256()
        self._room = BLOCK

    def update(self, data: memoryview) -> None:
        self.whole.update(data)
        while len(data):
            part, data = data[: self._room], data[self._room :]
            self._block.update(part)
            self._room -= len(part)
            if not self._room:
                self._close()

    def finish(self) -> list[str]:
        if self._room < BLOCK:
            self._close()
        return self.blocks

    def _close(self) -> None:
        self.blocks.append(self._block.hexdigest()[:_DIGEST])
        self._block, self._room = hashlib.sha256(), BLOCK


class _Shard:
    """One shard while it is written."""

    def __init__(self, directory: Path, dtype: str) -> None:
        directory.mkdir()
        self.directory, self.dtype = directory, dtype
        self.offsets, self.text_bytes = array("q", [0]), array("q")
        self.min_id, self.max_id = 2**32, -1
        self.inputs: list[dict[str, Any]] = []
        self._digests = _Digests()
        self._file: BinaryIO = (directory / "tokens.bin").open("wb")

    @property
    def tokens(self) -> int:
        return self.offsets[-1]

    def add(self, ids: NDArray[Any], low: int, high: int, text_bytes: int, file: str, row: int) -> None:
        """Append a document whose smallest id is `low` and whose largest is `high`."""
        data = ids.astype(self.dtype).tobytes()
        self._file.write(data)
        self._digests.update(memoryview(data))
        self.offsets.append(self.tokens + len(ids))
        self.text_bytes.append(text_bytes)
        self.min_id, self.max_id = min(self.min_id, low), max(self.max_id, high)
        if self.inputs and self.inputs[-1]["file"] == file:
            self.inputs[-1]["last_row"] = row
            self.inputs[-1]["documents"] += 1
        else:
            self.inputs.append({"file": file, "first_row": row, "last_row": row, "documents": 1})

    def finish(self, header: dict[str, Any]) -> dict[str, Any]:
        """Write what stands beside the tokens; return the shard's entry in the index."""
        _sync(self._file)
        self._file.close()
        blocks = {
            "tokens": self._digests.finish(),
            "offsets": _write_npy(self.directory / "offsets.npy", self.offsets),
            "text_bytes": _write_npy(self.directory / "text_bytes.npy", self.text_bytes),
        }
        entry = {
            "name": self.directory.name,
            "tokens": self.tokens,
            "documents": len(self.text_bytes),
            "text_bytes": sum(self.text_bytes),
            "min_id": self.min_id,
            "max_id": self.max_id,
            "sha256": self._digests.whole.hexdigest(),
            "blocks": _hash_of(blocks),
        }
        write_json(
            self.directory / "manifest.json",
            {**header, **entry, "block_digests": blocks, "inputs": self.inputs},
        )
        return entry


def _write_npy(path: Path, values: array[int]) -> list[str]:
    with path.open("wb") as file:
        np.save(file, np.frombuffer(values, "<i8") if values else np.empty(0, "<i8"))
        _sync(file)
    return _digests_of_file(path)


def _digests_of_file(path: Path) -> list[str]:
    digests = _Digests()
    with path.open("rb") as file:
        while data := file.read(BLOCK):
            digests.update(memoryview(data))
    return digests.finish()


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def _manifest_hash(index: dict[str, Any]) -> str:
    digest = hashlib.sha256(json.dumps([index[key] for key in _HASHED]).encode())
    for entry in index["shards"]:
        digest.update(" ".join(str(entry[key]) for key in _HASHED_OF_SHARD).encode() + b"\n")
    return digest.hexdigest()


class ShardWriter:
    """Writes documents into the shards of one new directory; nothing counts until `finish`.

    The caller makes the directory visible (a rename) after `finish` has returned: index.json is written
    last and everything is on disk by then.
    """

    def __init__(
        self,
        directory: Path,
        *,
        tokenizer: str,
        vocab_size: int,
        boundary: str,
        shard_tokens: int = SHARD_TOKENS,
    ) -> None:
        directory.mkdir(parents=True)
        self._directory, self._vocab_size, self._shard_tokens = directory, vocab_size, shard_tokens
        self._header = {
            "version": VERSION,
            "tokenizer": tokenizer,
            "vocab_size": vocab_size,
            "boundary": boundary,
            "dtype": id_dtype(vocab_size),
        }
        self._entries: list[dict[str, Any]] = []
        self._shard: _Shard | None = None

    def add(self, ids: NDArray[Any], text_bytes: int, file: str = "", row: int = 0) -> None:
        """Append one document of at least one id; ids are checked against the vocabulary before any cast."""
        if not len(ids):
            raise ValueError(f"{file}:{row}: a document without ids has no place in a shard")
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= self._vocab_size:
            wrong = low if low < 0 else high
            raise UserError(
                f"{file}:{row}: the tokenizer gave the id {wrong}, outside its own vocabulary"
                f" of {self._vocab_size}; its files are damaged or do not belong together"
            )
        if self._shard is None:
            name = f"shard-{len(self._entries):05d}"
            self._shard = _Shard(self._directory / name, str(self._header["dtype"]))
        self._shard.add(ids, low, high, text_bytes, file, row)
        if self._shard.tokens >= self._shard_tokens:
            self._close_shard()

    def finish(self, **extra: Any) -> dict[str, Any]:
        """Close the last shard and write the index, with `extra` in it; return the index."""
        self._close_shard()
        index = {**self._header, "shards": self._entries, **extra}
        for key in ("tokens", "documents", "text_bytes"):
            index[key] = sum(entry[key] for entry in self._entries)
        index["manifest_hash"] = _manifest_hash(index)
        write_json(self._directory / INDEX, index)
        return index

    def _close_shard(self) -> None:
        if self._shard is not None:
            self._entries.append(self._shard.finish(self._header))
            self._shard = None


class _OpenShard:
    """A shard's mapped tokens and, for each of its blocks, whether it has been checked."""

    def __init__(self, tokens: NDArray[Any], digests: list[str], checked: bytearray) -> None:
        self.tokens, self.digests, self.checked = tokens, digests, checked
        self.bytes = tokens.view(np.uint8)


class ShardedSource:
    """A prepared directory, read by (shard, token span); safe to read from several threads.

    Opening reads index.json and nothing else. A shard's files are mapped when first wanted, and the
    least recently mapped are let go beyond MAX_OPEN.
    """

    def __init__(self, directory: Path, index: dict[str, Any]) -> None:
        self.directory, self.index = directory, index
        shards = index["shards"]
        self.tokens: int = index["tokens"]
        self.documents: int = index["documents"]
        self.manifest_hash: str = index["manifest_hash"]
        self.lengths = np.array([entry["tokens"] for entry in shards], np.int64)
        """Tokens of each shard, int64 [shards]."""
        self._dtype = np.dtype(index["dtype"])
        self._open_shards: dict[int, _OpenShard] = {}
        self._checked: dict[int, bytearray] = {}  # outlives the maps: a block is checked once
        self._tables: dict[tuple[str, int], NDArray[np.int64]] = {}
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path) -> ShardedSource:
        """Open a prepared directory; UserError where it is none, or where its index contradicts itself."""
        try:
            index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
        except OSError as error:
            raise UserError(f"{directory} is not a prepared directory: {INDEX}: {error.strerror}") from error
        except ValueError as error:
            raise UserError(f"{directory / INDEX} is not JSON ({error}): prepare again") from error
        _check_index(directory, index)
        return cls(directory, index)

    def read(self, shard: int, start: int, stop: int) -> NDArray[Any]:
        """The ids start .. stop - 1 of a shard, a read-only view in the dtype on disk."""
        opened = self._open_shards.get(shard) or self._map(shard)
        if start < stop:
            size = self._dtype.itemsize
            first, last = start * size // BLOCK, (stop * size - 1) // BLOCK + 1
            while (block := opened.checked.find(0, first, last)) >= 0:
                self._check_block(shard, opened, block)
        return opened.tokens[start:stop]

    def offsets(self, shard: int) -> NDArray[np.int64]:
        """Token offsets of a shard's documents, int64 [documents + 1], mapped."""
        return self._table("offsets", shard)

    def text_bytes(self, shard: int) -> NDArray[np.int64]:
        """UTF-8 bytes of the text of each of a shard's documents, int64 [documents], mapped."""
        return self._table("text_bytes", shard)

    def _path(self, shard: int) -> Path:
        return self.directory / self.index["shards"][shard]["name"]

    def _map(self, shard: int) -> _OpenShard:
        with self._lock:
            if shard in self._open_shards:
                return self._open_shards[shard]
            path, expected = self._path(shard) / "tokens.bin", int(self.lengths[shard]) * self._dtype.itemsize
            size = _size(path)
            if size != expected:
                raise _corrupt(path, f"has {size} bytes instead of {expected}")
            digests = self._manifest(shard)["block_digests"]["tokens"]
            checked = self._checked.setdefault(shard, bytearray(len(digests)))
            tokens = np.memmap(path, self._dtype, "r").view(np.ndarray)
            _make_room(self._open_shards)
            self._open_shards[shard] = _OpenShard(tokens, digests, checked)
            return self._open_shards[shard]

    def _check_block(self, shard: int, opened: _OpenShard, block: int) -> None:
        data = opened.bytes[block * BLOCK : (block + 1) * BLOCK]
        if hashlib.sha256(data.data).hexdigest()[:_DIGEST] != opened.digests[block]:
            raise _corrupt(self._path(shard) / "tokens.bin", f"block {block} (1 MiB) has a wrong digest")
        opened.checked[block] = 1

    def _table(self, name: str, shard: int) -> NDArray[np.int64]:
        key = (name, shard)
        table = self._tables.get(key)
        if table is None:
            table = self._load_table(name, shard)
            with self._lock:
                _make_room(self._tables)
                self._tables[key] = table
        return table

    def _load_table(self, name: str, shard: int) -> NDArray[np.int64]:
        entry, path = self.index["shards"][shard], self._path(shard) / f"{name}.npy"
        _size(path)
        if _digests_of_file(path) != self._manifest(shard)["block_digests"][name]:
            raise _corrupt(path, "has a wrong digest")
        table = np.load(path, mmap_mode="r").view(np.ndarray)
        ends_well = name != "offsets" or (table[0] == 0 and table[-1] == entry["tokens"])
        if len(table) != entry["documents"] + (name == "offsets") or not ends_well:
            raise _corrupt(path, "does not fit the index")
        return table

    def _manifest(self, shard: int) -> dict[str, Any]:
        path = self._path(shard) / "manifest.json"
        try:
            manifest = json.loads(path.read_text(encoding="utf-8"))
            right = _hash_of(manifest["block_digests"]) == self.index["shards"][shard]["blocks"]
        except (OSError, ValueError, KeyError) as error:
            raise _corrupt(path, f"cannot be read: {error!r}") from error
        if not right:
            raise _corrupt(path, f"does not belong to {INDEX}")
        return manifest


def _corrupt(file: Path, what: str) -> UserError:
    """A shard is not what its index says."""
    return UserError(f"{file}: {what}; delete the directory {file.parent.parent} and prepare again")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise _corrupt(path, f"cannot be read: {error.strerror}") from error


def _make_room(opened: dict[Any, Any]) -> None:
    while len(opened) >= MAX_OPEN:
        del opened[next(iter(opened))]


def _check_index(directory: Path, index: dict[str, Any]) -> None:
    path = directory / INDEX
    if index.get("version") != VERSION:
        raise UserError(f"{path}: version {index.get('version')} is not {VERSION}: prepare again")
    if index["dtype"] != id_dtype(index["vocab_size"]):
        raise UserError(f"{path}: dtype {index['dtype']} does not suit vocab_size {index['vocab_size']}")
    for entry in index["shards"]:
        if not 0 <= entry["min_id"] <= entry["max_id"] < index["vocab_size"]:
            raise UserError(
                f"{directory / entry['name']}: ids {entry['min_id']} to {entry['max_id']} do not fit"
                f" vocab_size {index['vocab_size']}"
            )
    if sum(entry["tokens"] for entry in index["shards"]) != index["tokens"]:
        raise UserError(f"{path}: the shards' tokens do not add up to {index['tokens']}: prepare again")
    if _manifest_hash(index) != index["manifest_hash"]:
        raise UserError(f"{path}: manifest_hash does not fit the content: prepare again")
