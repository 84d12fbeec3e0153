"""Windows of tokens laid out as the rows of a batch, with the documents in them told apart.

A document begins where its shard's offsets say so, never where an end-of-text id happens to stand.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Literal, NamedTuple

import numpy as np
import torch

from llmtrain.data.batch import IGNORED, Batch
from llmtrain.data.windows import Piece, TokenReader

Documents = Literal["separate", "attend"]

_NOWHERE = np.empty(0, np.int64)


class Row(NamedTuple):
    """A window to be read: up to L + 1 tokens of one source."""

    source_id: int
    source: TokenReader
    pieces: Sequence[Piece]


def pack(
    rows: Sequence[Row],
    seq_len: int,
    documents: Documents,
    *,
    boundary_targets: bool,
    segment_length: int | None = None,
) -> Batch:
    """The batch of these windows: L inputs a row, and as label of each the token that follows it.

    separate: each document in a row is a segment with positions from 0. attend: a row is one segment.
    boundary_targets: whether a document's first token is a target where another one stands before it in its
    row. The first token of a piece that goes on with a document begun in another window is none in any case:
    it was a target there. Windows of fewer than L + 1 tokens are filled up with zeros that are no targets,
    and that are a segment of their own (separate). segment_length cuts segments, but neither positions nor
    targets, at its multiples within a row (SkyLadder, arXiv 2503.15450).
    """
    tokens = np.zeros((len(rows), seq_len + 1), np.int32)
    filled = [_read(row, out) for row, out in zip(rows, tokens, strict=True)]
    labels = tokens[:, 1:].copy()
    begins = np.zeros(labels.size + 1, bool)
    begins[::seq_len] = True
    separate = documents == "separate"
    _end_rows(filled, labels, begins, separate)
    if separate or not boundary_targets:
        starts = np.concatenate([_document_starts(row, i * seq_len) for i, row in enumerate(rows)])
        if separate:
            begins[starts] = True
        if not boundary_targets:
            labels.reshape(-1)[starts - 1] = IGNORED
    _end_pieces(rows, labels, begins, separate)
    cu_seqlens = np.flatnonzero(begins).astype(np.int32)
    positions = np.arange(labels.size, dtype=np.int32)
    positions -= cu_seqlens[:-1].repeat(cu_seqlens[1:] - cu_seqlens[:-1])  # np.diff costs more than this
    if segment_length is not None:
        begins[:-1].reshape(labels.shape)[:, ::segment_length] = True
        cu_seqlens = np.flatnonzero(begins).astype(np.int32)
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


def _end_rows(filled: Sequence[int], labels: np.ndarray, begins: np.ndarray, separate: bool) -> None:
    """What fills up a window is no target, and a segment of its own where documents are."""
    seq_len = labels.shape[1]
    for i, count in enumerate(filled):
        if count <= seq_len:
            labels[i, max(count - 1, 0) :] = IGNORED
            begins[i * seq_len + count] |= separate


def _end_pieces(rows: Sequence[Row], labels: np.ndarray, begins: np.ndarray, separate: bool) -> None:
    """Where a document goes on that began in another window, its first token here was a target there."""
    for i, row in enumerate(rows):
        if len(row.pieces) > 1 and (places := _continuations(row, i * labels.shape[1])):
            labels.reshape(-1)[[place - 1 for place in places]] = IGNORED
            begins[places] |= separate


def _document_starts(row: Row, place: int) -> np.ndarray:
    """The places of tokens that begin a document, in a window whose first token is at `place`.

    That first token is left out: it has no label to mask, and begins a segment in any case.
    """
    starts: list[np.ndarray] = []
    for piece in row.pieces:
        offsets = row.source.offsets(piece.shard)
        first, last = offsets.searchsorted((piece.start + (not starts), piece.stop))
        starts.append(offsets[first:last] + (place - piece.start))
        place += piece.stop - piece.start
    return np.concatenate(starts or [_NOWHERE]) if len(starts) != 1 else starts[0]


def _continuations(row: Row, place: int) -> list[int]:
    """The places of tokens before which the row jumps into the middle of a document, which went on elsewhere.

    A jump to the beginning of a document is like any other boundary of documents.
    """
    places = []
    for before, piece in pairwise(row.pieces):
        place += before.stop - before.start
        goes_on = (piece.epoch, piece.shard, piece.start) == (before.epoch, before.shard, before.stop)
        if piece.start and not goes_on:
            offsets = row.source.offsets(piece.shard)
            if offsets[offsets.searchsorted(piece.start)] != piece.start:
                places.append(place)
    return places
