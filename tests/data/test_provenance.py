from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmtrain.config import UserError
from llmtrain.data.batch import IGNORED
from llmtrain.data.dataset import PackedDataset
from llmtrain.data.provenance import WindowOrigin, documents_of, row_of, steps_of
from llmtrain.data.windows import Piece
from tests.data.array_source import ArraySource, GrowingSource, numbered

L, G = 8, 4
FIRST = {"a": 0, "b": 20_000, "c": 40_000}

shard_lists = st.lists(
    st.lists(st.integers(1, 3 * L), max_size=4), min_size=1, max_size=5
).filter(lambda shards: any(map(sum, shards)))  # fmt: skip
stages = st.sampled_from(
    [
        {"a": 1},
        [(0, {"a": 0.5, "b": 0.3, "c": 0.2})],
        [(0, {"a": 2, "b": 1}), (2 * G + 1, {"b": 1, "c": 3}), (7 * G, {"a": 1, "c": 1})],
    ]
)
skips = st.sampled_from([[], [(1, 1)], [(2, 3), (4, 4)], [(3, 5), (9, 20)]])


def dataset(texts: dict[str, list[list[int]]], weights: Any = None, **changes: Any) -> PackedDataset:
    sources = {name: numbered(shards, FIRST[name]) for name, shards in texts.items()}
    keys: dict[str, Any] = {"seed": 3, "documents": "attend", "shuffle_span": 3, **changes}
    return PackedDataset(sources, weights or {"a": 1}, seq_len=L, global_batch_size=G, **keys)


ORDERS: dict[str, Any] = {
    "texts": st.fixed_dictionaries(dict.fromkeys("abc", shard_lists)),
    "weights": stages,
    "skip": skips,
    "span": st.integers(1, 5),
    "packing": st.sampled_from(["cut", "best_fit"]),
}
"""Everything that an order depends on."""


def token_ids(data: PackedDataset, origin: WindowOrigin) -> list[int]:
    """The tokens that an origin names, document by document."""
    source, tokens = data.streams[origin.source].source, []
    for shard, document, start, stop, place in origin.documents:
        assert place == len(tokens)
        begin, end = source.offsets(shard)[document : document + 2].tolist()
        assert 0 <= start < stop <= end - begin
        tokens += source.read(shard, begin + start, begin + stop).tolist()
    return tokens


@given(**ORDERS)
@settings(max_examples=40, deadline=None)
def test_the_rows_are_the_tokens_that_training_gets(
    texts: dict[str, list[list[int]]], weights: Any, skip: Any, span: int, packing: str
) -> None:
    data = dataset(texts, weights, skip=skip, shuffle_span=span, packing=packing, max_padding=0.1)
    for step in range(1, 9):
        batch = data.rows(step, 0, G)
        for row in range(G):
            origin = row_of(data, step, row)
            tokens = token_ids(data, origin)
            inputs, last = batch.input_ids[row].tolist(), batch.labels[row, -1].item()
            assert tokens[:L] == inputs[: len(tokens)]
            assert not any(inputs[len(tokens) :])
            assert len(tokens) <= L or last in (tokens[L], IGNORED)
            assert data.names[batch.source_ids[row]] == origin.source
            assert sum(piece.stop - piece.start for piece in origin.pieces) == len(tokens)
            assert packing == "best_fit" or (last == tokens[L] and len(tokens) == L + 1)


def labelled(data: PackedDataset, until_step: int) -> dict[int, set[tuple[int, int]]]:
    """For every token, by its id, the rows that have it as a label: found by looking at the batches alone."""
    homes: dict[int, set[tuple[int, int]]] = {}
    for step in range(1, until_step + 1):
        batch = data.rows(step, 0, G)
        for row in range(G):
            ids = {label for label in batch.labels[row].tolist() if label != IGNORED}
            for token in ids:
                homes.setdefault(token, set()).add((step, row))
    return homes


