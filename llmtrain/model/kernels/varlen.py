"""torch's `varlen_attn`: the flash attention inside torch, documents by their starts, no ALiBi."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from llmtrain.model.documents import Documents
from llmtrain.model.kernels.base import Kernel, repeat_heads

CAUSAL = (-1, 0)
"""The window of keys: all before a query, none after it."""


def prepare(documents: Documents, slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The starts of the documents, a row's own where each row is one."""
    assert slopes is None, "varlen_attn has no ALiBi"
    return documents.starts


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor) -> Tensor:
    """Fused attention, bf16 or fp16. The longest document is given as T: a bound that never varies."""
    rows, length, heads = q.shape[:3]
    options: dict[str, Any] = {"window_size": CAUSAL}
    if GROUPS:
        options["enable_gqa"] = True
    else:
        k, v = repeat_heads(k, v, heads)
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    out = varlen_attn(q, k, v, starts, starts, length, length, **options)
    assert isinstance(out, Tensor)  # a tuple only where more was asked for
    return out.unflatten(0, (rows, length))


GROUPS = "enable_gqa" in inspect.signature(varlen_attn).parameters
"""Whether grouped heads are taken as they are: torch 2.13 does, 2.11 does not."""

KERNEL = Kernel("varlen", prepare, attend)
