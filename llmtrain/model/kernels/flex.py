"""torch's FlexAttention: one fused kernel that skips the blocks of scores which no query may see.

Blocks are found from the first and last document of every 128 positions, not from a mask of T x T.
On a CPU it has no backward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from llmtrain.model.documents import Documents
from llmtrain.model.kernels.base import Kernel

BLOCK = 128
"""Queries, and keys, of a block: what the kernel is tuned for."""

OPTIONS = {"BACKEND": "TRITON"}
"""One kernel for every length: for less than 128 queries torch would take its own for decoding."""

Change = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Visible = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Prepared(NamedTuple):
    """What a score becomes: hidden by the mask, lowered by ALiBi."""

    mask: BlockMask
    change: Change | None


def prepare(documents: Documents, slopes: Tensor | None, dtype: torch.dtype) -> Prepared:
    """The blocks, for all layers and heads, and ALiBi's change of a score."""
    change = None if slopes is None else _alibi(slopes)
    if documents.one_per_row:
        return Prepared(_one_document(documents.length, documents.device), change)
    return Prepared(block_mask(documents.ids, _inside(documents.ids)), change)


def attend(q: Tensor, k: Tensor, v: Tensor, prepared: Prepared) -> Tensor:
    """Fused attention; outside of a compiled block the kernel is compiled alone."""
    alone = q.is_cuda and not torch.compiler.is_compiling()
    fused: Any = _compiled() if alone else flex_attention
    grouped = q.shape[2] != k.shape[2]
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    out = fused(q, k, v, prepared.change, prepared.mask, enable_gqa=grouped, kernel_options=OPTIONS)
    return out.transpose(1, 2)


def block_mask(ids: Tensor, visible: Visible) -> BlockMask:
    """Causal inside documents; `ids` int [B or 1, T] never falls along a row and tells documents apart.

    A block is seen if its last key's document is not before its first query's, whole if all of it is one
    document before the diagonal. `visible` says the same of a query and a key.
    """
    length = ids.shape[1]
    blocks = -(-length // BLOCK)
    begins = torch.arange(blocks, device=ids.device) * BLOCK
    first, last = ids[:, begins], ids[:, (begins + BLOCK - 1).clamp(max=length - 1)]
    square = torch.ones(blocks, blocks, dtype=torch.bool, device=ids.device)
    seen = (last[:, None, :] >= first[:, :, None]) & square.tril()
    whole = (first[:, None, :] == last[:, :, None]) & square.tril(-1)
    if length % BLOCK:
        whole[:, -1] = False  # the last queries do not fill their block
    partial, full = _listed(seen & ~whole), _listed(whole)
    return BlockMask.from_kv_blocks(
        *partial, *full, BLOCK_SIZE=BLOCK, mask_mod=visible, seq_lengths=(length, length)
    )


def _causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _inside(ids: Tensor) -> Visible:
    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (ids[row, query] == ids[row, key])

    return visible


def _listed(chosen: Tensor) -> tuple[Tensor, Tensor]:
    """bool [B, Q, K] -> how many keys' blocks each queries' block has, [B, 1, Q], and which, in order."""
    chosen = chosen[:, None].to(torch.int32)
    order = chosen.argsort(dim=-1, descending=True, stable=True).to(torch.int32)
    return chosen.sum(dim=-1, dtype=torch.int32), order.contiguous()


def _alibi(slopes: Tensor) -> Change:
    def change(score: Tensor, row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score - slopes[head] * (query - key)

    return change


@lru_cache(maxsize=4)
def _one_document(length: int, device: torch.device) -> BlockMask:
    return block_mask(torch.zeros(1, length, dtype=torch.int64, device=device), _causal)


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., Tensor]:
    return torch.compile(flex_attention)


KERNEL = Kernel("flex", prepare, attend)