@given(
    **ORDERS,
    until_step=st.integers(0, 12),
)
@settings(max_examples=40, deadline=None)
def test_the_inverse_finds_every_label(
    texts: dict[str, list[list[int]]], weights: Any, skip: Any, span: int, packing: str, until_step: int
) -> None:
    """Token by token: the steps that had it as a label, and besides them only where it is no label at all."""
    data = dataset(texts, weights, skip=skip, shuffle_span=span, packing=packing, max_padding=0.1)
    homes = labelled(data, until_step)
    for name, shards in texts.items():
        if name not in data.mixture.names:
            continue
        token = FIRST[name]
        for shard, documents in enumerate(shards):
            in_shard = token
            for length in documents:
                for i in range(length):
                    found = steps_of(data, name, shard, token - in_shard, token - in_shard + 1, until_step)
                    assert found == sorted(set(found))
                    expected = homes.get(token, set())
                    assert expected <= set(found)
                    for step, row in set(found) - expected:
                        # The first token of a document begins a window; of the stream, the first one.
                        origin = row_of(data, step, row)
                        assert token_ids(data, origin)[0] == token
                        assert i == 0 if packing == "best_fit" else origin.window == 0
                    token += 1


@given(
    shards=shard_lists, until_step=st.integers(1, 8), cut=st.tuples(st.integers(0, 50), st.integers(1, 50))
)
@settings(max_examples=40, deadline=None)
def test_a_stretch_is_the_union_of_its_tokens(
    shards: list[list[int]], until_step: int, cut: tuple[int, int]
) -> None:
    for packing in ("cut", "best_fit"):
        data = dataset({"a": shards}, packing=packing)
        shard = next(i for i, documents in enumerate(shards) if documents)
        length = sum(shards[shard])
        start = cut[0] % length
        stop = min(start + cut[1], length)
        one_by_one = {
            found
            for token in range(start, stop)
            for found in steps_of(data, "a", shard, token, token + 1, until_step)
        }
        assert steps_of(data, "a", shard, start, stop, until_step) == sorted(one_by_one)
        assert steps_of(data, "a", shard, start, start, until_step) == []


def test_every_pass_is_found() -> None:
    """60 tokens in windows of 8: a token is a label once in each pass, so in 30 steps of 4 rows 16 times."""
    data = dataset({"a": [[20, 10], [30]]})
    for shard in (0, 1):
        for token in range(30):
            found = steps_of(data, "a", shard, token, token + 1, 30)
            passes = sorted(row_of(data, *place).epoch for place in found)
            assert abs(len(found) - 16) <= 1
            assert all(later - earlier in (0, 1, 2) for earlier, later in pairwise(passes))


def test_a_source_that_grows_is_asked_for_no_more_than_was_served() -> None:
    growing = GrowingSource(numbered([[5 * L]] * 40))
    data = PackedDataset(
        {"a": growing}, {"a": 1}, seq_len=L, global_batch_size=G, seed=0, documents="attend", shuffle_span=10
    )
    for step in (1, 2):
        data.rows(step, 0, G)
    made = list(growing.asked)
    assert len(made) == 3
    assert steps_of(data, "a", made[0], 0, 5 * L, 2)
    assert steps_of(data, "a", next(i for i in range(40) if i not in made), 0, 5 * L, 2) == []
    assert growing.asked == made


class PartOfSource(GrowingSource):
    """A source of which only some shards are made, and of which no other may be asked for."""

    def __init__(self, source: ArraySource, made: Sequence[int]) -> None:
        super().__init__(source)
        self.made = made

    def _make(self, shard: int) -> None:
        assert shard in self.made
        super()._make(shard)


