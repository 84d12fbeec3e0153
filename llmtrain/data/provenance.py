"""Which tokens were in a row, and which rows had given tokens: arithmetic on the order, not a log."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

from llmtrain.data.dataset import PackedDataset
from llmtrain.data.windows import Piece, TokenSource


class DocumentSpan(NamedTuple):
    """Consecutive tokens of one document in a window."""

    shard: int
    document: int
    """Its number in the shard."""
    start: int
    """First token within the document, and the one after the last."""
    stop: int
    place: int
    """Where in the window the first one is, from 0; place L is only a label."""


class WindowOrigin(NamedTuple):
    """Where the up to L + 1 tokens of a row come from."""

    source: str
    epoch: int
    """The pass over the source that owns the window, from 0."""
    k: int
    """Windows of the source that were served before."""
    window: int
    """Its number in the source's stream."""
    span: int
    """Number of the shuffle span within the pass."""
    pieces: list[Piece]
    """The tokens by shard, in the order of the window."""
    documents: list[DocumentSpan]
    """The same tokens by document."""


def row_of(dataset: PackedDataset, step: int, row: int) -> WindowOrigin:
    """Where a row of the global batch of a step comes from; its source has to be in the dataset."""
    assert step >= 1 and 0 <= row < dataset.global_batch_size, (step, row)
    number = (dataset.data_step(step) - 1) * dataset.global_batch_size + row
    source, k = dataset.mixture.source_of(number)
    stream = dataset.stream(source)
    epoch, span, window = stream.place(k)
    pieces = stream.pieces(window)
    return WindowOrigin(stream.name, epoch, k, window, span, pieces, documents_of(stream.source, pieces))


def documents_of(source: TokenSource, pieces: Sequence[Piece]) -> list[DocumentSpan]:
    """The documents that the tokens of a window belong to."""
    documents = []
    place = 0
    for _, shard, start, stop in pieces:
        offsets = source.offsets(shard)
        first, last = int(offsets.searchsorted(start, "right")) - 1, int(offsets.searchsorted(stop))
        edges = offsets[first : last + 1].tolist()
        for document, (begin, end) in enumerate(pairwise(edges), first):
            from_, to = max(start, begin), min(stop, end)
            if from_ < to:  # documents may be empty
                documents.append(DocumentSpan(shard, document, from_ - begin, to - begin, place))
                place += to - from_
    return documents


def steps_of(
    dataset: PackedDataset, source: str, shard: int, start: int, stop: int, until_step: int
) -> list[tuple[int, int]]:
    """Every (step, row) up to a step that has one of the tokens start .. stop - 1 of a shard at home.

    Each token is at home in one row a pass: where it is a label, or would be if it did not begin a document
    there. A row whose first token is the only one of these has it as context, and is not named. A source
    that no mixture has named was in no row.
    """
    if until_step < 1 or source not in dataset.streams:
        return []
    number = dataset.mixture.names.index(source)
    rows = dataset.global_batch_size
    served = dataset.mixture.counts(dataset.data_step(until_step) * rows)[number]
    found = []
    for k in dataset.streams[source].served_with(shard, start, stop, served):
        window = dataset.mixture.window_of(number, k)
        assert window is not None  # it was served
        step = dataset.skip.training_step(window // rows + 1)
        if step is not None:
            found.append((step, window % rows))
    return found
