from __future__ import annotations

import hashlib
import json

import numpy as np
import pytest
from hypothesis import given, settings
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
@settings(deadline=None)
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


@given(st.integers(1, 5000), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_the_table_is_every_image(n: int, seed: int) -> None:
    permutation = Permutation(n, seed, "source", 0)
    table = permutation.table()
    assert table.dtype == np.int64
    assert table.tolist() == [permutation(i) for i in range(n)]


def test_a_large_table_is_a_bijection_like_the_network() -> None:
    permutation = Permutation(100_000, 3, "source", 9)
    table = permutation.table()
    assert np.array_equal(np.sort(table), np.arange(100_000))
    for index in (0, 1, 31_337, 99_999):
        assert table[index] == written_out(index, 100_000, 3, "source", 9)
        assert permutation.inverse(int(table[index])) == index


def chi_squared(images: np.ndarray, bits: int, run: int) -> float:
    """Of the low bits of `run` consecutive images against equal frequencies; 2^(bits * run) - 1 degrees."""
    low = images % 2**bits
    cells = sum(low[i : len(low) - run + 1 + i] << bits * i for i in range(run))
    observed = np.bincount(cells, minlength=1 << bits * run)
    expected = observed.sum() / len(observed)
    return float(((observed - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("n", [16_384, 20_000, 50_000, 65_536, 1_000_003])
@pytest.mark.parametrize(("bits", "run"), [(1, 8), (2, 4), (4, 2), (3, 3)])
def test_the_low_bits_of_neighbours_look_independent(n: int, bits: int, run: int) -> None:
    """Degrees of freedom f: mean f, standard deviation sqrt(2f); 20 keys average to f +- sqrt(2f / 20).

    (Overlapping runs of neighbours are not independent, which widens the spread, but not the mean.)
    """
    freedom = 2 ** (bits * run) - 1
    deviation = np.sqrt(2 * freedom)
    statistics = []
    for seed in range(20):
        permutation = Permutation(n, seed, "source", 0, 0)
        statistics.append(chi_squared(np.array([permutation(i) for i in range(8192)]), bits, run))
    assert abs(np.mean(statistics) - freedom) < 8 * deviation / np.sqrt(20)
    assert max(statistics) < freedom + 8 * deviation


@pytest.mark.parametrize(("bits", "run"), [(1, 8), (2, 4), (4, 2), (3, 3)])
def test_the_statistic_finds_out_a_linear_congruence(bits: int, run: int) -> None:
    freedom = 2 ** (bits * run) - 1
    assert chi_squared(np.arange(8192) * 40_503 % 65_536, bits, run) > freedom + 50 * np.sqrt(2 * freedom)


@pytest.mark.parametrize("bits", [1, 4, 8])
def test_the_low_bits_themselves_are_even(bits: int) -> None:
    """A quarter of a permutation, of keys at random: drawn without replacement, so 3/4 of f at most."""
    freedom = 2**bits - 1
    statistics = [chi_squared(Permutation(65_536, seed, "x").table()[:16_384], bits, 1) for seed in range(40)]
    assert abs(np.mean(statistics) - 0.75 * freedom) < 6 * np.sqrt(2 * freedom / 40)


def test_neighbours_do_not_stay_neighbours() -> None:
    """Serial correlation of 65,535 pairs: standard deviation 1 / 256 for independent ones."""
    images = Permutation(65_536, 0, "source", 0, 0).table()
    assert abs(np.corrcoef(images[:-1], images[1:])[0, 1]) < 5 / 256
    assert abs(np.corrcoef(images, np.arange(65_536))[0, 1]) < 5 / 256
