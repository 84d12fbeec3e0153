"""How much of a source's windows was padding, after any number of them: counted by shard, never by window.

k   how many windows of the source were served before
"""

from __future__ import annotations

from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

from llmtrain.data.stream import Stream
from llmtrain.data.windows import BestFit


class Padding:
    """The padding of best-fit windows in the order in which they are served.

    It is added up from what is remembered of each shard, but for the span that is under way: its shards are
    those that are being read.
    """

    def __init__(self, stream: Stream, windows: BestFit) -> None:
        self._stream, self._windows = stream, windows
        self._sums = lru_cache(maxsize=2)(self._sum_span)
        self.before = lru_cache(maxsize=4096)(self._before)
        """Padding of the windows that are served before the k-th."""

    @cached_property
    def of_pass(self) -> int:
        """Padding of a pass whose size is known."""
        return self._windows.padding(np.arange(self._stream.source.shards))

    def _before(self, k: int) -> int:
        if k == 0:
            return 0
        place = self._stream.place(k - 1)
        first, sums = self._sums(place.epoch, place.span)
        return int(sums[k - first])

    def _sum_span(self, epoch: int, span: int) -> tuple[int, NDArray[np.int64]]:
        """The k of a span's first window, and the padding before each of its windows: int64 [windows + 1]."""
        at = self._stream.span(epoch, span)
        windows = [self._windows.paddings(p.shard)[p.start : p.stop] for p in at.units]
        paddings = np.concatenate(windows)
        before = self._windows.padding(at.shards) + int(paddings[: at.order.min()].sum())
        if epoch:
            before += epoch * self.of_pass
        return at.first, before + np.concatenate([[0], np.cumsum(paddings[at.order])])
