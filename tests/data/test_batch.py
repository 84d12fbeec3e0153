from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from llmtrain.data.batch import Batch

L = 5


@st.composite
def batches(draw: st.DrawFn) -> Batch:
    rows = draw(st.integers(1, 9))
    inner = draw(st.sets(st.integers(1, rows * L - 1)))
    edges = sorted({*range(0, rows * L + 1, L), *inner})
    ids = torch.arange(rows * L, dtype=torch.int32).reshape(rows, L)
    return Batch(
        ids, ids + 1, ids % L, torch.tensor(edges, dtype=torch.int32), torch.arange(rows, dtype=torch.int32)
    )


@given(batches(), st.integers(1, 10))
def test_the_parts_of_a_split_are_the_batch(batch: Batch, size: int) -> None:
    parts = batch.split(size)
    assert [part.rows for part in parts[:-1]] == [size] * (len(parts) - 1)
    assert sum(part.rows for part in parts) == batch.rows
    for field in ("input_ids", "labels", "position_ids", "source_ids"):
        assert torch.equal(torch.cat([getattr(part, field) for part in parts]), getattr(batch, field))
    shifted = [part.cu_seqlens + i * size * L for i, part in enumerate(parts)]
    assert torch.equal(torch.cat(shifted).unique(), batch.cu_seqlens)
    for part in parts:
        assert part.cu_seqlens[0] == 0
        assert part.cu_seqlens[-1] == part.rows * L
        assert part.cu_seqlens.dtype == torch.int32
        assert (part.cu_seqlens.diff() > 0).all()


def test_a_split_shares_memory() -> None:
    ids = torch.zeros(4, L, dtype=torch.int32)
    edges = torch.arange(0, 4 * L + 1, L, dtype=torch.int32)
    batch = Batch(ids, ids.clone(), ids.clone(), edges, torch.zeros(4, dtype=torch.int32))
    batch.split(2)[1].input_ids[0, 0] = 7
    assert batch.input_ids[2, 0] == 7


def test_to_moves_every_tensor() -> None:
    ids = torch.zeros(2, L, dtype=torch.int32)
    batch = Batch(ids, ids, ids, torch.tensor([0, L, 2 * L], dtype=torch.int32), ids[:, 0]).to("meta")
    assert {tensor.device.type for tensor in vars(batch).values()} == {"meta"}
    assert batch.rows == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_memory_reaches_the_device() -> None:
    ids = torch.arange(2 * L, dtype=torch.int32).reshape(2, L)
    batch = Batch(ids, ids, ids, torch.tensor([0, L, 2 * L], dtype=torch.int32), ids[:, 0]).pin_memory()
    assert all(tensor.is_pinned() for tensor in vars(batch).values())
    assert torch.equal(batch.to("cuda").input_ids.cpu(), ids)
