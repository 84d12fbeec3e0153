"""A source as an endless stream of tokens, and the order in which its windows are served.

T      tokens of the source             L   seq_len
pass   the e-th reading of the whole source, its shards in an order of its own; passes follow without a gap
window w of the stream: the tokens wL .. wL + L, whose last L are the labels
k      how many windows of the source were served before
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple, Protocol

import numpy as np

from llmtrain.data.permutation import Permutation


class TokenSource(Protocol):
    """Prepared tokens in shards; a shard begins with the beginning of a document."""

    @property
    def manifest_hash(self) -> str:
        """Names the content: equal hashes, equal tokens."""

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each shard: int64 [shards]."""

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        """The ids start .. stop - 1 of a shard."""

    def offsets(self, shard: int) -> np.ndarray:
        """Where each document of a shard begins, and where the last one ends: int64 [documents + 1]."""


class Piece(NamedTuple):
    """Consecutive tokens of one shard."""

    epoch: int
    """The pass they are read in, from 0."""
    shard: int
    start: int
    stop: int


class Layout:
    """Shards laid end to end."""

    def __init__(self, shards: Sequence[int], lengths: Sequence[int]) -> None:
        self.shards = shards
        self.ends = list(accumulate(lengths))

    def pieces(self, epoch: int, start: int, stop: int) -> list[Piece]:
        """What lies between two positions, cut at the shards."""
        pieces = []
        while start < stop:
            place = bisect_right(self.ends, start)  # skips empty shards, which end where they begin
            begin, end = self.ends[place - 1] if place else 0, self.ends[place]
            pieces.append(Piece(epoch, self.shards[place], start - begin, min(stop, end) - begin))
            start = end
        return pieces


class Stream:
    """The endless stream of one source: `window` says which is served k-th, `pieces` where its tokens are."""

    def __init__(self, source: TokenSource, name: str, seed: int, seq_len: int, shuffle_span: int) -> None:
        assert source.tokens > 0
        self.source, self.name = source, name
        self._seed, self._seq_len, self._shuffle_span = seed, seq_len, shuffle_span
        self._tokens = int(source.tokens)
        self._filled = np.flatnonzero(source.lengths)
        self._layout = lru_cache(maxsize=4)(self._build_layout)
        self._permutation = lru_cache(maxsize=4)(self._build_permutation)

    def first_window(self, epoch: int) -> int:
        """The first window that a pass owns: those that begin in it, ceil(eT / L) and up."""
        return -(-epoch * self._tokens // self._seq_len)

    def window(self, k: int) -> int:
        """The window that is served k-th: a keyed permutation within the spans of a pass."""
        epoch = k * self._seq_len // self._tokens
        first = self.first_window(epoch)
        span, index = divmod(k - first, self._shuffle_span)
        return first + span * self._shuffle_span + self._permutation(epoch, span)(index)

    def pieces(self, window: int) -> list[Piece]:
        """Where the L + 1 tokens of a window are, in the order of the stream."""
        epoch, start = divmod(window * self._seq_len, self._tokens)
        stop = start + self._seq_len + 1
        pieces = self._layout(epoch).pieces(epoch, start, min(stop, self._tokens))
        while stop > self._tokens:
            epoch, stop = epoch + 1, stop - self._tokens
            pieces += self._layout(epoch).pieces(epoch, 0, min(stop, self._tokens))
        return pieces

    def _build_permutation(self, epoch: int, span: int) -> Permutation:
        windows = self.first_window(epoch + 1) - self.first_window(epoch)
        size = min(self._shuffle_span, windows - span * self._shuffle_span)
        return Permutation(size, self._seed, self.name, epoch, span)

    def _build_layout(self, epoch: int) -> Layout:
        """The shards of a pass in its keyed order.

        Every pass begins with the shard that the first one begins with. The very first token of the stream
        is the label of no window, and the first of the next pass is one too many: they have to be the same.
        """
        count = len(self._filled)
        head = Permutation(count, self._seed, self.name, 0)(0)
        place = Permutation(count, self._seed, self.name, epoch)
        order = self._filled[[head, *(shard for shard in map(place, range(count)) if shard != head)]]
        return Layout(order.tolist(), self.source.lengths[order].tolist())
