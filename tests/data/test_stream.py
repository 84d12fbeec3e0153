from __future__ import annotations

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.config import UserError
from llmtrain.data import windows as windows_module
from llmtrain.data.best_fit import ShardPacking
from llmtrain.data.stream import Layout, Stream
from llmtrain.data.windows import BestFit, Cut, Cutting, Piece
from tests.data.array_source import ArraySource, GrowingSource, numbered

L = 8
SIZES = [1, L - 1, L, L + 1, 7 * L + 3]


def cut(tokens: int, places: list[int]) -> list[list[int]]:
    """Shards, some of them empty, of one document each, that hold so many tokens together."""
    edges = [0, *sorted(place % (tokens + 1) for place in places), tokens]
    return [[after - before] if after > before else [] for before, after in pairwise(edges)]


shard_cuts = st.lists(st.integers(0, 10**6), max_size=5)


def stream_of(source: ArraySource | GrowingSource, span: int = 3, seed: int = 0, seq_len: int = L) -> Stream:
    return Stream(Cut(source, seq_len), "source", seed, span)


def fitted(source: ArraySource | GrowingSource, span: int = 3, seed: int = 0, keep: int = 100) -> Stream:
    return Stream(BestFit(source, L, 0.1, keep), "source", seed, span)


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
@settings(max_examples=15, deadline=None)
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
@settings(max_examples=10, deadline=None)
def test_a_pass_serves_the_windows_that_it_owns(tokens: int, cuts: list[int], span: int) -> None:
    stream = stream_of(numbered(cut(tokens, cuts)), span)
    for epoch in range(4):
        first, last = windows_of_passes(tokens, epoch), windows_of_passes(tokens, epoch + 1)
        served = [stream.window(k) for k in range(first, last)]
        assert sorted(served) == list(range(first, last))
        for begin in range(first, last, span):
            assert max(served[begin - first :][:span]) < min(begin + span, last)


@given(st.lists(st.lists(st.integers(0, 12), max_size=4), min_size=1, max_size=4), st.integers(1, 12))
@settings(deadline=None)
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
        ends = np.cumsum(source.lengths(np.arange(source.shards)))
        whole_shards = np.split(np.arange(source.tokens), ends[:-1])
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
        stream = Stream(Cut(source, L), name, seed, 50)
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


def test_empty_shards_take_part_in_the_order() -> None:
    """Nobody knows which are empty before they are made: filling one moves no other of the first pass."""
    lengths = [[9], [], [30], [], [1], [], [14]]
    with_empty, filled = numbered(lengths), numbered([shard or [5] for shard in lengths])
    orders = []
    for source in (with_empty, filled):
        layout = stream_of(source)._laid_out(0, 10**6)
        orders.append([shard for shard in layout.order.tolist() if lengths[shard]])
        places = {piece.shard for piece in layout.pieces(0, 0, layout.end)}
        assert places == {shard for shard in range(7) if lengths[shard] or source is filled}
    assert orders[0] == orders[1]


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.integers(0, 50))
@settings(deadline=None)
def test_passes_begin_alike_and_hold_every_shard_once(lengths: list[int], seed: int) -> None:
    source = numbered([[length] if length else [] for length in lengths])
    if source.tokens == 0:
        return
    stream = stream_of(source, seed=seed)
    first = stream._laid_out(0, 1).order.tolist()
    head = first[: next(i for i, shard in enumerate(first) if lengths[shard]) + 1]
    for epoch in range(4):
        order = stream._laid_out(epoch, 1).order.tolist()
        assert sorted(order) == list(range(len(lengths)))
        assert order[: len(head)] == head


# Sources that grow

shard_lists = st.lists(
    st.lists(st.integers(1, 3 * L), max_size=4), min_size=1, max_size=8
).filter(lambda shards: any(map(sum, shards)))  # fmt: skip


