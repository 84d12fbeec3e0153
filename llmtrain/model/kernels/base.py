"""What an attention kernel is: two functions, so that attention itself never asks which one it has.

    prepare(documents, slopes, dtype) -> prepared    once a forward pass, outside the compiled blocks
    attend(q, k, v, prepared) -> out                 in every block, inside of them
        q, out [B, T, H, D]   k, v [B, T, K, D], K divides H: query head h reads key/value head h // (H / K)
        slopes [H] fp32 or None: ALiBi's penalty a position of distance
        dtype: that of q, k, v

Attention is causal, keeps `documents` apart, and scales scores by D^-0.5. Letters: B rows, T positions,
H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from llmtrain.model.documents import Documents

Prepared = Any
"""What a kernel needs of a batch: None, tensors, or a tuple of them (and of numbers) of its own."""


class Kernel(NamedTuple):
    """One way to compute attention."""

    name: str
    prepare: Callable[[Documents, Tensor | None, torch.dtype], Prepared]
    attend: Callable[[Tensor, Tensor, Tensor, Prepared], Tensor]
    why: str = "as asked"
    """Why a run has this one."""


def repeat_heads(k: Tensor, v: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """[B, T, K, D] -> [B, T, H, D]: each key/value head stands once for every query head that reads it."""
    repeats = n_heads // k.shape[2]
    if repeats == 1:
        return k, v
    return torch.repeat_interleave(k, repeats, dim=2), torch.repeat_interleave(v, repeats, dim=2)
