"""Held-out documents in the order of their shards: every target once, and the bytes of text behind them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import numpy as np

from llmtrain.data.batch import Batch
from llmtrain.data.packing import Documents, Row, pack
from llmtrain.data.stream import Layout, TokenSource

CHUNK = 1 << 20
"""Tokens that are counted at once."""


class DocumentSource(TokenSource, Protocol):
    """Prepared tokens that also know how much text each document was."""

    def text_bytes(self, shard: int) -> np.ndarray:
        """The length of each document's text in UTF-8: int64 [documents]."""


class HeldOut:
    """The first `documents_limit` documents of a source (None: all) as batches of `rows` windows.

    Window w holds the tokens wL .. wL + L, so that every token but the first is a label once. Where
    documents are kept apart the first token of each is context only, as in training. Iterating gives
    `len(held_out)` batches; all have `rows` rows, filled up with rows without targets.
    """

    def __init__(
        self,
        source: DocumentSource,
        seq_len: int,
        rows: int,
        documents_limit: int | None = None,
        documents: Documents = "separate",
    ) -> None:
        self._source, self._seq_len, self._rows, self._documents = source, seq_len, rows, documents
        self.documents = self.text_bytes = 0
        lengths = []
        for shard in range(len(source.lengths)):
            left = None if documents_limit is None else documents_limit - self.documents
            if left == 0:
                break
            text_bytes = source.text_bytes(shard)[:left]
            self.documents += len(text_bytes)
            self.text_bytes += int(text_bytes.sum())
            lengths.append(int(source.offsets(shard)[len(text_bytes)]))
        self.tokens = sum(lengths)
        self._layout = Layout(range(len(lengths)), lengths)

    def __len__(self) -> int:
        targets_of_batch = self._rows * self._seq_len
        return -(-max(self.tokens - 1, 0) // targets_of_batch)

    def __iter__(self) -> Iterator[Batch]:
        return map(self.batch, range(len(self)))

    def batch(self, index: int) -> Batch:
        """One batch; past the end a batch without targets, so that ranks can stay in step."""
        windows = range(index * self._rows, (index + 1) * self._rows)
        return pack([self._row(window) for window in windows], self._seq_len, self._documents)

    def _row(self, window: int) -> Row:
        start = window * self._seq_len
        stop = min(start + self._seq_len + 1, self.tokens)
        return Row(0, self._source, self._layout.pieces(0, start, stop))


def held_out_batches(
    source: DocumentSource,
    seq_len: int,
    rows: int,
    documents_limit: int | None = None,
    documents: Documents = "separate",
) -> HeldOut:
    """Sequential windows over held-out documents, with the bytes of text they cover as `.text_bytes`."""
    return HeldOut(source, seq_len, rows, documents_limit, documents)


def unigram_counts(source: TokenSource, vocab_size: int, limit_tokens: int | None = None) -> np.ndarray:
    """How often each id occurs in the first `limit_tokens` tokens (None: all): int64 [vocab_size]."""
    counts = np.zeros(vocab_size, np.int64)
    left = source.tokens if limit_tokens is None else min(limit_tokens, source.tokens)
    for shard, length in enumerate(source.lengths.tolist()):
        for start in range(0, min(length, left), CHUNK):
            stop = min(start + CHUNK, length, start + left)
            counts += np.bincount(source.read(shard, start, stop), minlength=vocab_size)
            left -= stop - start
    return counts