@pytest.mark.parametrize("make", [stream_of, fitted])
@given(shards=shard_lists, span=st.integers(1, 6), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_a_growing_source_is_served_like_a_complete_one(
    make: type[Stream], shards: list[list[int]], span: int, seed: int
) -> None:
    """Window by window, over several passes; and no shard is asked for before a span needs it."""
    complete = numbered(shards)
    growing = GrowingSource(complete)
    expected, stream = make(complete, span, seed), make(growing, span, seed)
    sizes = stream_sizes(expected)
    order = expected._laid_out(0, 10**9).order.tolist()
    for k in range(3 * sum(sizes) // expected.stride + 2):
        assert stream.serve(k) == expected.serve(k)
        # To the end of the span, and one window further (cut: the label that is the next token).
        needed = ((k // span + 1) * span) * expected.stride + 1
        ends = np.cumsum([sizes[shard] for shard in order])
        enough = int(ends.searchsorted(needed)) + 1
        made = [shard for shard in growing.asked if shard in order[:enough]]
        assert growing.asked == made == order[: len(made)]
    assert stream.units == expected.units == sum(sizes)


def stream_sizes(stream: Stream) -> list[int]:
    """Units by shard, told by the source, or counted by laying every shard's windows out."""
    source = stream.source
    if stream.stride == L:
        return source.lengths(np.arange(source.shards)).tolist()
    return [ShardPacking(source.offsets(shard), L, 0.1).count for shard in range(source.shards)]


def test_a_resume_in_a_growing_source_asks_for_what_lies_before() -> None:
    complete = numbered([[5 * L]] * 40)
    growing = GrowingSource(complete)
    assert stream_of(growing, span=10).serve(95) == stream_of(complete, span=10).serve(95)
    assert len(growing.asked) == 20  # 100 windows of 5 shards each, and a label
    order = stream_of(complete)._laid_out(0, 1).order.tolist()
    assert growing.wanted[0] == order  # everything that follows, before the first is waited for
    assert growing.asked == order[:20]


def test_what_the_next_spans_need_is_announced() -> None:
    source = numbered([[5 * L]] * 40)
    stream = stream_of(source, span=10)
    first, second = (stream._laid_out(epoch, 1).order.tolist() for epoch in (0, 1))
    stream.window(0)
    assert source.wanted == []  # asking where something is fetches nothing
    for k in range(200):
        stream.serve(k)
    assert len(source.wanted) == 20
    assert source.wanted[0] == first[:6]  # two spans of 2 shards, the label, and one more
    assert source.wanted[7] == first[14:20]
    assert source.wanted[19] == list(dict.fromkeys([*first[38:], *second[:4]]))


def test_a_span_of_one_window_announces_the_next_shard() -> None:
    source = numbered([[20 * L]] * 40)
    stream = stream_of(source, span=1)
    order = stream._laid_out(0, 1).order.tolist()
    for k in range(25):
        stream.serve(k)
        assert source.wanted[-1][:2] == order[k // 20 :][:2]


def test_a_source_without_a_token_is_found_out_when_it_is_read() -> None:
    with pytest.raises(UserError, match=r"data\.sources\.source: there is no token in it"):
        stream_of(GrowingSource(numbered([[], []]))).serve(0)


# Best fit


@given(shards=shard_lists, span=st.integers(1, 6), seed=st.integers(0, 9), passes=st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_best_fit_serves_every_token_once_a_pass(
    shards: list[list[int]], span: int, seed: int, passes: int
) -> None:
    """As a target, that is, if it does not begin its document; every pass has the same windows."""
    source = numbered(shards)
    stream = fitted(source, span, seed, keep=3)
    begins = set(np.cumsum([0, *(n for shard in shards for n in shard)]).tolist())
    windows = sum(stream_sizes(stream))
    served: Counter[int] = Counter()
    rows = [stream.serve(k) for k in range(passes * windows)]
    for k, row in enumerate(rows):
        assert {piece.epoch for piece in row} == {k // windows}
        assert sum(piece.stop - piece.start for piece in row) <= L + 1
        for piece in row:
            ids = source.read(piece.shard, piece.start, piece.stop).tolist()
            served.update(ids[1:] if ids[0] not in begins else ids)
    assert all(served[token] == passes for token in range(source.tokens or 0))
    stream.serve(passes * windows)  # before that, nobody knows that the last pass is over
    assert stream.units == windows
    of_passes = [rows[epoch * windows :][:windows] for epoch in range(passes)]
    assert len({tuple(sorted(tuple(p[1:] for p in row) for row in one)) for one in of_passes}) == 1


def test_best_fit_keeps_few_packings(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []

    class Counted(ShardPacking):
        def __init__(self, *arguments: object) -> None:
            made.append(1)
            super().__init__(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(windows_module, "ShardPacking", Counted)
    source = numbered([[L + 1] * 4] * 30)
    stream = fitted(source, span=8, keep=16)
    for k in range(120):
        stream.serve(k)
    assert len(made) == 30  # each shard once, though spans jump between two of them
    assert len(stream._cutting._packings) <= 5  # type: ignore[attr-defined]


def test_counts_that_another_process_wrote_are_never_taken_back() -> None:
    """It writes them after they were looked at, and reads them while they are counted here."""
    source = ArraySource([[[1] * 5, [2] * 6]])
    other, shards = BestFit(source, L, 0.1, 100), np.array([0])
    seen: list[np.ndarray] = []

    class Watched(ArraySource):
        def lengths(self, shards: np.ndarray) -> np.ndarray:
            other.sizes(np.array([0]))
            return super().lengths(shards)

        def offsets(self, shard: int) -> np.ndarray:
            seen.append(other.sizes(np.array([0])).copy())
            seen.extend(numbers.copy() for numbers in self.memory.values())
            return super().offsets(shard)

    watched = Watched([[[1] * 5, [2] * 6]])
    watched.memory = source.memory
    sizes = BestFit(watched, L, 0.1, 100).sizes(shards)
    assert len(seen) == 3
    assert all((numbers >= 0).all() for numbers in seen)
    assert (sizes == other.sizes(shards)).all()


def test_windows_that_were_counted_otherwise_are_refused() -> None:
    """What is remembered of a shard says where all later windows are: a wrong number shifts them."""
    source = numbered([[2 * L, 3], [5, L], [3 * L]])
    for k in range(sum(stream_sizes(fitted(source)))):
        fitted(source).serve(k)
    counts, paddings = source.memory.values()
    assert (counts > 0).all() and (paddings >= 0).all()
    for what, numbers in (("windows", counts), ("padding", paddings)):
        numbers[1] += 1
        stream = fitted(source)
        with pytest.raises(
            UserError, match=rf"shard 1: {what} at seq_len={L} counted as {numbers[1]} before"
        ):
            for k in range(int(counts.sum())):
                stream.serve(k)
        numbers[1] -= 1


# The inverse


@pytest.mark.parametrize("make", [stream_of, fitted])
@given(shards=shard_lists, span=st.integers(1, 6), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_served_is_the_inverse_of_window(
    make: type[Stream], shards: list[list[int]], span: int, seed: int
) -> None:
    stream = make(numbered(shards), span, seed)
    for k in range(60):
        assert stream.served(stream.window(k)) == k


@pytest.mark.parametrize("make", [stream_of, fitted])
@given(shards=shard_lists, span=st.integers(1, 6), served=st.integers(0, 70))
@settings(max_examples=40, deadline=None)
def test_served_with_finds_what_walking_finds(
    make: type[Stream], shards: list[list[int]], span: int, served: int
) -> None:
    """For each token of a shard, and for pairs of them."""
    source = numbered(shards)
    shard = max(range(len(shards)), key=lambda number: sum(shards[number]))
    length = sum(shards[shard])
    homes: dict[int, set[int]] = {}
    walker, stream = make(source, span), make(GrowingSource(source), span)
    for k in range(served):
        for token, at_home in walked(walker, walker.window(k)):
            if at_home:
                homes.setdefault(token, set()).add(k)
    tokens = source.read(shard, 0, length).tolist()
    for start, token in enumerate(tokens):
        expected = homes.get(token, set())
        assert stream.served_with(shard, start, start + 1, served) == sorted(expected)
        expected = expected.union(*(homes.get(other, set()) for other in tokens[start : start + 9]))
        assert stream.served_with(shard, start, min(start + 9, length), served) == sorted(expected)


def walked(stream: Stream, window: int) -> list[tuple[int, bool]]:
    """Each token of a window, and whether it is at home there."""
    tokens = []
    for number, (_, shard, start, stop) in enumerate(stream.pieces(window)):
        ids = stream.source.read(shard, start, stop).tolist()
        if stream.stride == L:
            context = number == 0 and window > 0
        else:
            context = start not in stream.source.offsets(shard).tolist()
        tokens += [(token, not (context and i == 0)) for i, token in enumerate(ids)]
    return tokens


# Scale


class Huge:
    """10T tokens in 100,000 shards, of which nothing can be read."""

    shards, complete, tokens = 100_000, True, 100_000 * 10**8
    fingerprint = manifest_hash = "0" * 64

    def lengths(self, shards: np.ndarray) -> np.ndarray:
        return np.full(len(shards), 10**8)

    def want(self, shards: list[int]) -> None:
        assert len(shards) <= 8


def test_a_layout_of_100_000_shards_is_made_of_arrays() -> None:
    cutting: Cutting = Cut(Huge(), 2048)  # type: ignore[arg-type]
    stream = Stream(cutting, "huge", 0, 65_536)
    windows = Huge.tokens // 2048
    for k in (0, windows // 2, windows, 3 * windows + 5):
        (piece, *others) = stream.serve(k)
        assert 0 <= piece.start < piece.stop <= 10**8
        assert sum(p.stop - p.start for p in (piece, *others)) == 2049
        assert k in stream.served_with(piece.shard, piece.start + 1, piece.stop, k + 1)


def test_a_layout_cuts_at_the_shards() -> None:
    layout = Layout([4, 2, 0, 1], [3, 0, 5])
    assert layout.pieces(7, 1, 8) == [Piece(7, 4, 1, 3), Piece(7, 0, 0, 5)]
    layout.extend(np.array([2]))
    assert layout.pieces(7, 8, 10) == [Piece(7, 1, 0, 2)]
    assert (layout.place(3), layout.begin(2), layout.end) == (2, 3, 10)
