"""A source held in memory, with the face of a prepared one: shards are lists of documents of ids."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np


class ArraySource:
    def __init__(
        self, shards: Sequence[Sequence[Sequence[int]]], text_bytes: Sequence[Sequence[int]] | None = None
    ) -> None:
        self._tokens = [np.array([i for document in shard for i in document], np.uint16) for shard in shards]
        self._offsets = [np.cumsum([0, *map(len, shard)], dtype=np.int64) for shard in shards]
        self._text_bytes = text_bytes or [[len(document) for document in shard] for shard in shards]
        self.lengths = np.array([len(tokens) for tokens in self._tokens], np.int64)
        self.tokens = int(self.lengths.sum())
        self.documents = sum(map(len, shards))
        content = [list(map(list, shard)) for shard in shards]
        self.manifest_hash = hashlib.sha256(repr(content).encode()).hexdigest()

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        return self._tokens[shard][start:stop]

    def offsets(self, shard: int) -> np.ndarray:
        return self._offsets[shard]

    def text_bytes(self, shard: int) -> np.ndarray:
        return np.array(self._text_bytes[shard], np.int64)


def numbered(shards: Sequence[Sequence[int]], first: int = 0) -> ArraySource:
    """A source of the documents with these lengths, in which no two tokens are equal."""
    documents = []
    for shard in shards:
        documents.append([])
        for length in shard:
            documents[-1].append(range(first, first + length))
            first += length
    return ArraySource(documents)
