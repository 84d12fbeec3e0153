"""Which positions of a batch belong to one document, and what attention makes of it.

Letters: B rows, T positions, H query heads.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor


class Documents:
    """The documents of a batch; its masks are built at first use.

    `cu_seqlens` int [documents + 1]: where each document starts in the flattened B * T positions, then
    B * T. Every row starts a document. None: each row is one document. Nothing here waits for the device.
    """

    def __init__(self, rows: int, length: int, cu_seqlens: Tensor | None, device: torch.device) -> None:
        self.rows, self.length, self.device = rows, length, device
        self.cu_seqlens = cu_seqlens

    @property
    def one_per_row(self) -> bool:
        """Whether plain causal attention is exact. As every row starts a document, the count tells."""
        return self.cu_seqlens is None or self.cu_seqlens.shape[0] == self.rows + 1

    @cached_property
    def ids(self) -> Tensor:
        """int [B or 1, T]: equal exactly where two positions of a row share a document."""
        if self.cu_seqlens is None or self.one_per_row:
            return torch.zeros(1, self.length, dtype=torch.int64, device=self.device)
        positions = torch.arange(self.rows * self.length, device=self.device)
        starts = self.cu_seqlens.to(device=self.device, dtype=torch.int64)
        return torch.searchsorted(starts, positions, right=True).view(self.rows, self.length)

    @cached_property
    def starts(self) -> Tensor:
        """int32 [2^n + 1]: where each document starts, then B * T once and for every empty one after it.

        Documents vary in number from batch to batch; lengths that are rounded up so keep a compiled block
        from being compiled for every one of them.
        """
        given = self.cu_seqlens
        if given is None:
            given = torch.arange(self.rows + 1, device=self.device) * self.length
        places = 1 << (given.shape[0] - 2).bit_length()
        starts = torch.full((places + 1,), self.rows * self.length, dtype=torch.int32, device=self.device)
        starts[: given.shape[0]] = given
        return starts

    @cached_property
    def allowed(self) -> Tensor:
        """bool [B or 1, 1, T, T]: query i may see key j when j <= i and both are of one document."""
        ids = self.ids
        return ((ids[:, :, None] == ids[:, None, :]) & (self.distance >= 0))[:, None]

    @cached_property
    def distance(self) -> Tensor:
        """int [T, T]: i - j, how far back key j lies from query i. The same inside any document."""
        positions = torch.arange(self.length, device=self.device)
        return positions[:, None] - positions[None, :]

    def bias(self, slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
        """[B or 1, H or 1, T, T] of `dtype`: -slope * distance (Press et al. 2022), -inf where unseen."""
        if slopes is None:
            linear = torch.zeros((), dtype=dtype, device=self.device)
        else:
            linear = (slopes[:, None, None] * -self.distance).to(dtype)
        return torch.where(self.allowed, linear, float("-inf"))
