"""A look at a kernel before it is trusted: what one document says must not reach another."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmtrain.config import UserError

LENGTH = {"cpu": 64, "cuda": 256}
"""Positions that are looked at: more than a block of any kernel where they are cheap."""

Logits = Callable[[Tensor, Tensor, Tensor], Tensor]
"""`input_ids` and `position_ids` int [2, T], `cu_seqlens` int32 -> logits [2, T, V]."""


def check_isolation(
    logits: Logits, *, backend: str, documents: bool, vocab_size: int, seq_len: int, device: torch.device
) -> None:
    """UserError that names `backend` unless tokens reach only what follows them in their own document.

    Two rows; with `documents` the first holds two. The second half of the first document changes, and no
    other logit may change in a single bit. Without gradient; two forward passes of 2 * T tokens.
    """
    length = min(LENGTH[device.type], seq_len)
    end = length // 2 - length // 8 if documents else length  # inside a block of every kernel
    starts = sorted({0, end, length, 2 * length})
    cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
    positions = torch.arange(length).repeat(2, 1)
    positions[0, end:] -= end
    ids = torch.randint(vocab_size, (2, length), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, end // 2 : end] = (ids[0, end // 2 : end] + 1) % vocab_size

    before, after = (logits(part.to(device), positions.to(device), cu_seqlens) for part in (ids, changed))
    parts = {
        "earlier tokens of the same document": (0, slice(0, end // 2)),
        "the next document of the row": (0, slice(end, length)),
        "another row": (1, slice(0, length)),
    }
    for name, part in parts.items():
        if not torch.equal(before[part], after[part]):
            largest = float((before[part] - after[part]).abs().max())
            raise UserError(
                f"model.attention.backend={backend}: a changed token moved logits of {name} (by up to "
                f"{largest:.2g}), so this kernel computes something else here: take another backend"
            )
