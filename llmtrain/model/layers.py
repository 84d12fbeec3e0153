"""The two parts that hold most of the weights, Linear and Embedding, and a helper for precision.

Both leave their weight undrawn: model/init.py owns every initial value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Linear(nn.Linear):
    """`nn.Linear` whose weight [d_out, d_in] is not drawn twice."""

    def __init__(self, d_in: int, d_out: int, bias: bool = False) -> None:
        super().__init__(d_in, d_out, bias)

    def reset_parameters(self) -> None:
        """Nothing: model/init.py draws the weight."""


class Embedding(nn.Module):
    """A table [rows, width] that maps ids to vectors, and vectors to a logit, or a loss, by its rows.

    All directions are calls of this one module, so that a tied head needs no second owner of the weight:
    ZeRO-3 gathers a parameter only around the calls of the module that owns it.
    """

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(rows, width))

    def forward(self, x: Tensor, head: Callable[[Tensor, Tensor], Any] = F.embedding) -> Any:
        """head(x, weight); ids [...] -> vectors [..., width] by default."""
        return head(x, self.weight)


def full_precision(x: Tensor) -> Tensor:
    """`x` in float32, or as it is when it is float64: what softmax, rotation and loss are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def compute_dtype(x: Tensor) -> torch.dtype:
    """What matrix products of `x` come out as: the autocast dtype where autocast is on, else that of `x`."""
    kind = x.device.type
    # The meta device has no autocast, and asking whether it is on is an error there.
    casts = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if casts else x.dtype
