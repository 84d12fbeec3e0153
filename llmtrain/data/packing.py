"""Windows of tokens laid out as the rows of a batch, with the documents in them told apart.

A document begins where its shard's offsets say so, never where an end-of-text id happens to stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import torch

from llmtrain.data.batch import IGNORED, Batch
from llmtrain.data.stream import Piece, TokenSource

Documents = Literal["separate", "attend"]

_NOWHERE = np.empty(0, np.int64)


class Row(NamedTuple):
    """A window to be read: up to L + 1 tokens of one source."""

    source_id: int
    source: TokenSource
    pieces: Sequence[Piece]


def pack(rows: Sequence[Row], seq_len: int, documents: Documents) -> Batch:
    """The batch of these windows: L inputs a row, and as label of each the token that follows it.

    separate: each document in a row is a segment with positions from 0, and its first token is no target.
    attend: a row is one segment, and every token after its first is a target. Windows of fewer than L + 1
    tokens are filled up with zeros that are no targets.
    """
    tokens = np.zeros((len(rows), seq_len + 1), np.int32)
    filled = [_read(row, out) for row, out in zip(rows, tokens, strict=True)]
    labels = tokens[:, 1:].copy()
    for row, count in enumerate(filled):
        if count <= seq_len:
            labels[row, max(count - 1, 0) :] = IGNORED
    begins = np.zeros(labels.size + 1, bool)
    begins[::seq_len] = True
    if documents == "separate":
        starts = np.concatenate([_document_starts(row, i * seq_len) for i, row in enumerate(rows)])
        labels.reshape(-1)[starts - 1] = IGNORED
        begins[starts] = True
    cu_seqlens = np.flatnonzero(begins).astype(np.int32)
    positions = np.arange(labels.size, dtype=np.int32)
    positions -= np.repeat(cu_seqlens[:-1], np.diff(cu_seqlens))
    return Batch(
        input_ids=torch.from_numpy(tokens[:, :-1].copy()),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(positions.reshape(labels.shape)),
        cu_seqlens=torch.from_numpy(cu_seqlens),
        source_ids=torch.from_numpy(np.array([row.source_id for row in rows], np.int32)),
    )


def _read(row: Row, out: np.ndarray) -> int:
    """Copies a window's tokens to the front of `out` and says how many there were."""
    filled = 0
    for piece in row.pieces:
        ids = row.source.read(piece.shard, piece.start, piece.stop)
        out[filled : filled + len(ids)] = ids
        filled += len(ids)
    return filled


def _document_starts(row: Row, place: int) -> np.ndarray:
    """The places of tokens that begin a document, in a window whose first token is at `place`.

    That first token is left out: it has no label to mask, and begins a segment in any case.
    """
    starts: list[np.ndarray] = []
    for piece in row.pieces:
        offsets = row.source.offsets(piece.shard)
        # A piece after the first begins with its shard, and so with a document.
        first, last = offsets.searchsorted((piece.start + (not starts), piece.stop))
        starts.append(offsets[first:last] + (place - piece.start))
        place += piece.stop - piece.start
    return np.concatenate(starts or [_NOWHERE]) if len(starts) != 1 else starts[0]
