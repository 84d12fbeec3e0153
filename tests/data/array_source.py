"""Sources held in memory, with the face of prepared ones: shards are lists of documents of ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class ArraySource:
    complete = True

    def __init__(
        self, shards: Sequence[Sequence[Sequence[int]]], text_bytes: Sequence[Sequence[int]] | None = None
    ) -> None:
        self._tokens = [np.array([i for document in shard for i in document], np.uint16) for shard in shards]
        self._offsets = [np.cumsum([0, *map(len, shard)], dtype=np.int64) for shard in shards]
        self._text_bytes = text_bytes or [[len(document) for document in shard] for shard in shards]
        self._lengths = np.array([len(tokens) for tokens in self._tokens], np.int64)
        self.shards = len(shards)
        self.tokens: int | None = int(self._lengths.sum())
        self.documents = sum(map(len, shards))
        self.wanted: list[list[int]] = []
        """What was hinted at, call by call."""
        self.memory: dict[str, np.ndarray] = {}
        content = repr([list(map(list, shard)) for shard in shards]).encode()
        self.manifest_hash: str | None = hashlib.sha256(content).hexdigest()
        self.fingerprint = hashlib.sha256(b"input" + content).hexdigest()

    def lengths(self, shards: np.ndarray) -> np.ndarray:
        return self._lengths[shards]

    def want(self, shards: Sequence[int]) -> None:
        self.wanted.append(list(shards))

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        return self._tokens[shard][start:stop]

    def offsets(self, shard: int) -> np.ndarray:
        return self._offsets[shard]

    def text_bytes(self, shard: int) -> np.ndarray:
        return np.array(self._text_bytes[shard], np.int64)

    def remembered(self, name: str) -> np.ndarray:
        return self.memory.setdefault(name, np.full(self.shards, -1, np.int64))


class GrowingSource:
    """The same source while it is being prepared: a shard is made when it is first asked for.

    It is complete once all were. `asked` are the shards in the order in which they were made.
    """

    def __init__(self, source: ArraySource) -> None:
        self._source = source
        self.shards, self.fingerprint = source.shards, source.fingerprint
        self.asked: list[int] = []
        self.wanted: list[list[int]] = []

    @property
    def complete(self) -> bool:
        return len(self.asked) == self.shards

    @property
    def manifest_hash(self) -> str | None:
        return self._source.manifest_hash if self.complete else None

    @property
    def tokens(self) -> int | None:
        return self._source.tokens if self.complete else None

    def lengths(self, shards: np.ndarray) -> np.ndarray:
        for shard in shards.tolist():
            self._make(shard)
        return self._source.lengths(shards)

    def want(self, shards: Sequence[int]) -> None:
        self.wanted.append(list(shards))

    def remembered(self, name: str) -> np.ndarray:
        return np.full(self.shards, -1, np.int64)

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        self._make(shard)
        return self._source.read(shard, start, stop)

    def offsets(self, shard: int) -> np.ndarray:
        self._make(shard)
        return self._source.offsets(shard)

    def text_bytes(self, shard: int) -> np.ndarray:
        self._make(shard)
        return self._source.text_bytes(shard)

    def _make(self, shard: int) -> None:
        if shard not in self.asked:
            self.asked.append(shard)


def numbered(shards: Sequence[Sequence[int]], first: int = 0) -> ArraySource:
    """A source of the documents with these lengths, in which no two tokens are equal."""
    documents = []
    for shard in shards:
        documents.append([])
        for length in shard:
            documents[-1].append(range(first, first + length))
            first += length
    return ArraySource(documents)
