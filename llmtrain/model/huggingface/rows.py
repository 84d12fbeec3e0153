"""How the rows of the fused matrix of queries, keys and values are ordered, here and there.

    here        q of all heads, k of all heads, v of all heads
    grouped     for each key/value head: the q of its query heads, its k, its v (Falcon, BLOOM)

Letters: H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.model.decoder import DecoderConfig


def rows_of_parts(name: str, config: DecoderConfig) -> list[int]:
    """Rows of each part of one of our fused matrices: gate and up, or queries, keys and values."""
    if ".gate_up." in name:
        return [config.d_ff, config.d_ff]
    keys: int = config.n_kv_heads * config.d_head
    return [config.n_heads * config.d_head, keys, keys]


def grouped(rows: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """[(H + 2 K) D, ...], ours -> grouped."""
    head_dim = len(rows) // (n_heads + 2 * n_kv_heads)
    parts = rows.unflatten(0, (-1, head_dim)).split([n_heads, n_kv_heads, n_kv_heads])
    return torch.cat([part.unflatten(0, (n_kv_heads, -1)) for part in parts], dim=1).flatten(0, 2)


def ungrouped(rows: Tensor, n_heads: int, n_kv_heads: int) -> Tensor:
    """The inverse of `grouped`."""
    shares = n_heads // n_kv_heads
    parts = rows.unflatten(0, (n_kv_heads, shares + 2, -1)).split([shares, 1, 1], dim=1)
    return torch.cat([part.flatten(0, 2) for part in parts])


def halves(rows: Tensor, head_dim: int) -> Tensor:
    """[n D, ...] of heads whose RoPE turns 2i with 2i + 1 -> the same for one that turns i with i + D / 2."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)
