"""A source as an endless stream of units, and the order in which its windows are served.

unit   what a shard is counted in: a token where the stream is cut, a window where documents are fitted in
pass   the e-th reading of the whole source, its shards in an order of its own; passes follow without a gap
window w of the stream begins at unit w * stride and holds `reach` units
k      how many windows of the source were served before
L      seq_len

Nothing is asked of a source before it is needed: while its text is still being prepared, the first pass is
laid out as far as the windows that are served, and what follows from its size waits until its end is known.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from threading import Lock
from typing import NamedTuple

import numpy as np

from llmtrain.config import UserError
from llmtrain.data.permutation import Permutation
from llmtrain.data.windows import Cutting, Piece


class Place(NamedTuple):
    """Where in the order a window is."""

    epoch: int
    span: int
    """Number of the shuffle span within the pass."""
    window: int


class Span(NamedTuple):
    """A span of windows that are a unit each, in the order of the stream and in that of their service."""

    first: int
    """Windows that are served before it."""
    shards: np.ndarray
    """The shards of its pass that end before it."""
    units: list[Piece]
    """The units from their end to its own."""
    order: np.ndarray
    """Which of these units its windows are, as they are served: int64 [windows]."""


class Layout:
    """Shards laid end to end in an order, as far as their sizes are known: the first `known` of them."""

    def __init__(self, order: Sequence[int] | np.ndarray, sizes: Sequence[int] | np.ndarray = ()) -> None:
        self.order = np.ascontiguousarray(order, np.int64)
        self.known = 0
        self.end = 0
        """Units in the known shards."""
        self._sums = np.empty(len(self.order), np.int64)
        # Memory views are read without making numpy's numbers, and are as small as arrays.
        self._shards, self._ends = self.order.data, self._sums.data
        self.extend(np.asarray(sizes, np.int64))

    def extend(self, sizes: np.ndarray) -> None:
        """The sizes of the next shards, in units."""
        known = self.known + len(sizes)
        self._sums[self.known : known] = self.end + np.cumsum(sizes)
        self.known = known
        self.end = self._ends[known - 1] if known else 0  # last: other threads look at it

    def place(self, unit: int) -> int:
        """Which of the known shards a unit is in; empty ones, which end where they begin, are passed over."""
        return bisect_right(self._ends, unit, 0, self.known)

    def begin(self, place: int) -> int:
        """The first unit of a known shard."""
        return self._ends[place - 1] if place else 0

    def pieces(self, epoch: int, start: int, stop: int) -> list[Piece]:
        """What lies between two units, cut at the shards."""
        pieces = []
        place = bisect_right(self._ends, start, 0, self.known)
        begin = self._ends[place - 1] if place else 0
        while start < stop:
            end = self._ends[place]
            if start < end:
                pieces.append(Piece(epoch, self._shards[place], start - begin, min(stop, end) - begin))
            start = begin = end
            place += 1
        return pieces


class Stream:
    """The endless stream of one source: `window` says which is served k-th, `pieces` where its tokens are.

    `serve` is both, and tells the source which shards will be needed; the other methods only compute.
    """

    def __init__(self, cutting: Cutting, name: str, seed: int, shuffle_span: int) -> None:
        self.source, self.name, self.stride = cutting.source, name, cutting.stride
        self._cutting, self._seed, self._shuffle_span = cutting, seed, shuffle_span
        self._reach, self._shards = cutting.reach, cutting.source.shards
        self._units = cutting.total or None
        self._entered: tuple[int, int] | None = None
        self._growing = Lock()
        self._layout = lru_cache(maxsize=4)(self._build_layout)
        self._permutation = lru_cache(maxsize=4)(self._build_permutation)

    @property
    def units(self) -> int | None:
        """Units of a pass; None as long as that is not known. Never waits."""
        if self._units is None:
            self._units = self._cutting.total or None
        return self._units

    @property
    def first_order(self) -> list[int]:
        """The shards in the order in which the first pass comes to them. Never waits."""
        return self._layout(0).order.tolist()

    # Forward: k -> tokens

    def serve(self, k: int) -> list[Piece]:
        """Where the tokens of the window that is served k-th are."""
        epoch, span, window = self._place(k)
        if (epoch, span) != self._entered:
            self._entered = epoch, span
            self._announce(epoch, span)
        return self._pieces(epoch, window * self.stride - epoch * (self._units or 0))

    def window(self, k: int) -> int:
        """The window that is served k-th: a keyed permutation within the spans of a pass."""
        return self._place(k)[2]

    def place(self, k: int) -> Place:
        """The window that is served k-th, and its pass and span."""
        return Place(*self._place(k))

    def first_window(self, epoch: int) -> int:
        """The first window that a pass owns: those that begin in it, ceil(e * units / stride) and up."""
        if epoch == 0:
            return 0
        assert self._units is not None  # or nobody would know that this pass has begun
        return -(-epoch * self._units // self.stride)

    def pieces(self, window: int) -> list[Piece]:
        """Where the tokens of a window are, in the order of the stream."""
        return self._pieces(*self._pass_of(window * self.stride))

    def _place(self, k: int) -> tuple[int, int, int]:
        epoch, _ = self._pass_of(k * self.stride)
        first = self.first_window(epoch)
        span, index = divmod(k - first, self._shuffle_span)
        window = first + span * self._shuffle_span + self._permutation(epoch, span)(index)
        return epoch, span, window

    def _pieces(self, epoch: int, start: int) -> list[Piece]:
        stop = start + self._reach
        layout = self._laid_out(epoch, stop)
        pieces = layout.pieces(epoch, start, min(stop, layout.end))
        while stop > layout.end:
            epoch, stop = epoch + 1, stop - layout.end
            layout = self._laid_out(epoch, stop)
            pieces += layout.pieces(epoch, 0, min(stop, layout.end))
        return self._cutting.pieces(pieces)

    def span(self, epoch: int, span: int) -> Span:
        """Everything about one span of a pass, where documents are fitted in; waits for its shards."""
        assert self.stride == self._reach == 1
        first = self.first_window(epoch) + span * self._shuffle_span
        order = self._permutation(epoch, span).table()
        start = first - epoch * (self._units or 0)
        stop = start + len(order)
        layout = self._laid_out(epoch, stop)
        place = layout.place(start)
        begin = layout.begin(place)
        return Span(first, layout.order[:place], layout.pieces(epoch, begin, stop), start - begin + order)

    def first_shards(self, windows: int) -> list[int]:
        """The shards of so many windows from the beginning, those of the first pass in its order; waits."""
        stop = windows * self.stride
        layout = self._laid_out(0, stop)
        stop = min(stop, layout.end)
        return layout.order[: layout.place(stop - 1) + 1].tolist() if stop else []

    # Inverse: tokens -> k

    def served(self, window: int) -> int:
        """When a window is served: k, so that `window(k)` is this window."""
        epoch, _ = self._pass_of(window * self.stride)
        first = self.first_window(epoch)
        span, index = divmod(window - first, self._shuffle_span)
        return first + span * self._shuffle_span + self._permutation(epoch, span).inverse(index)

    def position(self, epoch: int, shard: int) -> int | None:
        """The unit of the stream at which a shard begins in a pass; None beyond what is laid out of it."""
        layout = self._layout(epoch)
        place = int(np.flatnonzero(layout.order == shard)[0])
        if place >= layout.known:
            return None
        return (epoch * self._units if epoch and self._units else 0) + layout.begin(place)

    def served_with(self, shard: int, start: int, stop: int, served: int) -> list[int]:
        """Which k, below `served`, are windows in which tokens start .. stop - 1 of a shard are at home.

        Each token is at home in one window a pass: the one in which it is a label, or would be if it did not
        begin a document there; the first token of the stream is at home in window 0.
        """
        if served == 0 or start >= stop:
            return []
        epoch, span, _ = self.place(served - 1)
        # The spans before hold windows below these only, so nothing behind them was served.
        beyond = self.first_window(epoch) + (span + 1) * self._shuffle_span
        if self._units is not None:
            beyond = min(beyond, self.first_window(epoch + 1))
        # The last of them, if it is still to come, may end in text that is not made yet.
        last = beyond - 1 if self.served(beyond - 1) < served else beyond - 2
        epochs, rest = self._pass_of(last * self.stride + self._reach - 1)
        homes = self._cutting.homes(shard, start, stop)
        found: set[int] = set()
        for epoch in range(epochs + 1):
            self._laid_out(epoch, rest + 1 if epoch == epochs else self._units or 0)
            begin = self.position(epoch, shard)
            if begin is not None:
                windows = (self._home(begin + home.start, begin + home.stop) for home in homes)
                found.update(window for some in windows for window in some if window < beyond)
        return sorted(k for k in map(self.served, found) if k < served)

    def _home(self, start: int, stop: int) -> range:
        """The windows in which units start .. stop - 1 of the stream are at home."""
        context = self._reach - self.stride
        first, last = (max(unit - context, 0) // self.stride for unit in (start, stop - 1))
        return range(first, last + 1)

    # Layouts and permutations

    def _pass_of(self, unit: int) -> tuple[int, int]:
        """The pass that a unit of the stream is in, and the unit's place in it."""
        if self._units is None and self._laid_out(0, unit + 1).end > unit:
            return 0, unit
        assert self._units is not None
        return divmod(unit, self._units)

    def _build_permutation(self, epoch: int, span: int) -> Permutation:
        size = self._shuffle_span
        first = self.first_window(epoch) + span * size
        if self._pass_of((first + size - 1) * self.stride)[0] > epoch:
            size = self.first_window(epoch + 1) - first
        return Permutation(size, self._seed, self.name, epoch, span)

    def _build_layout(self, epoch: int) -> Layout:
        """The shards of a pass in its keyed order.

        Every pass begins with the shards with which the first one begins, up to one that is not empty. The
        very first token of the stream is the label of no window, and the first of the next pass is one too
        many: they have to be the same. (Which shards are empty, nobody knows before they are made.)
        """
        order = Permutation(self._shards, self._seed, self.name, epoch).table()
        if epoch:
            first = self._laid_out(0, 1)
            head = first.order[: first.place(0) + 1]
            others = np.ones(self._shards, bool)
            others[head] = False
            order = np.concatenate((head, order[others[order]]))
        return Layout(order)

    def _laid_out(self, epoch: int, stop: int) -> Layout:
        """The layout of a pass up to this many units, or of all of it where it has fewer."""
        layout = self._layout(epoch)
        if layout.end < stop and layout.known < self._shards:
            self._lay_out(layout, stop)
        return layout

    def _lay_out(self, layout: Layout, stop: int) -> None:
        with self._growing:
            if not self._cutting.at_once:
                windows = (stop - layout.end) // self.stride
                self.source.want(self._following(layout, layout.known, windows))
            while layout.end < stop and layout.known < self._shards:
                chunk = self._shards if self._cutting.at_once else 1
                layout.extend(self._cutting.sizes(layout.order[layout.known :][:chunk]))
            if layout.known == self._shards:
                if layout.end == 0:
                    raise UserError(
                        f"data.sources.{self.name}: there is no token in it; remove it, or give it text"
                    )
                self._units = layout.end

    def _announce(self, epoch: int, span: int) -> None:
        """Tells the source which shards this span and the next one need.

        Of a source that is growing, `_lay_out` has already asked for everything that follows.
        """
        if not self.source.complete:
            return
        _, unit = self._pass_of((self.first_window(epoch) + span * self._shuffle_span) * self.stride)
        layout = self._laid_out(epoch, unit + 1)
        place = layout.place(unit)
        wanted = self._following(layout, place, 2 * self._shuffle_span)
        if place + len(wanted) == self._shards:
            wanted += self._following(self._layout(epoch + 1), 0, self._shuffle_span)
        self.source.want(list(dict.fromkeys(wanted)))

    def _following(self, layout: Layout, place: int, windows: int) -> list[int]:
        """The shards from a place of a pass on that hold so many windows, and one more to be ready in time.

        Of a source whose lengths are not known it is all that follow.
        """
        order = layout.order[place:]
        if not self.source.complete:
            return order.tolist()
        tokens, count, chunk = windows * self._cutting.seq_len, 0, 64
        while tokens >= 0 and count < len(order):
            ends = self.source.lengths(order[count : count + chunk]).cumsum()
            enough = int(ends.searchsorted(tokens, "right"))
            count += enough
            if enough < len(ends):
                break
            tokens -= int(ends[-1])
        return order[: count + 2].tolist()
