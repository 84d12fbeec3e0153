"""The batch in which the data meets the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

IGNORED = -100
"""A label that is not trained: `torch.nn.functional.cross_entropy` ignores it by default."""


@dataclass(frozen=True)
class Batch:
    """Rows of L tokens and what a decoder has to know about them; all tensors are int32.

    Int32 halves the way to the device; what needs int64 (targets of a cross entropy) is widened there.
    """

    input_ids: Tensor
    """[rows, L]"""
    labels: Tensor
    """[rows, L]: the token that follows each input, IGNORED where it is not trained."""
    position_ids: Tensor
    """[rows, L]: place within the document, or within the part of it that is in the row."""
    cu_seqlens: Tensor
    """[segments + 1]: where attention's segments begin in the flattened rows * L positions, and where the
    last one ends. Every row begins a segment."""
    source_ids: Tensor
    """[rows]: number of the source a row is from."""

    @property
    def rows(self) -> int:
        return self.input_ids.shape[0]

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Batch:
        """The same batch on a device; the copy runs beside the host only out of pinned memory."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """The same batch in page-locked memory, from where a GPU copies by itself."""
        return self._map(Tensor.pin_memory)

    def record_stream(self, stream: torch.Stream) -> None:
        """Freed, this memory goes to nobody before `stream` has done what it was given until then."""
        for field in fields(self):
            getattr(self, field.name).record_stream(stream)

    def split(self, micro_batch_size: int) -> list[Batch]:
        """Consecutive batches of `micro_batch_size` rows (the last may have fewer) that share this memory.

        Split before moving to a device: finding the segments there would wait for it.
        """
        starts = range(0, self.rows, micro_batch_size)
        return [self._slice(start, min(start + micro_batch_size, self.rows)) for start in starts]

    def _slice(self, first: int, last: int) -> Batch:
        edges = torch.tensor([first, last], dtype=torch.int32, device=self.cu_seqlens.device)
        edges *= self.input_ids.shape[1]
        begin, end = torch.searchsorted(self.cu_seqlens, edges).tolist()
        return Batch(
            self.input_ids[first:last],
            self.labels[first:last],
            self.position_ids[first:last],
            self.cu_seqlens[begin : end + 1] - edges[0],
            self.source_ids[first:last],
        )

    def _map(self, function: Callable[[Tensor], Tensor]) -> Batch:
        return Batch(*(function(getattr(self, field.name)) for field in fields(self)))
