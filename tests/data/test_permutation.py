from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.permutation import Permutation

SIZES = [1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 63, 64, 65, 1000, 4095, 4096, 4097, 65_536]


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_it_is_a_bijection_and_has_an_inverse(n: int, seed: int) -> None:
    permutation = Permutation(n, seed, "source", 0, 0)
    images = [permutation(i) for i in range(n)]
    assert sorted(images) == list(range(n))
    assert [permutation.inverse(image) for image in images] == list(range(n))


@given(st.integers(1, 2**24), st.integers(0, 2**24))
def test_the_inverse_at_any_size(n: int, index: int) -> None:
    permutation = Permutation(n, 7)
    assert permutation.inverse(permutation(index % n)) == index % n


def written_out(index: int, n: int, *key: int | str) -> int:
    """The network in scalar arithmetic, as its sources print it: the reference."""
    mask64 = 2**64 - 1

    def finaliser(z: int) -> int:
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask64
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask64
        return z ^ (z >> 31)

    half = 0
    while 4**half < n:
        half += 1
    digest = hashlib.blake2b(json.dumps(key).encode(), digest_size=40).digest()
    while True:
        left, right = divmod(index, 2**half)
        for i in range(5):
            round_key = int.from_bytes(digest[8 * i : 8 * i + 8], "little")
            left, right = right, left ^ finaliser(right ^ round_key) % 2**half
        index = right * 2**half + left
        if index < n:
            return index


@pytest.mark.parametrize("n", [1, 2, 3, 100, 4097, 2**20 + 1])
def test_it_is_the_network_that_its_sources_describe(n: int) -> None:
    """The order of a run in progress hangs on these numbers: they must never change."""
    permutation = Permutation(n, 42, "web", 3, 1)
    for index in {0, n // 3, n // 2, n - 1}:
        assert permutation(index) == written_out(index, n, 42, "web", 3, 1)


def test_every_part_of_the_key_counts() -> None:
    keys = [(0, "a", 0, 0), (1, "a", 0, 0), (0, "b", 0, 0), (0, "a", 1, 0), (0, "a", 0, 1), (0, "a", 0)]
    orders = {tuple(map(Permutation(100, *key), range(100))) for key in keys}
    assert len(orders) == len(keys)


def chi_squared(images: np.ndarray, bits: int) -> float:
    """Of the low bits of three consecutive images against equal frequencies."""
    low = images % 2**bits
    cells = (low[:-2] * 2**bits + low[1:-1]) * 2**bits + low[2:]
    observed = np.bincount(cells, minlength=8**bits)
    expected = len(cells) / 8**bits
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("n", [65_536, 50_000])
def test_the_low_bits_of_neighbours_look_independent(n: int) -> None:
    """511 degrees of freedom: mean 511, standard deviation 32; 20 keys average to 511 +- 7."""
    statistics = []
    for seed in range(20):
        permutation = Permutation(n, seed, "source", 0, 0)
        images = np.array([permutation(i) for i in range(8192)])
        statistics.append(chi_squared(images, bits=3))
    assert abs(np.mean(statistics) - 511) < 5 * 32 / np.sqrt(20)
    assert max(statistics) < 511 + 5 * 32


def test_the_statistic_finds_out_a_linear_congruence() -> None:
    assert chi_squared(np.arange(8192) * 40_503 % 65_536, bits=3) > 511 + 50 * 32


def test_neighbours_do_not_stay_neighbours() -> None:
    """Serial correlation of 65,535 pairs: standard deviation 1 / 256 for independent ones."""
    permutation = Permutation(65_536, 0, "source", 0, 0)
    images = np.array([permutation(i) for i in range(65_536)])
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 5 / 256
    assert abs(np.corrcoef(images, np.arange(65_536))[0, 1]) < 5 / 256
