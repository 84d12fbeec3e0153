"""Writes a token shard, and the index over the shards of a source: shard_format.py describes the files."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from llmtrain.config import UserError
from llmtrain.data.shard_format import (
    ENTRY,
    INDEX,
    MANIFEST,
    SUMS,
    TABLE,
    TABLES,
    TOKENS,
    Digests,
    Header,
    content_digest,
    entry_of,
    load_manifest,
    manifest_hash,
    sha256_of_file,
    shard_path,
    sync_file,
    write_npy,
    write_sealed,
)


class ShardWriter:
    """Writes documents into ONE shard, a new directory; nothing counts until `finish` has returned.

    The caller makes the shard visible then, by a rename. A shard without documents is a shard too.
    """

    def __init__(self, directory: Path, header: Header) -> None:
        directory.mkdir(parents=True)
        self.directory, self.header = directory, header
        self.tokens = 0
        self._lengths, self._text_bytes, self._origins = array("q"), array("q"), array("q")
        self._min_id, self._max_id = header.vocab_size, -1
        self._inputs: list[dict[str, Any]] = []
        self._rejected: Counter[str] = Counter()
        self._digests = Digests()
        self._file: BinaryIO = (directory / TOKENS).open("wb")

    def begin(self, file: str, unit: str) -> None:
        """The documents that follow come from this file, their positions being a `byte` or a `row` of it."""
        if self._inputs and not self._inputs[-1]["documents"]:
            self._inputs.pop()  # files that gave nothing would only make the manifest long
        if not self._inputs or (self._inputs[-1]["file"], self._inputs[-1]["unit"]) != (file, unit):
            self._inputs.append({"file": file, "unit": unit, "documents": 0})

    def add(self, ids: NDArray[Any], text_bytes: int, position: int) -> None:
        """Append one document of at least one id; many are appended faster by `add_batch`."""
        self.add_batch([ids], [text_bytes], [position])

    def add_batch(
        self, ids: Sequence[NDArray[Any]], text_bytes: Sequence[int], positions: Sequence[int]
    ) -> None:
        """Append documents of at least one id each: all of them, or none where an id is out of range.

        Ids are checked against the vocabulary before any cast.
        """
        assert self._inputs and len(ids) == len(text_bytes) == len(positions)
        if not len(ids):
            return
        lengths = np.fromiter(map(len, ids), np.int64, len(ids))
        if not lengths.all():
            where = f"{self._inputs[-1]['file']}:{positions[int(lengths.argmin())]}"
            raise ValueError(f"{where}: a document without ids has no place in a shard")
        flat = np.concatenate(ids)
        assert flat.dtype.kind in "iu", flat.dtype
        low, high = int(flat.min()), int(flat.max())
        if low < 0 or high >= self.header.vocab_size:
            self._refuse(flat, lengths, positions)
        data = flat.astype(self.header.dtype, copy=False).view(np.uint8).data
        self._file.write(data)
        self._digests.update(data)
        self._lengths.frombytes(lengths.tobytes())
        self._text_bytes.extend(text_bytes)
        self._origins.extend(positions)
        self._inputs[-1]["documents"] += len(ids)
        self._min_id, self._max_id = min(self._min_id, low), max(self._max_id, high)
        self.tokens += len(flat)

    def reject(self, reason: str) -> None:
        """Count a record that gave no document."""
        self._rejected[reason] += 1

    def finish(self) -> dict[str, Any]:
        """Write what stands beside the tokens; everything is on disk when this returns the manifest."""
        sync_file(self._file)
        self._file.close()
        if self._inputs and not self._inputs[-1]["documents"]:
            self._inputs.pop()
        ids = (self._min_id, self._max_id) if self.tokens else (0, -1)
        tables = {
            "offsets": np.concatenate([[0], np.cumsum(_int64(self._lengths))]),
            "text_bytes": _int64(self._text_bytes),
            "origins": _int64(self._origins),
        }
        return write_manifest(
            self.directory, self.header, tables, self._digests, ids, self._inputs, dict(self._rejected)
        )

    def _refuse(self, flat: NDArray[Any], lengths: NDArray[np.int64], positions: Sequence[int]) -> None:
        first = int(np.flatnonzero((flat < 0) | (flat >= self.header.vocab_size))[0])
        document = int(np.searchsorted(np.cumsum(lengths), first, "right"))
        raise UserError(
            f"{self._inputs[-1]['file']}:{positions[document]}: the tokenizer gave the id {int(flat[first])},"
            f" outside its own vocabulary of {self.header.vocab_size}; its files are damaged or do not belong"
            " together"
        )


def _int64(values: array[int]) -> NDArray[np.int64]:
    return np.frombuffer(values, np.int64) if values else np.empty(0, np.int64)


def write_manifest(
    directory: Path,
    header: Header,
    tables: Mapping[str, NDArray[np.int64]],
    tokens: Digests,
    ids: tuple[int, int],
    inputs: Sequence[Mapping[str, Any]],
    rejected: Mapping[str, int],
) -> dict[str, Any]:
    """Write what stands beside a shard's tokens.bin: the TABLES, and the manifest, which it returns.

    `tokens` has seen the bytes of tokens.bin; `ids` are the smallest and the largest.
    """
    digests = {TOKENS: tokens.finish()}
    for name in TABLES:
        digests[f"{name}.npy"] = write_npy(directory / f"{name}.npy", tables[name].astype("<i8", copy=False))
    manifest = header.as_dict() | {
        "tokens": int(tables["offsets"][-1]),
        "documents": len(tables["text_bytes"]),
        "text_bytes": int(tables["text_bytes"].sum()),
        "min_id": ids[0],
        "max_id": ids[1],
        "sha256": tokens.whole.hexdigest(),
        "blocks": content_digest(digests),
        "rejected": dict(rejected),
        "inputs": list(inputs),
        "block_digests": digests,
    }
    write_sealed(directory / MANIFEST, manifest)
    return manifest


# The index


def write_index(directory: Path, header: Header, count: int, **extra: Any) -> dict[str, Any]:
    """Write the index over shard-00000 .. from their manifests, with `extra` in it; return it.

    UserError where a manifest is missing, damaged or of another tokenizer. `extra["fingerprint"]` names what
    the source was made from; without it the content does.
    """
    table = np.zeros(count, ENTRY)
    rejected: Counter[str] = Counter()
    for number in range(count):
        manifest = load_manifest(shard_path(directory, number), header)
        table[number] = entry_of(manifest)
        rejected.update(manifest["rejected"])
    return write_table(directory, header, table, rejected=dict(rejected), **extra)


def write_table(directory: Path, header: Header, table: NDArray[np.void], **extra: Any) -> dict[str, Any]:
    """Write index.npy and then index.json, each either whole or absent; return the latter."""
    index = header.as_dict() | {"shards": len(table)}
    index |= {name: int(table[name].sum()) for name in SUMS}
    index["manifest_hash"] = manifest_hash(header, table)
    assert not index.keys() & extra.keys()
    aside = directory / f".{TABLE}.tmp"
    write_npy(aside, table)
    index["table_sha256"] = sha256_of_file(aside)
    aside.replace(directory / TABLE)
    write_sealed(directory / INDEX, index | extra)
    return index | extra
