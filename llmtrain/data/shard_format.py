"""Token shards on disk, version 2: what the files are, and how it is known that they are whole.

    <directory>/index.json                    what the source is and what it sums up to; written last
                index.npy                     ENTRY [shards]: sizes and digests of every shard
                shard-00000/tokens.bin        ids, little-endian uint16 or uint32
                            offsets.npy       int64 [documents + 1], token offsets of the documents
                            text_bytes.npy    int64 [documents], UTF-8 bytes of each document's text
                            origins.npy       int64 [documents], byte offset or row of each in its file
                            manifest.json     what the shard holds, its input, and digests of 1 MiB blocks

No document crosses a shard, and a shard may be empty. Everything ends in a digest: manifest.json and
index.json hold one over themselves and those of the files beside them. `manifest_hash` depends on tokens,
text sizes and the order of the shards alone (no paths, no times, no origins), so that two machines that
prepared the same text agree on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from llmtrain.config import UserError
from llmtrain.files import sync

VERSION = 2
INDEX, TABLE, MANIFEST, TOKENS = "index.json", "index.npy", "manifest.json", "tokens.bin"
TABLES = ("offsets", "text_bytes", "origins")
BLOCK = 2**20
"""Bytes a digest covers: checked in about a millisecond."""
ENTRY = np.dtype(
    [(name, "<i8") for name in ("tokens", "documents", "text_bytes", "min_id", "max_id")]
    + [("sha256", "V32"), ("blocks", "V32")]
)
"""One shard in the index; `sha256` is that of tokens.bin, `blocks` one over the digests of the blocks."""
SUMS = ("tokens", "documents", "text_bytes")
_DIGEST = 16  # hex digits of sha256 kept for a block


@dataclass(frozen=True)
class Header:
    """What all shards of a source have in common."""

    tokenizer: str
    """Its fingerprint."""
    vocab_size: int
    boundary: str

    @property
    def dtype(self) -> str:
        """The smallest of "<u2" and "<u4" that holds ids 0 .. vocab_size - 1."""
        return "<u2" if self.vocab_size <= 2**16 else "<u4"

    def as_dict(self) -> dict[str, Any]:
        """The first keys of every manifest and index."""
        return {"version": VERSION, **asdict(self), "dtype": self.dtype}


def shard_path(directory: Path, number: int) -> Path:
    """Where a shard is: `shard-00017`."""
    return directory / f"shard-{number:05d}"


def manifest_hash(header: Header, table: NDArray[np.void]) -> str:
    """Names the content of a source: equal hashes, equal tokens in equal shards."""
    digest = hashlib.sha256(json.dumps(header.as_dict()).encode())
    digest.update(np.ascontiguousarray(table).view(np.uint8).data)
    return digest.hexdigest()


def entry_of(manifest: Mapping[str, Any]) -> tuple[Any, ...]:
    """A shard's row of the index."""
    names = ENTRY.names or ()
    return tuple(bytes.fromhex(v) if isinstance(v, str) else v for v in (manifest[name] for name in names))


