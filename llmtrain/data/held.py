"""What the best-fit windows of a source hold, after any number of them: counted by shard, never by window.

k   how many windows of the source were served before
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.stream import Stream
from llmtrain.data.windows import BestFit


class Held(NamedTuple):
    """What some windows hold."""

    tokens: int
    """Tokens that are at home in them: each token of a source is so in one window a pass."""
    padding: int
    """Inputs that hold no token."""


class Tally:
    """What best-fit windows hold in the order in which they are served.

    It is added up from what is remembered of each shard, but for the spans in which a stretch begins and
    ends: when they are first asked for, their shards are read.
    """

    def __init__(self, stream: Stream, windows: BestFit) -> None:
        self._stream, self._windows = stream, windows
        self._sums = lru_cache(maxsize=2)(self._sum_span)
        self._before = lru_cache(maxsize=4096)(self._sum_before)

    def between(self, first: int, last: int) -> Held:
        """What the first-th to the (last - 1)-th window hold; waits for no text behind these."""
        if first == last:
            return Held(0, 0)
        tokens, padding = (self._before(last, last - 1) - self._before(first, first)).tolist()
        return Held(tokens, padding)

    def _sum_before(self, k: int, window: int) -> NDArray[np.int64]:
        """What is served before the k-th, which is in the span of the window or follows it: int64 [2]."""
        if k == 0:
            return np.zeros(2, np.int64)
        place = self._stream.place(window)
        first, sums = self._sums(place.epoch, place.span)
        row: NDArray[np.int64] = sums[k - first]
        return row

    def _sum_span(self, epoch: int, span: int) -> tuple[int, NDArray[np.int64]]:
        """The k of a span's first window, and what is held before each of them: int64 [windows + 1, 2]."""
        at = self._stream.span(epoch, span)
        held = np.concatenate([self._windows.held(p.shard)[p.start : p.stop] for p in at.units])
        before = self._windows.held_by(at.shards) + held[: at.order.min()].sum(0)
        if epoch:
            before += epoch * self._windows.held_by(np.arange(self._stream.source.shards))
        return at.first, before + np.concatenate([np.zeros((1, 2), np.int64), np.cumsum(held[at.order], 0)])
