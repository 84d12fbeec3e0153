from __future__ import annotations

from collections.abc import Sequence
from itertools import chain, groupby

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llmtrain.data.batch import IGNORED, Batch
from llmtrain.data.best_fit import ShardPacking
from llmtrain.data.packing import Documents, Row, pack
from llmtrain.data.windows import Piece
from tests.data.array_source import ArraySource, numbered

L = 6

Shards = list[list[int]]
"""The lengths of the documents of each shard; their tokens are 0, 1, 2 ... through all of them."""


def rows_of(source: ArraySource, shards: Shards, windows: int, seq_len: int = L) -> list[Row]:
    """The first windows of the shards laid end to end."""
    tokens = [(number, place) for number, shard in enumerate(shards) for place in range(sum(shard))]
    rows = []
    for i, start in enumerate(range(0, windows * seq_len, seq_len)):
        spans = []
        for number, group in groupby(tokens[start : start + seq_len + 1], key=lambda token: token[0]):
            places = [place for _, place in group]
            spans.append(Piece(0, number, places[0], places[-1] + 1))
        rows.append(Row(i, source, spans))
    return rows


def separately(source: ArraySource, shards: Shards, windows: int) -> Batch:
    return pack(rows_of(source, shards, windows), L, "separate", boundary_targets=False)


def written_out(
    rows: Sequence[Row],
    shards: Shards,
    documents: Documents,
    boundary_targets: bool,
    segment_length: int | None = None,
) -> dict[str, list[int]]:
    """The batch token by token, from the document that each token belongs to: the reference."""
    document = [number for number, length in enumerate(chain(*shards)) for _ in range(length)]
    first_of_shard = [sum(map(sum, shards[:number])) for number in range(len(shards))]
    out: dict[str, list[int]] = {"input_ids": [], "labels": [], "position_ids": [], "cu_seqlens": []}
    for i, row in enumerate(rows):
        tokens = [first_of_shard[p.shard] + place for p in row.pieces for place in range(p.start, p.stop)]
        position = 0
        for j in range(L):
            here = tokens[j] if j < len(tokens) else None
            before = tokens[j - 1] if 0 < j <= len(tokens) else None
            after = tokens[j + 1] if j + 1 < len(tokens) else None
            begins = j == 0
            if documents == "separate" and before is not None:
                begins = here is None or here != before + 1 or document[here] != document[before]
            position = 0 if begins else position + 1
            out["position_ids"].append(position)
            if begins or (segment_length and j % segment_length == 0):
                out["cu_seqlens"].append(i * L + j)
            out["input_ids"].append(0 if here is None else here)
            target = False
            if here is not None and after is not None:
                if after == 0 or document[after - 1] != document[after]:  # the first of its document
                    target = boundary_targets
                else:
                    target = after == here + 1
            out["labels"].append(after if target and after is not None else IGNORED)
    out["cu_seqlens"].append(len(rows) * L)
    return out


def check(batch: Batch, expected: dict[str, list[int]]) -> None:
    for name, values in expected.items():
        assert getattr(batch, name).flatten().tolist() == values, name


document_lengths = st.lists(st.lists(st.integers(0, 2 * L + 1), max_size=6), min_size=1, max_size=4)
how_documents = st.sampled_from(["separate", "attend"])
segment_lengths = st.sampled_from([None, 1, 2, 4, L, 2 * L])