def load_manifest(shard: Path, header: Header) -> dict[str, Any]:
    """The manifest in a shard's directory; UserError where it is damaged or belongs to another source."""
    path = shard / MANIFEST
    manifest = load_sealed(path)
    for key, value in header.as_dict().items():
        if manifest.get(key) != value:
            raise damaged(path, f"was written with {key} {manifest.get(key)}, not {value}")
    try:
        digests = manifest["block_digests"]
        size = manifest["tokens"] * np.dtype(header.dtype).itemsize
        sound = (
            content_digest(digests) == manifest["blocks"]
            and len(digests[TOKENS]) == -(-size // BLOCK)
            and isinstance(manifest["rejected"], dict)
            and sum(one["documents"] for one in manifest["inputs"]) == manifest["documents"]
            and ids_fit(np.array([entry_of(manifest)], ENTRY), header).all()
        )
    except (KeyError, TypeError, ValueError) as error:
        raise damaged(path, f"is not the manifest of a shard: {error!r}") from error
    if not sound:
        raise damaged(path, "contradicts itself")
    return manifest


def ids_fit(table: NDArray[np.void], header: Header) -> NDArray[np.bool_]:
    """Whether the ids of each shard are within the vocabulary; an empty shard says 0 to -1."""
    low, high, filled = table["min_id"], table["max_id"], table["tokens"] > 0
    within = (low >= 0) & (low <= high) & (high < header.vocab_size)
    return np.where(filled, within, (low == 0) & (high == -1))


def load_index(directory: Path) -> tuple[dict[str, Any], Header, NDArray[np.void]]:
    """index.json, its header and index.npy (mapped) of a directory; UserError where they are not sound.

    No file of a shard is looked at, so that 100,000 of them open as fast as ten.
    """
    path = directory / INDEX
    try:
        path.stat()
    except OSError as error:
        raise UserError(f"{directory} is not a prepared directory: {INDEX}: {error.strerror}") from error
    index = load_sealed(path)
    try:
        header = Header(index["tokenizer"], index["vocab_size"], index["boundary"])
        if index["dtype"] != header.dtype:
            raise damaged(path, f"dtype {index['dtype']} does not suit vocab_size {header.vocab_size}")
        return index, header, _load_table(directory / TABLE, index, header)
    except (KeyError, TypeError) as error:
        raise damaged(path, f"is not an index: {error!r}") from error


def _load_table(path: Path, index: dict[str, Any], header: Header) -> NDArray[np.void]:
    if sha256_of_file(path) != index["table_sha256"]:
        raise damaged(path, f"has a wrong digest: it is not the one that {INDEX} names")
    table = load_npy(path, ENTRY, index["shards"])
    wrong = np.flatnonzero(~ids_fit(table, header))
    if len(wrong):
        name, entry = shard_path(path.parent, int(wrong[0])).name, table[wrong[0]]
        ids = f"ids {entry['min_id']} to {entry['max_id']}"
        raise damaged(path, f"{name}: {ids} do not fit vocab_size {header.vocab_size}")
    for name in SUMS:
        if table[name].min(initial=0) < 0 or int(table[name].sum()) != index[name]:
            raise damaged(path, f"the {name} of the shards do not add up to {index[name]}")
    if manifest_hash(header, table) != index["manifest_hash"]:
        raise damaged(path, f"does not fit {INDEX}: manifest_hash differs")
    return table


def load_npy(path: Path, dtype: np.dtype[Any], length: int) -> NDArray[Any]:
    """An array of this type and length, mapped; UserError where the file holds something else.

    np.load would parse the header as Python, in which threads disturb each other up to Python 3.11
    (python/cpython#106905), and which fails in many ways. What numpy writes is known to the letter.
    """
    descr = np.lib.format.dtype_to_descr(dtype)
    right = f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': ({length},), }}"
    with open_file(path) as file:
        magic, size = file.read(8), int.from_bytes(file.read(2), "little")
        header = file.read(size).decode("latin1").rstrip()
        if magic != b"\x93NUMPY\x01\x00" or header != right:
            raise damaged(path, f"is not an array of {length} x {dtype}")
        start, bytes_there = file.tell(), file.seek(0, os.SEEK_END)
        if bytes_there != start + length * dtype.itemsize:
            raise damaged(path, f"has {bytes_there} bytes instead of {start + length * dtype.itemsize}")
        if not length:  # nothing cannot be mapped
            return np.empty(0, dtype)
        return np.memmap(file, dtype, "r", start, (length,)).view(np.ndarray)


# Digests and files


class Digests:
    """sha256 of a byte stream and a digest of each of its blocks, computed as the bytes pass."""

    def __init__(self) -> None:
        self.whole = hashlib.sha256()
        self._blocks: list[str] = []
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
        """The blocks' digests, _DIGEST hex digits each."""
        if self._room < BLOCK:
            self._close()
        return self._blocks

    def _close(self) -> None:
        self._blocks.append(self._block.hexdigest()[:_DIGEST])
        self._block, self._room = hashlib.sha256(), BLOCK


def block_digest(data: NDArray[np.uint8]) -> str:
    """The digest of one block."""
    return hashlib.sha256(data.data).hexdigest()[:_DIGEST]


def digests_of_file(path: Path) -> list[str]:
    """The digests of a file's blocks; UserError where it cannot be read."""
    digests = []
    with open_file(path) as file:
        while data := file.read(BLOCK):
            digests.append(hashlib.sha256(data).hexdigest()[:_DIGEST])
    return digests


def sha256_of_file(path: Path) -> str:
    """The digest of a whole file; UserError where it cannot be read."""
    with open_file(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BufferedReader]:
    """Open a file to read it; UserError where that fails."""
    try:
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from error


def content_digest(digests: Mapping[str, list[str]]) -> str:
    """One digest over those of a shard's blocks; where the documents came from is no part of the content."""
    return _hash_of({name: blocks for name, blocks in digests.items() if name != "origins.npy"})


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_npy(path: Path, values: NDArray[Any]) -> list[str]:
    """Write an array to disk for good; the digests of the file's blocks."""
    with path.open("wb") as file:
        np.save(file, values, allow_pickle=False)
        sync_file(file)
    return digests_of_file(path)


def sync_file(file: Any) -> None:
    """Have an open file's content on disk."""
    file.flush()
    os.fsync(file.fileno())


def write_sealed(path: Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object with a digest of itself, either whole or absent, and on disk when this returns."""
    aside = path.with_name(f".{path.name}.tmp")
    with aside.open("w", encoding="utf-8") as file:
        json.dump({**value, "digest": _hash_of(value)}, file, indent=1)
        sync_file(file)
    aside.replace(path)
    sync(path.parent)


def load_sealed(path: Path) -> dict[str, Any]:
    """What `write_sealed` wrote, without the digest; UserError where it is not that."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise damaged(path, f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise damaged(path, f"is not JSON ({error})") from error
    version = value.get("version") if isinstance(value, dict) else None
    if version != VERSION:
        raise UserError(
            f"{path}: version {version} of the format is not {VERSION}: prepare the text again, and give the "
            "directory that it is prepared into"
        )
    if value.pop("digest", None) != _hash_of(value):
        raise damaged(path, "has a wrong digest")
    return value


def damaged(file: Path, what: str) -> UserError:
    """A file of a prepared directory is not what it has to be."""
    inner = file.name not in (INDEX, TABLE)
    directory = file.parent.parent if inner else file.parent
    return UserError(f"{file}: {what}; delete the directory {directory} and prepare again")
