"""Held-out documents in the order of their shards: every target once, and the bytes of text behind them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import numpy as np

from llmtrain.data.batch import Batch
from llmtrain.data.packing import Documents, Row, pack
from llmtrain.data.stream import Layout
from llmtrain.data.windows import TokenSource

CHUNK = 1 << 20
"""Tokens that are counted at once."""
SHARDS_AHEAD = 4
"""Shards that are asked for while one is read."""


class DocumentSource(TokenSource, Protocol):
    """A source that also knows how much text each document was."""

    def text_bytes(self, shard: int) -> np.ndarray:
        """The length of each document's text in UTF-8: int64 [documents]; waits until the shard is there."""


class HeldOut:
    """The first `documents_limit` documents of a source (None: all) as batches of `rows` windows.

    Window w holds the tokens wL .. wL + L, so that every token but the first is a label once; which of these
    are targets, `documents` and `boundary_targets` say as in training. Iterating gives `len(held_out)`
    batches; all have `rows` rows, filled up with rows without targets. No shard behind the limit is read.
    """

    def __init__(
        self,
        source: DocumentSource,
        seq_len: int,
        rows: int,
        documents_limit: int | None = None,
        documents: Documents = "separate",
        boundary_targets: bool | None = None,
    ) -> None:
        self._source, self._seq_len, self._rows, self._documents = source, seq_len, rows, documents
        self._boundary_targets = documents == "attend" if boundary_targets is None else boundary_targets
        self.documents = self.text_bytes = 0
        lengths: list[int] = []
        while len(lengths) < source.shards and self.documents != documents_limit:
            shard = len(lengths)
            source.want(range(shard, min(shard + SHARDS_AHEAD, source.shards)))
            left = None if documents_limit is None else documents_limit - self.documents
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
        rows = [self._row(window) for window in windows]
        return pack(rows, self._seq_len, self._documents, boundary_targets=self._boundary_targets)

    def _row(self, window: int) -> Row:
        start = window * self._seq_len
        stop = min(start + self._seq_len + 1, self.tokens)
        return Row(0, self._source, self._layout.pieces(0, start, stop))


def unigram_counts(
    source: TokenSource, shards: Sequence[int], vocab_size: int, limit_tokens: int | None = None
) -> np.ndarray:
    """How often each id occurs in these shards, int64 [vocab_size].

    Counted are their first `limit_tokens` tokens (None: all); no shard behind the limit is asked for.
    """
    counts = np.zeros(vocab_size, np.int64)
    read = 0
    for number, shard in enumerate(shards):
        if read == limit_tokens:
            break
        source.want(shards[number : number + SHARDS_AHEAD])
        length = int(source.lengths(np.array([shard]))[0])
        if limit_tokens is not None:
            length = min(length, limit_tokens - read)
        for start in range(0, length, CHUNK):
            ids = source.read(shard, start, min(start + CHUNK, length))
            counts += np.bincount(ids, minlength=vocab_size)
        read += length
    return counts