@given(document_lengths, how_documents, st.booleans(), segment_lengths)
def test_a_batch_of_a_stream_is_what_its_documents_say(
    shards: Shards, documents: Documents, boundary_targets: bool, segment_length: int | None
) -> None:
    windows = -(-max(sum(map(sum, shards)) - 1, 0) // L)
    if not windows:
        return
    rows = rows_of(numbered(shards), shards, windows)
    options = {"boundary_targets": boundary_targets, "segment_length": segment_length}
    batch = pack(rows, L, documents, **options)
    check(batch, written_out(rows, shards, documents, **options))
    assert batch.source_ids.tolist() == list(range(windows))


@settings(max_examples=200)
@given(st.data(), document_lengths, how_documents, st.booleans(), segment_lengths)
def test_pieces_from_anywhere_are_told_apart(
    data: st.DataObject,
    shards: Shards,
    documents: Documents,
    boundary_targets: bool,
    segment_length: int | None,
) -> None:
    filled = [number for number, shard in enumerate(shards) if sum(shard)]
    if not filled:
        return
    source = numbered(shards)
    rows = []
    for i in range(data.draw(st.integers(1, 4))):
        pieces, room = [], L + 1
        while room and data.draw(st.booleans() if pieces else st.just(True)):
            shard = data.draw(st.sampled_from(filled))
            start = data.draw(st.integers(0, sum(shards[shard]) - 1))
            if pieces and data.draw(st.booleans()) and pieces[-1].stop < sum(shards[pieces[-1].shard]):
                shard, start = pieces[-1].shard, pieces[-1].stop  # goes on where the last one ended
            stop = data.draw(st.integers(start + 1, min(sum(shards[shard]), start + room)))
            pieces.append(Piece(0, shard, start, stop))
            room -= stop - start
        rows.append(Row(i, source, pieces))
    options = {"boundary_targets": boundary_targets, "segment_length": segment_length}
    check(pack(rows, L, documents, **options), written_out(rows, shards, documents, **options))


@given(st.lists(st.integers(0, 3 * L), max_size=12), how_documents, st.booleans())
def test_best_fit_trains_every_token_but_the_first_of_a_document_once(
    lengths: list[int], documents: Documents, boundary_targets: bool
) -> None:
    shards, source = [lengths], numbered([lengths])
    packing = ShardPacking(source.offsets(0), L, 0.0)
    windows = [packing.window(i) for i in range(packing.count)]
    rows = [Row(0, source, [Piece(0, 0, *span) for span in window]) for window in windows]
    if not rows:
        return
    batch = pack(rows, L, documents, boundary_targets=boundary_targets)
    check(batch, written_out(rows, shards, documents, boundary_targets))
    trained = batch.labels[batch.labels != IGNORED].tolist()
    firsts = {sum(lengths[:i]) for i in range(len(lengths))}
    assert sorted(t for t in trained if t not in firsts) == sorted(set(range(sum(lengths))) - firsts)
    if not boundary_targets:
        assert not firsts & set(trained)


@pytest.mark.parametrize(
    ("lengths", "labels", "cu_seqlens"),
    [
        ([L, 1], [1, 2, 3, 4, 5, -100], [0, 6]),  # the row's last label begins the next document
        ([L + 1], [1, 2, 3, 4, 5, 6], [0, 6]),
        ([1] * (L + 1), [-100] * 6, [0, 1, 2, 3, 4, 5, 6]),
        ([2, 0, 0, 5], [1, -100, 3, 4, 5, 6], [0, 2, 6]),  # empty documents leave no trace
        ([L - 1, 2], [1, 2, 3, 4, -100, 6], [0, 5, 6]),
    ],
)
def test_documents_at_the_edges_of_a_row(
    lengths: list[int], labels: list[int], cu_seqlens: list[int]
) -> None:
    batch = separately(numbered([lengths]), [lengths], 1)
    assert batch.labels.tolist() == [labels]
    assert batch.cu_seqlens.tolist() == cu_seqlens


def test_an_end_of_text_id_inside_a_document_means_nothing() -> None:
    source = ArraySource([[[5, 0, 0, 5], [0, 5, 0]]])
    batch = separately(source, [[4, 3]], 1)
    assert batch.cu_seqlens.tolist() == [0, 4, 6]


def test_a_shard_begins_a_document() -> None:
    shards = [[3], [], [4]]
    batch = separately(numbered(shards), shards, 1)
    assert batch.labels.tolist() == [[1, 2, -100, 4, 5, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]


def test_the_next_pass_begins_a_document_in_the_same_window() -> None:
    source = numbered([[4]])
    row = Row(0, source, [Piece(0, 0, 1, 4), Piece(1, 0, 0, 4)])
    separate = pack([row], L, "separate", boundary_targets=False)
    assert separate.labels.tolist() == [[2, 3, -100, 1, 2, 3]]
    assert separate.cu_seqlens.tolist() == [0, 3, 6]
    attend = pack([row], L, "attend", boundary_targets=True)
    assert attend.labels.tolist() == [[2, 3, 0, 1, 2, 3]]
    assert attend.position_ids.tolist() == [[0, 1, 2, 3, 4, 5]]


@pytest.mark.parametrize("documents", ["separate", "attend"])
def test_a_document_that_goes_on_here_was_no_target_of_the_piece_before_it(documents: Documents) -> None:
    source = numbered([[3, 9]])
    row = Row(0, source, [Piece(0, 0, 0, 3), Piece(0, 0, 7, 11)])
    batch = pack([row], L, documents, boundary_targets=True)
    assert batch.labels.tolist() == [[1, 2, -100, 8, 9, 10]]
    assert batch.cu_seqlens.tolist() == ([0, 3, 6] if documents == "separate" else [0, 6])


def test_growing_segments_leave_positions_and_targets_alone() -> None:
    source = numbered([[3, 4]])
    rows = rows_of(source, [[3, 4]], 1)
    whole = pack(rows, L, "separate", boundary_targets=False)
    short = pack(rows, L, "separate", boundary_targets=False, segment_length=2)
    assert whole.cu_seqlens.tolist() == [0, 3, 6]
    assert short.cu_seqlens.tolist() == [0, 2, 3, 4, 6]
    assert torch.equal(short.position_ids, whole.position_ids)
    assert torch.equal(short.labels, whole.labels)


@pytest.mark.parametrize("documents", ["separate", "attend"])
@pytest.mark.parametrize("tokens", range(1, 2 * L + 2))
def test_what_is_not_there_is_no_target(documents: Documents, tokens: int) -> None:
    rows = rows_of(numbered([[tokens]]), [[tokens]], 2)
    batch = pack(rows, L, documents, boundary_targets=documents == "attend")
    targets = batch.labels[batch.labels != IGNORED].tolist()
    assert targets == list(range(1, tokens))
    assert batch.input_ids.flatten().tolist()[: tokens - 1] == list(range(tokens - 1))


def test_padding_attends_to_nothing() -> None:
    rows = rows_of(numbered([[4]]), [[4]], 2)
    batch = pack(rows, L, "separate", boundary_targets=False)
    assert batch.cu_seqlens.tolist() == [0, 4, 6, 12]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 0, 1]


def test_ids_of_either_width_become_int32() -> None:
    for dtype in (np.uint16, np.uint32):
        source = ArraySource([[[1, 2, 65_535, 4, 5, 6, 7]]])
        source._tokens = [tokens.astype(dtype) for tokens in source._tokens]
        batch = separately(source, [[7]], 1)
        assert batch.input_ids.tolist() == [[1, 2, 65_535, 4, 5, 6]]
        for tensor in vars(batch).values():
            assert tensor.dtype == torch.int32
            assert tensor.is_contiguous()
