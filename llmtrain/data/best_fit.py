"""Windows that keep documents whole where they fit: best-fit decreasing, with a split to fill what is left.

Source: Ding et al. 2024, "Fewer Truncations Improve Language Modeling" (arXiv 2404.10830); the split is ours.

L        seq_len; a window has room for L + 1 tokens, of which the first L are inputs and the last L labels
piece    consecutive tokens of one document; a document that is cut goes on in another window with one token
         of overlap, its last one there, so that every token but a document's first is a label exactly once
padding  inputs of a window that hold no token: L less its tokens, but not less than 0
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections import deque
from collections.abc import Iterator
from functools import cached_property
from math import gcd
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

BLOCK_TOKENS = 2**22
"""Documents are packed among those that begin in the same stretch of a shard of so many tokens."""
BLOCK_WINDOWS = 256
"""A stretch has at least so many windows: one of them, the last, may be nearly empty."""

Spans = NDArray[np.int64]


class Windows(NamedTuple):
    """Windows of pieces: window i holds the spans edges[i] .. edges[i + 1] - 1."""

    spans: Spans
    """[pieces, 2]: the first token of each piece and the one after its last."""
    edges: NDArray[np.int64]
    """[windows + 1]"""


def best_fit(lengths: NDArray[np.int64], seq_len: int, max_padding: float) -> Windows:
    """The windows of documents that lie end to end; a pure function of their lengths [documents].

    From what is longer than a window full windows are cut first, until the rest fits one. Then a window takes
    the longest piece left, and again and again the longest that still fits; pieces of one length go in the
    order in which they came, documents before what splits left over. When none fits and the window's padding
    is above max_padding * L, the longest piece left is split to fill it. So only the last window has more
    padding. Windows stand in the order in which they were made, the pieces of each in that of their tokens.
    """
    room = seq_len + 1
    stops = np.cumsum(lengths, dtype=np.int64)
    starts = stops - lengths
    full = np.maximum(lengths - 2, 0) // seq_len  # windows after which what is left fits one
    spans = [(a + i * seq_len, a + i * seq_len + room) for a, n in _of(starts, full) for i in range(n)]
    edges = list(range(len(spans) + 1))
    starts = starts + full * seq_len
    pieces = _Pieces(starts[lengths > 0], (stops - starts)[lengths > 0])
    while pieces:
        window = _fill(pieces, room, max_padding * seq_len)
        spans += sorted(window)
        edges.append(len(spans))
    return Windows(np.array(spans, np.int64).reshape(-1, 2), np.array(edges, np.int64))


def _of(starts: NDArray[np.int64], counts: NDArray[np.int64]) -> Iterator[tuple[int, int]]:
    some = np.flatnonzero(counts)
    return zip(starts[some].tolist(), counts[some].tolist(), strict=True)


def _fill(pieces: _Pieces, room: int, padding: float) -> list[tuple[int, int]]:
    """Take the pieces of one window that has `room` and may keep so much padding."""
    window = []
    while room and pieces:
        taken = pieces.take(room)
        if taken is None:
            if room - 1 <= padding:  # one token is free without an input's being so: the last is a label only
                break
            taken = pieces.split(room)
        window.append(taken)
        room -= taken[1] - taken[0]
    return window


class _Pieces:
    """Pieces by length: the lengths there are, ascending, and the starts of each length in a queue."""

    def __init__(self, starts: NDArray[np.int64], lengths: NDArray[np.int64]) -> None:
        order = np.argsort(lengths, kind="stable")
        ascending, first = np.unique(lengths[order], return_index=True)
        self._lengths: list[int] = ascending.tolist()
        queues = np.split(starts[order], first[1:])
        self._starts = {n: deque(q.tolist()) for n, q in zip(self._lengths, queues, strict=False)}

    def __bool__(self) -> bool:
        return bool(self._lengths)

    def take(self, room: int) -> tuple[int, int] | None:
        """Remove the longest piece of at most `room` tokens, if there is one."""
        place = bisect_right(self._lengths, room) - 1
        return None if place < 0 else self._pop(place)

    def split(self, tokens: int) -> tuple[int, int]:
        """Remove the first `tokens` > 1 of the longest piece, which has more; the last of them stays, too."""
        start, stop = self._pop(-1)
        self._add(start + tokens - 1, stop)
        return start, start + tokens

    def _pop(self, place: int) -> tuple[int, int]:
        length = self._lengths[place]
        queue = self._starts[length]
        start = queue.popleft()
        if not queue:
            del self._lengths[place]
        return start, start + length

    def _add(self, start: int, stop: int) -> None:
        queue = self._starts.setdefault(stop - start, deque())
        if not queue:
            insort(self._lengths, stop - start)
        queue.append(start)


class ShardPacking:
    """The windows of one shard, given the offsets of its documents (int64 [documents + 1]).

    The documents of a block are packed together: those that begin in the same stretch of BLOCK_TOKENS tokens
    (more where a window is so long that these would be less than BLOCK_WINDOWS windows). A block's windows
    are made in order of their longest pieces and would be a curriculum of shrinking documents: they are
    served in another order, in which all lengths stand side by side, however the caller permutes it. Nothing
    is computed before it is wanted; kept are 16 bytes a piece and 8 a window.
    """

    def __init__(self, offsets: NDArray[np.int64], seq_len: int, max_padding: float) -> None:
        self._offsets, self._seq_len, self._max_padding = offsets, seq_len, max_padding

    @cached_property
    def count(self) -> int:
        """How many windows there are."""
        return len(self._windows.edges) - 1

    @property
    def paddings(self) -> NDArray[np.int64]:
        """The padding of each window: int64 [count]."""
        spans, edges = self._windows
        return np.maximum(self._seq_len - _sums(spans[:, 1] - spans[:, 0], edges), 0)

    @property
    def tokens(self) -> NDArray[np.int64]:
        """How many tokens are labels in each window or begin a document there: int64 [count].

        Over all windows that is every token once; the first of a piece that goes on is one elsewhere.
        """
        spans, edges = self._windows
        offsets = np.asarray(self._offsets)
        goes_on = offsets[np.searchsorted(offsets, spans[:, 0])] != spans[:, 0]
        return _sums(spans[:, 1] - spans[:, 0] - goes_on, edges)

    def window(self, index: int) -> list[tuple[int, int]]:
        """The token spans (start, stop) of a window, at most L + 1 tokens, in the order of the shard."""
        assert 0 <= index < self.count, (index, self.count)
        first, last = self._windows.edges[index : index + 2].tolist()
        return [(start, stop) for start, stop in self._windows.spans[first:last].tolist()]

    @cached_property
    def _windows(self) -> Windows:
        offsets = np.asarray(self._offsets)
        stretch = max(BLOCK_TOKENS, BLOCK_WINDOWS * self._seq_len)
        begins = np.searchsorted(offsets[:-1], np.arange(0, offsets[-1] + stretch, stretch))
        begins[-1] = len(offsets) - 1
        spans, edges = [np.empty((0, 2), np.int64)], [np.zeros(1, np.int64)]
        pieces = 0
        for first, last in zip(begins[:-1].tolist(), begins[1:].tolist(), strict=True):
            lengths = np.diff(offsets[first : last + 1])
            block = _mixed(best_fit(lengths, self._seq_len, self._max_padding))
            spans.append(block.spans + offsets[first])
            edges.append(block.edges[1:] + pieces)
            pieces += len(block.spans)
        return Windows(np.concatenate(spans), np.concatenate(edges))


def _sums(numbers: NDArray[np.int64], edges: NDArray[np.int64]) -> NDArray[np.int64]:
    """The sum of the numbers between two edges and the next: int64 [len(edges) - 1]."""
    return np.diff(np.concatenate([[0], np.cumsum(numbers)])[edges])


def _mixed(windows: Windows) -> Windows:
    """The same windows, of which every stretch has its share of each part of the order they were made in.

    Steps of nearly count / golden ratio around a circle of the windows leave no large gap at any time.
    """
    spans, edges = windows
    counts = np.diff(edges)
    step = round(len(counts) * (5**0.5 - 1) / 2)
    while gcd(step, len(counts)) > 1:
        step += 1
    order = np.arange(len(counts)) * step % len(counts)
    stops = np.cumsum(counts[order])
    moved = np.arange(len(spans)) + np.repeat(edges[order] - (stops - counts[order]), counts[order])
    return Windows(spans[moved], np.concatenate([[0], stops]))
