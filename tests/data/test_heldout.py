from __future__ import annotations

from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data import heldout
from llmtrain.data.heldout import HeldOut, unigram_counts
from llmtrain.data.packing import Documents
from tests.data.array_source import ArraySource, GrowingSource, numbered

L = 5
documents_in_shards = st.lists(st.lists(st.integers(1, 2 * L + 1), max_size=5), min_size=1, max_size=4)


@pytest.mark.parametrize("documents", ["separate", "attend"])
@given(
    shards=documents_in_shards, rows=st.integers(1, 4), limit=st.one_of(st.none(), st.integers(0, 12))
)  # fmt: skip
@settings(deadline=None)
def test_every_target_once(
    documents: Documents, shards: list[list[int]], rows: int, limit: int | None
) -> None:
    held_out = HeldOut(numbered(shards), L, rows, limit, documents)
    lengths = list(chain(*shards))[:limit]
    first_tokens = set(np.cumsum([0, *lengths]).tolist()) if documents == "separate" else {0}
    expected = [token for token in range(sum(lengths)) if token not in first_tokens]
    targets = [t for batch in held_out for t in batch.labels.flatten().tolist() if t != -100]
    assert targets == expected
    assert held_out.documents == len(lengths)
    assert held_out.text_bytes == sum(lengths)  # an ArraySource of bytes: a token is a byte
    assert all(batch.rows == rows for batch in held_out)


def test_context_is_what_precedes_the_target() -> None:
    for batch in HeldOut(numbered([[7, 4], [9]]), L, 2):
        trained = batch.labels != -100
        assert (batch.labels[trained] == batch.input_ids[trained] + 1).all()


def test_bytes_are_those_of_the_covered_documents() -> None:
    source = ArraySource([[[1, 2], [3]], [[4, 5, 6]]], text_bytes=[[20, 3], [500]])
    assert [HeldOut(source, L, 2, limit).text_bytes for limit in (0, 1, 2, 3, 9, None)] == [
        0, 20, 23, 523, 523, 523,
    ]  # fmt: skip


@pytest.mark.parametrize(("tokens", "batches"), [(1, 0), (2, 1), (11, 1), (12, 2), (21, 2), (22, 3)])
def test_as_many_batches_as_targets_need(tokens: int, batches: int) -> None:
    held_out = HeldOut(numbered([[tokens]]), L, 2)
    assert len(held_out) == len(list(held_out)) == batches
    beyond = held_out.batch(batches)
    assert beyond.rows == 2
    assert (beyond.labels == -100).all()


@given(shards=documents_in_shards, limit=st.one_of(st.none(), st.integers(0, 60)))
@settings(deadline=None)
def test_unigram_counts(shards: list[list[int]], limit: int | None) -> None:
    tokens = [token % 7 for token in range(sum(map(sum, shards)))]
    ids = iter(tokens)
    source = ArraySource([[[next(ids) for _ in range(length)] for length in shard] for shard in shards])
    counts = unigram_counts(source, range(source.shards), 9, limit)
    assert counts.tolist() == [Counter(tokens[:limit])[i] for i in range(9)]


def test_unigram_counts_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    source = ArraySource([[[1, 1, 2, 3, 3, 3, 1]], [[2, 2]]])
    monkeypatch.setattr(heldout, "CHUNK", 2)
    assert unigram_counts(source, [0, 1], 4).tolist() == [0, 3, 3, 3]
    assert unigram_counts(source, [0, 1], 4, 5).tolist() == [0, 2, 1, 2]
    assert unigram_counts(source, [1, 0], 4, 5).tolist() == [0, 2, 3, 0]
    assert unigram_counts(source, [], 4).tolist() == [0, 0, 0, 0]


def test_boundary_targets_as_in_training() -> None:
    for documents, boundary, count in (("separate", True, 10), ("attend", False, 8), ("attend", None, 10)):
        held_out = HeldOut(numbered([[4, 3], [4]]), L, 2, None, documents, boundary)
        assert sum(int((batch.labels != -100).sum()) for batch in held_out) == count


def test_only_the_shards_that_the_limit_needs_are_made() -> None:
    complete = numbered([[4, 3], [], [5], [6], [7], [8], [9]])
    growing = GrowingSource(complete)
    held_out, expected = HeldOut(growing, L, 2, 3), HeldOut(complete, L, 2, 3)
    assert growing.asked == [0, 1, 2]
    assert growing.wanted[0] == [0, 1, 2, 3]
    assert (held_out.documents, held_out.text_bytes, held_out.tokens) == (3, 12, 12)
    for ours, theirs in zip(held_out, expected, strict=True):
        assert (ours.labels == theirs.labels).all()
    counting = GrowingSource(complete)
    assert unigram_counts(counting, range(7), 50, 10).tolist() == [1] * 10 + [0] * 40
    assert counting.asked == [0, 1, 2]
