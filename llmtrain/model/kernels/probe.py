"""A look at a kernel before it is trusted: what one document says must not reach another, nor its gradient.

Both looks are at the blocks as they run uncompiled: compiled ones would be compiled for the look alone.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from llmtrain.config import UserError
from llmtrain.model.documents import Documents
from llmtrain.model.kernels.base import Kernel

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
    length, end, cu_seqlens = _documents(documents, seq_len, device)
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


def check_gradients(
    kernel: Kernel,
    *,
    shape: tuple[int, int, int],
    slopes: Tensor | None,
    dtype: torch.dtype,
    documents: bool,
    seq_len: int,
    device: torch.device,
) -> None:
    """UserError that names the kernel unless an output's gradient reaches only what the output may see.

    `shape` is H, K, D; `slopes` and `dtype` as the kernel has them. The rows are those of `check_isolation`;
    elsewhere every bit of a gradient must be 0. One forward pass of attention alone, three backward.
    """
    length, end, cu_seqlens = _documents(documents, seq_len, device)
    generator, (heads, kv_heads, width) = torch.Generator().manual_seed(0), shape
    q, k, v = (
        torch.randn(2, length, n, width, generator=generator).to(device, dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    )
    out = kernel.attend(q, k, v, kernel.prepare(Documents(2, length, cu_seqlens, device), slopes, dtype))
    parts = {
        "later tokens of the same document": ((0, slice(0, end // 2)), (0, slice(end // 2, end))),
        "the document before it in the row": ((0, slice(end, length)), (0, slice(0, end))),
        "another row": ((0, slice(0, length)), (1, slice(0, length))),
    }
    for name, (trained, unseen) in parts.items():
        gradients = torch.autograd.grad(out[trained].float().square().sum(), (q, k, v), retain_graph=True)
        reached = max(float(gradient[unseen].float().abs().sum()) for gradient in gradients)
        if reached != 0:  # nor nan
            raise UserError(
                f"model.attention.backend={kernel.name}: a gradient reached {name} (in sum {reached:.2g}), "
                "so this kernel's backward pass computes something else here: take another backend"
            )


def _documents(apart: bool, seq_len: int, device: torch.device) -> tuple[int, int, Tensor]:
    """Two rows of T positions: T, where the first document of the first row ends, and all starts."""
    length = min(LENGTH[device.type], seq_len)
    end = length // 2 - length // 8 if apart else length  # inside a block of every kernel
    starts = sorted({0, end, length, 2 * length})
    return length, end, torch.tensor(starts, dtype=torch.int32, device=device)
