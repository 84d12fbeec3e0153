from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.stream import Stream
from tests.data.array_source import ArraySource, numbered

L = 8
SIZES = [1, L - 1, L, L + 1, 7 * L + 3]


def cut(tokens: int, places: list[int]) -> list[list[int]]:
    """Shards, some of them empty, of one document each, that hold so many tokens together."""
    edges = [0, *sorted(place % (tokens + 1) for place in places), tokens]
    return [[after - before] if after > before else [] for before, after in pairwise(edges)]


shard_cuts = st.lists(st.integers(0, 10**6), max_size=5)


def stream_of(source: ArraySource, span: int = 3, seed: int = 0, seq_len: int = L) -> Stream:
    return Stream(source, "source", seed, seq_len, span)


def tokens_of(stream: Stream, window: int) -> list[int]:
    return [
        int(token)
        for piece in stream.pieces(window)
        for token in stream.source.read(piece.shard, piece.start, piece.stop)
    ]


def windows_of_passes(tokens: int, passes: int) -> int:
    """Windows that the first passes own: ceil(eT / L)."""
    return -(-passes * tokens // L)


@pytest.mark.parametrize("tokens", SIZES)
@pytest.mark.parametrize("passes", [1, 2, 3, L])
@given(cuts=shard_cuts, span=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=15)
def test_no_token_is_lost_and_none_is_favoured(
    tokens: int, passes: int, cuts: list[int], span: int, seed: int
) -> None:
    """As a label a token is served e times or, at most L - 1 of them, once more; e times where L divides eT.

    A source of fewer than L - 1 tokens repeats within one window: there the extra servings are L - 1 at most.
    """
    stream = stream_of(numbered(cut(tokens, cuts)), span, seed)
    windows = windows_of_passes(tokens, passes)
    served = Counter(token for k in range(windows) for token in tokens_of(stream, stream.window(k))[1:])
    extra = [served[token] - passes for token in range(tokens)]
    assert min(extra) >= 0
    assert sum(extra) == windows * L - passes * tokens <= L - 1
    assert max(extra) <= -(-(L - 1) // tokens)
    if passes * tokens % L == 0:
        assert set(served.values()) == {passes}


@pytest.mark.parametrize("tokens", SIZES)
@given(cuts=shard_cuts, span=st.integers(1, 5))
@settings(max_examples=10)
def test_a_pass_serves_the_windows_that_it_owns(tokens: int, cuts: list[int], span: int) -> None:
    stream = stream_of(numbered(cut(tokens, cuts)), span)
    for epoch in range(4):
        first, last = windows_of_passes(tokens, epoch), windows_of_passes(tokens, epoch + 1)
        served = [stream.window(k) for k in range(first, last)]
        assert sorted(served) == list(range(first, last))
        for begin in range(first, last, span):
            assert max(served[begin - first :][:span]) < min(begin + span, last)


@given(st.lists(st.lists(st.integers(0, 12), max_size=4), min_size=1, max_size=4), st.integers(1, 12))
def test_windows_are_cut_from_one_stream_without_a_gap(shards: list[list[int]], seq_len: int) -> None:
    source = numbered(shards)
    if source.tokens == 0:
        return
    stream = stream_of(source, seq_len=seq_len)
    windows = range(3 * source.tokens // seq_len + 2)
    rows = [tokens_of(stream, window) for window in windows]
    assert all(len(row) == seq_len + 1 for row in rows)
    assert all(row[-1] == after[0] for row, after in pairwise(rows))
    served = np.array([row[:-1] for row in rows]).reshape(-1)
    for epoch in range(3):
        one_pass = served[epoch * source.tokens :][: source.tokens]
        assert sorted(one_pass) == list(range(source.tokens))
        assert one_pass[0] == served[0]
        whole_shards = np.split(np.arange(source.tokens), np.cumsum(source.lengths)[:-1])
        at = {shard[0]: shard for shard in whole_shards if len(shard)}
        place = 0
        while place < source.tokens:
            shard = at[one_pass[place]]
            assert np.array_equal(one_pass[place : place + len(shard)], shard)
            place += len(shard)


def test_pieces_name_pass_and_shard() -> None:
    stream = stream_of(numbered([[5], [], [6]]))  # 11 tokens, windows of 9
    for window in range(9):
        pieces = stream.pieces(window)
        assert pieces[0].epoch == window * L // 11
        assert {piece.shard for piece in pieces} <= {0, 2}
        assert sum(piece.stop - piece.start for piece in pieces) == L + 1
        assert all(after.start == 0 for after in pieces[1:])


def test_seed_name_and_pass_change_the_order() -> None:
    source = numbered([[L * 5]] * 20)

    def order(name: str, seed: int, epoch: int) -> tuple[list[int], list[int]]:
        stream = Stream(source, name, seed, L, 50)
        windows = range(100 * epoch, 100 * epoch + 100)
        shards = [stream.pieces(window)[0].shard for window in windows]
        return [stream.window(k) - 100 * epoch for k in windows], shards

    base = order("a", 0, 0)
    assert order("a", 0, 0) == base
    for other in (order("b", 0, 0), order("a", 1, 0), order("a", 0, 1)):
        assert other[0] != base[0]
        assert other[1] != base[1]


def test_a_span_of_one_window_keeps_the_order() -> None:
    stream = stream_of(numbered([[100], [100]]), span=1)
    assert [stream.window(k) for k in range(60)] == list(range(60))


def test_far_windows_cost_no_more() -> None:
    """Pass 10^12 is arithmetic: if anything walked there, this test would not end."""
    source = numbered([[7 * L], [3]])
    stream = stream_of(source)
    k = 10**12 * source.tokens // L
    row = tokens_of(stream, stream.window(k))
    assert len(row) == L + 1
    assert stream.pieces(stream.window(k))[0].epoch in (10**12 - 1, 10**12)
