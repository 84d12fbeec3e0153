"""What the windows of a source are made of: a stretch of its stream, or documents fitted together.

unit   what a shard is counted in: a token where the stream is cut, a window where documents are fitted in
L      seq_len
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from threading import Lock
from typing import NamedTuple, Protocol

import numpy as np

from llmtrain.config import UserError
from llmtrain.data.best_fit import ShardPacking


class TokenReader(Protocol):
    """What the tokens of rows are read from; both methods wait until the shard is there."""

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        """The ids start .. stop - 1 of a shard."""

    def offsets(self, shard: int) -> np.ndarray:
        """Where each document of a shard begins, and where the last one ends: int64 [documents + 1]."""


class TokenSource(TokenReader, Protocol):
    """Tokens in shards, which may still be on their way; a shard begins with the beginning of a document."""

    @property
    def shards(self) -> int:
        """How many there are, known from the start; some may be empty."""

    @property
    def complete(self) -> bool:
        """Whether the lengths of all shards are known."""

    @property
    def fingerprint(self) -> str:
        """Names input, tokenizer and boundary, known from the start: equal fingerprints, equal tokens."""

    @property
    def manifest_hash(self) -> str | None:
        """Names the content: equal hashes, equal tokens. None until complete."""

    @property
    def tokens(self) -> int | None:
        """Tokens in all shards; None until complete."""

    def lengths(self, shards: np.ndarray) -> np.ndarray:
        """Tokens of these shards, int64 [len(shards)]; waits until they are known."""

    def want(self, shards: Sequence[int]) -> None:
        """These are needed soon, in this order: a hint, which returns at once."""

    def remembered(self, name: str) -> np.ndarray:
        """A number a shard that follows from the text, int64 [shards]: -1 where nobody has written it yet.

        What is written into it outlives the process, where that is possible.
        """


class Piece(NamedTuple):
    """Consecutive tokens (in a layout: units) of one shard."""

    epoch: int
    """The pass they are read in, from 0."""
    shard: int
    start: int
    stop: int


class Cutting(Protocol):
    """What a source's windows are made of."""

    source: TokenSource
    seq_len: int
    stride: int
    """Units from one window to the next."""
    reach: int
    """Units in a window."""

    @property
    def at_once(self) -> bool:
        """Whether the sizes of all shards are known without waiting or counting."""

    @property
    def total(self) -> int | None:
        """Units of a pass, where that is known without waiting or counting."""

    def sizes(self, shards: np.ndarray) -> np.ndarray:
        """Units of these shards: int64 [len(shards)]."""

    def pieces(self, units: list[Piece]) -> list[Piece]:
        """The tokens of a window, from its units."""

    def homes(self, shard: int, start: int, stop: int) -> list[range]:
        """The units of a shard in which its tokens start .. stop - 1 are at home: each token in one."""


class Cut:
    """The stream of tokens, cut every L tokens: window w holds the tokens wL .. wL + L, the last L as labels.

    After e passes each token was a label e times or, at most L - 1 of them, once more.
    """

    def __init__(self, source: TokenSource, seq_len: int) -> None:
        self.source, self.seq_len = source, seq_len
        self.stride, self.reach = seq_len, seq_len + 1

    @property
    def at_once(self) -> bool:
        return self.source.complete

    @property
    def total(self) -> int | None:
        return self.source.tokens if self.source.complete else None

    def sizes(self, shards: np.ndarray) -> np.ndarray:
        return self.source.lengths(shards)

    def pieces(self, units: list[Piece]) -> list[Piece]:
        return units

    def homes(self, shard: int, start: int, stop: int) -> list[range]:
        return [range(start, stop)]


