from __future__ import annotations

from itertools import chain

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.batch import Batch
from llmtrain.data.packing import Documents, Row, pack
from llmtrain.data.stream import Layout
from tests.data.array_source import ArraySource, numbered

L = 6


def rows_of(source: ArraySource, windows: int, seq_len: int = L) -> list[Row]:
    """The first windows of the shards laid end to end."""
    layout = Layout(range(len(source.lengths)), source.lengths.tolist())
    starts = range(0, windows * seq_len, seq_len)
    return [
        Row(i, source, layout.pieces(0, start, min(start + seq_len + 1, source.tokens)))
        for i, start in enumerate(starts)
    ]


def written_out(shards: list[list[int]], windows: int, documents: Documents) -> dict[str, list[int]]:
    """The batch token by token, from the document that each token belongs to: the reference."""
    document = [number for number, length in enumerate(chain(*shards)) for _ in range(length)]
    expected: dict[str, list[int]] = {"labels": [], "position_ids": [], "cu_seqlens": []}
    for start in range(0, windows * L, L):
        position = 0
        for token in range(start, start + L):
            same = documents == "attend" or document[token] == document[token + 1]
            begins = token == start or (documents == "separate" and document[token - 1] != document[token])
            if begins:
                position = 0
                expected["cu_seqlens"].append(token)
            expected["labels"].append(token + 1 if same else -100)
            expected["position_ids"].append(position)
            position += 1
    expected["cu_seqlens"].append(windows * L)
    return expected


documents_in_shards = st.lists(st.lists(st.integers(0, 2 * L + 1), max_size=6), min_size=1, max_size=4)


@pytest.mark.parametrize("documents", ["separate", "attend"])
@given(shards=documents_in_shards)
def test_a_batch_is_what_its_documents_say(documents: Documents, shards: list[list[int]]) -> None:
    source = numbered(shards)
    windows = (source.tokens - 1) // L
    if windows < 1:
        return
    batch = pack(rows_of(source, windows), L, documents)
    expected = written_out(shards, windows, documents)
    assert batch.input_ids.flatten().tolist() == list(range(windows * L))
    assert batch.labels.flatten().tolist() == expected["labels"]
    assert batch.position_ids.flatten().tolist() == expected["position_ids"]
    assert batch.cu_seqlens.tolist() == expected["cu_seqlens"]
    assert batch.source_ids.tolist() == list(range(windows))


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
    batch = pack(rows_of(numbered([lengths]), 1), L, "separate")
    assert batch.labels.tolist() == [labels]
    assert batch.cu_seqlens.tolist() == cu_seqlens


def test_an_end_of_text_id_inside_a_document_means_nothing() -> None:
    source = ArraySource([[[5, 0, 0, 5], [0, 5, 0]]])
    batch = pack(rows_of(source, 1), L, "separate")
    assert batch.cu_seqlens.tolist() == [0, 4, 6]


def test_a_shard_begins_a_document() -> None:
    batch = pack(rows_of(numbered([[3], [], [4]]), 1), L, "separate")
    assert batch.labels.tolist() == [[1, 2, -100, 4, 5, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 2]]


@pytest.mark.parametrize("documents", ["separate", "attend"])
@pytest.mark.parametrize("tokens", range(1, 2 * L + 2))
def test_what_is_not_there_is_no_target(documents: Documents, tokens: int) -> None:
    batch = pack(rows_of(numbered([[tokens]]), 2), L, documents)
    targets = batch.labels[batch.labels != -100].tolist()
    assert targets == list(range(1, tokens))
    assert batch.input_ids.flatten().tolist()[: tokens - 1] == list(range(tokens - 1))


def test_ids_of_either_width_become_int32() -> None:
    for dtype in (np.uint16, np.uint32):
        source = ArraySource([[[1, 2, 65_535, 4, 5, 6, 7]]])
        source._tokens = [tokens.astype(dtype) for tokens in source._tokens]
        batch: Batch = pack(rows_of(source, 1), L, "separate")
        assert batch.input_ids.tolist() == [[1, 2, 65_535, 4, 5, 6]]
        for tensor in vars(batch).values():
            assert tensor.dtype == torch.int32
            assert tensor.is_contiguous()
