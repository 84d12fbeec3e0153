"""A keyed permutation that is computed, not stored: a balanced Feistel network with cycle walking.

The network permutes 0 .. 4^h - 1, the smallest such range that holds 0 .. n - 1; a number that lands outside
is sent through again until it lands inside (fewer than 4 times on average). A round looks at h bits only, so
its function is a table of 2^h entries: 5 times 256 for a span of 65,536. Sources: Luby and Rackoff 1988 (the
network), Black and Rogaway 2002 (cycle walking), Steele, Lea and Flood 2014 (splitmix64's finaliser).
"""

from __future__ import annotations

import hashlib
import json

import numpy as np

ROUNDS = 5
LARGEST = 1 << 32
"""The tables of a larger permutation would no longer be small."""


class Permutation:
    """The permutation of 0 .. n - 1 that belongs to a key, such as (seed, source name, pass, span)."""

    def __init__(self, n: int, *key: int | str) -> None:
        assert 1 <= n <= LARGEST, n
        self._n = n
        self._bits = ((n - 1).bit_length() + 1) // 2
        digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=8 * ROUNDS).digest()
        halves = np.arange(1 << self._bits, dtype=np.uint64)
        round_keys = np.frombuffer(digest, "<u8").astype(np.uint64)
        self._tables = (_splitmix64(halves ^ round_keys[:, None]) % halves.size).tolist()

    def __call__(self, index: int) -> int:
        """Where `index` is sent."""
        return self._walk(index, self._tables)

    def inverse(self, index: int) -> int:
        """What is sent to `index`."""
        return self._walk(index, self._tables[::-1])

    def table(self) -> np.ndarray:
        """Where each of 0 .. n - 1 is sent: int64 [n], for an n of which a table is wanted after all."""
        table = np.arange(self._n)
        outside = np.arange(self._n)  # places whose number has not landed inside yet
        while outside.size:
            table[outside] = self._rounds(table[outside])
            outside = outside[table[outside] >= self._n]
        return table

    def _walk(self, index: int, tables: list[list[int]]) -> int:
        assert 0 <= index < self._n, index
        bits, mask = self._bits, (1 << self._bits) - 1
        while True:
            left, right = index >> bits, index & mask
            for table in tables:
                left, right = right, left ^ table[right]
            # The halves are not swapped back, so that the network with its rounds reversed is the inverse.
            index = right << bits | left
            if index < self._n:
                return index

    def _rounds(self, indices: np.ndarray) -> np.ndarray:
        """One way through the network, for many numbers at once."""
        left, right = indices >> self._bits, indices & ((1 << self._bits) - 1)
        for table in self._tables:
            left, right = right, left ^ np.array(table)[right]
        return right << self._bits | left


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """splitmix64's finaliser, modulo 2^64 as uint64 arithmetic is."""
    x = (x ^ x >> 30) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> 27) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> 31
