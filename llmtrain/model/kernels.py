"""Attention kernels: one function type, so that attention itself never asks which one it has.

A kernel is `(q, k, v, slopes, documents) -> out`.
    q, out [B, H, T, D]   k, v [B, K, T, D], K divides H: query head h reads key/value head h // (H / K)
    slopes [H] fp32 or None: ALiBi's penalty a position of distance
Letters: B rows, T positions, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config import Config
from llmtrain.model.documents import Documents
from llmtrain.model.layers import full_precision

log = logging.getLogger(__name__)

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor | None, Documents], Tensor]


class AttentionConfig(Config):
    """How attention is computed; never what it computes."""

    backend: Literal["auto", "eager", "sdpa"]
    """eager is the readable reference, sdpa torch's fused attention, auto the fastest exact one here."""

    def kernel(self) -> Kernel:
        """The kernel that `backend` names. `auto` says in the log which one it took and why."""
        if self.backend == "eager":
            return eager
        if self.backend == "auto":
            log.info(
                "model.attention.backend=auto: sdpa (exact on every device; documents and ALiBi as one mask "
                "a forward, and no mask at all where each row is one document)"
            )
        return sdpa


def eager(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, documents: Documents) -> Tensor:
    """The reference: scores, bias, mask, softmax, each a line. The softmax runs in fp32 or better."""
    k, v = repeat_heads(k, v, q.shape[1])
    scores = full_precision(q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5
    if slopes is not None:
        scores = scores - slopes[:, None, None] * documents.distance
    scores = scores.masked_fill(~documents.allowed, float("-inf"))
    return scores.softmax(dim=-1).to(v.dtype) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, documents: Documents) -> Tensor:
    """torch's `scaled_dot_product_attention`: no mask for one document a row, else one mask a forward."""
    if slopes is not None:
        mask: Tensor | None = documents.bias(slopes, q.dtype)
    else:
        mask = None if documents.one_per_row else documents.allowed
    if mask is not None and q.is_cuda:
        # CUDA's fused kernels that take a mask take no grouped heads: torch would fall back to unfused math.
        k, v = repeat_heads(k, v, q.shape[1])
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=k.shape[1] != q.shape[1]
    )


def repeat_heads(k: Tensor, v: Tensor, n_heads: int) -> tuple[Tensor, Tensor]:
    """[B, K, T, D] -> [B, H, T, D]: each key/value head stands once for every query head that reads it."""
    repeats = n_heads // k.shape[1]
    if repeats == 1:
        return k, v
    return torch.repeat_interleave(k, repeats, dim=1), torch.repeat_interleave(v, repeats, dim=1)