@given(
    shards=shard_lists,
    steps=st.integers(1, 6),
    span=st.integers(1, 6),
    packing=st.sampled_from(["cut", "best_fit"]),
)
@example(shards=[[7 * L - 4]] * 4, steps=1, span=7, packing="cut")  # the last window of the span crosses
@example(shards=[[9 * L - 4]] * 4, steps=1, span=9, packing="cut")
@settings(max_examples=40, deadline=None)
def test_what_was_trained_needs_no_more_text_than_the_training(
    shards: list[list[int]], steps: int, span: int, packing: str
) -> None:
    """Rows to documents and documents to rows: with the shards that training asked for, and no others."""
    whole = dataset({"a": shards}, packing=packing, shuffle_span=span)

    def over(source: GrowingSource) -> PackedDataset:
        order: dict[str, Any] = {"seed": 3, "documents": "attend", "shuffle_span": span, "packing": packing}
        return PackedDataset({"a": source}, {"a": 1}, seq_len=L, global_batch_size=G, **order)

    growing = GrowingSource(numbered(shards))
    trained = over(growing)
    for step in range(1, steps + 1):
        trained.rows(step, 0, G)
    asked = over(PartOfSource(numbered(shards), growing.asked))
    for step in range(1, steps + 1):
        for row in range(G):
            assert row_of(asked, step, row) == row_of(whole, step, row)
    asked = over(PartOfSource(numbered(shards), growing.asked))
    for shard in growing.asked:
        found = [steps_of(data, "a", shard, 0, sum(shards[shard]), steps) for data in (asked, whole)]
        assert found[0] == found[1]


def test_a_source_that_is_gone_is_named() -> None:
    before = dataset({"a": [[100]], "b": [[100]]}, {"a": 1, "b": 1})
    after = dataset({"a": [[100]]}).resumed(before.state(5))
    sources = {after.mixture.names[after.mixture.source_of(row)[0]]: row for row in range(G)}
    with pytest.raises(UserError, match=r"data\.sources has no b"):
        row_of(after, 1, sources["b"])
    assert row_of(after, 1, sources["a"]).source == "a"
    assert steps_of(after, "b", 0, 0, 100, 5) == []


def test_documents_of_pieces() -> None:
    source = ArraySource([[[1] * 5, [], [2] * 3], [[3] * 4]])
    pieces = [Piece(0, 0, 3, 8), Piece(0, 1, 0, 2)]
    assert [tuple(d) for d in documents_of(source, pieces)] == [
        (0, 0, 3, 5, 0),
        (0, 2, 0, 3, 2),
        (1, 0, 0, 2, 5),
    ]


class Huge:
    """10T tokens in 100,000 shards, each with the same documents of 1,000 tokens."""

    shards, complete, tokens = 100_000, True, 100_000 * 10**8
    fingerprint = manifest_hash = "0" * 64
    edges = np.arange(0, 10**8 + 1, 1000)

    def lengths(self, shards: np.ndarray) -> np.ndarray:
        return np.full(len(shards), 10**8)

    def want(self, shards: Sequence[int]) -> None:
        raise AssertionError("asking where a row comes from fetches nothing")

    def read(self, shard: int, start: int, stop: int) -> np.ndarray:
        raise AssertionError("nor does it read")

    def offsets(self, shard: int) -> np.ndarray:
        return self.edges


def test_it_is_arithmetic_at_any_size() -> None:
    data = PackedDataset(
        {"web": Huge(), "code": Huge()},
        {"web": 0.7, "code": 0.3},
        seq_len=2048,
        global_batch_size=10_000,
        seed=0,
        documents="separate",
        shuffle_span=65_536,
    )
    for step in (1, 10**5, 10**6):
        for row in (0, 9_999):
            origin = row_of(data, step, row)
            shard, document, start, stop, _ = origin.documents[1]
            first = 1000 * document + start
            assert (step, row) in steps_of(data, origin.source, shard, first, first + stop - start, step)
            found = steps_of(data, origin.source, shard, first, first + 1, step)
            assert (step, row) in found
            assert len(found) == origin.epoch + 1