class BestFit:
    """The windows of `best_fit.ShardPacking`, shard after shard; a pass has the same ones each time.

    Every token but a document's first is a label once a pass. A shard's windows and their padding are counted
    when the layout first comes to it, in whatever run that is; they are kept as long as `keep` later windows
    have not taken their place.
    """

    stride = reach = 1

    def __init__(self, source: TokenSource, seq_len: int, max_padding: float, keep: int) -> None:
        self.source, self.seq_len = source, seq_len
        self._max_padding, self._keep = max_padding, keep
        self._counts = source.remembered(f"windows-{seq_len}-{max_padding}")
        self._paddings = source.remembered(f"padding-{seq_len}-{max_padding}")
        self._packings: OrderedDict[int, ShardPacking] = OrderedDict()
        self._kept = 0
        self._lock = Lock()

    @property
    def at_once(self) -> bool:
        return bool((self._counts >= 0).all()) and self._are_plausible()

    @property
    def total(self) -> int | None:
        return int(self._counts.sum()) if self.at_once else None

    def sizes(self, shards: np.ndarray) -> np.ndarray:
        return self._known(shards)[0]

    def held(self, shard: int) -> np.ndarray:
        """The tokens at home in each window of a shard, and its padding: int64 [windows, 2]."""
        packing = self._packing(shard)
        return np.stack([packing.tokens, packing.paddings], 1)

    def held_by(self, shards: np.ndarray) -> np.ndarray:
        """The tokens and the padding of all windows of these shards: int64 [2]."""
        return np.array([self.source.lengths(shards).sum(), self._known(shards)[1].sum()], np.int64)

    def _known(self, shards: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Windows and padding of each of these shards, counted where what is remembered cannot be right.

        Other processes write the remembered numbers too, so what was counted here is not read back.
        """
        counts, paddings = self._counts[shards], self._paddings[shards]  # copies
        for place in np.flatnonzero(~self._may_be_right(shards, counts, paddings)).tolist():
            packing = self._packing(int(shards[place]), forget=True)
            counts[place], paddings[place] = packing.count, packing.paddings.sum()
            self._counts[shards[place]], self._paddings[shards[place]] = counts[place], paddings[place]
        return counts, paddings

    def _may_be_right(self, shards: np.ndarray, counts: np.ndarray, paddings: np.ndarray) -> np.ndarray:
        """Whether what was remembered has room for the shards' tokens, and is known: bool [shards]."""
        tokens = self.source.lengths(shards)
        known = (counts >= 0) & (paddings >= 0)
        return known & (counts * (self.seq_len + 1) - paddings >= tokens) & ((counts == 0) == (tokens == 0))

    def _are_plausible(self) -> bool:
        every = np.arange(self.source.shards)
        return self.source.complete and bool(self._may_be_right(every, self._counts, self._paddings).all())

    def pieces(self, units: list[Piece]) -> list[Piece]:
        return [
            Piece(epoch, shard, start, stop)
            for epoch, shard, first, last in units
            for index in range(first, last)
            for start, stop in self._packing(shard).window(index)
        ]

    def homes(self, shard: int, start: int, stop: int) -> list[range]:
        packing, offsets = self._packing(shard), self.source.offsets(shard)

        def at_home(first: int, last: int) -> bool:
            if first >= stop or last <= start:
                return False
            # A piece that goes on with a document begins with a token that is at home in another window.
            first += int(offsets[offsets.searchsorted(first)] != first)
            return max(first, start) < min(last, stop)

        return [
            range(index, index + 1)
            for index in range(packing.count)
            if any(at_home(first, last) for first, last in packing.window(index))
        ]

    def _packing(self, shard: int, forget: bool = False) -> ShardPacking:
        """How a shard is packed, and remembered; with `forget` over what was remembered of it before."""
        with self._lock:
            if shard in self._packings:
                self._packings.move_to_end(shard)
                return self._packings[shard]
        offsets = self.source.offsets(shard)  # waits: hold no lock
        with self._lock:
            if shard not in self._packings:
                packing = ShardPacking(offsets, self.seq_len, self._max_padding)
                self._remember(shard, "windows", self._counts, packing.count, forget)
                self._remember(shard, "padding", self._paddings, int(packing.paddings.sum()), forget)
                self._packings[shard] = packing
                self._kept += packing.count
            packing = self._packings[shard]
            while self._kept - next(iter(self._packings.values())).count > self._keep:
                self._kept -= self._packings.popitem(last=False)[1].count
            return packing

    def _remember(self, shard: int, what: str, numbers: np.ndarray, found: int, forget: bool) -> None:
        if not forget and numbers[shard] not in (-1, found):
            raise UserError(
                f"shard {shard}: {what} at seq_len={self.seq_len} counted as {numbers[shard]} before, as "
                f"{found} now; remove the files {what}-{self.seq_len}-* beside it"
            )
        numbers[shard] = found
