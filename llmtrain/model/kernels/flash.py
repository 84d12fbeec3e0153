"""flash-attn 2 (Dao 2023): documents by their starts, ALiBi by its slopes, grouped heads as they are.

Its causal ALiBi adds slope * key to a score, which is -slope * (query - key) up to a number that is the same
for all keys of a query: the softmax is ours (csrc/flash_attn/src/alibi.h).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from flash_attn import flash_attn_func, flash_attn_varlen_func
from torch import Tensor

from llmtrain.model.documents import Documents
from llmtrain.model.kernels.base import Kernel


class Prepared(NamedTuple):
    """Starts int32 of the documents for queries and for keys, None where each row is one; slopes fp32 [H].

    Two tensors of one content: torch.compile breaks the graph where an autograd.Function gets one twice.
    """

    queries: Tensor | None
    keys: Tensor | None
    slopes: Tensor | None


def prepare(documents: Documents, slopes: Tensor | None, dtype: torch.dtype) -> Prepared:
    """The starts of documents and the slopes, as flash-attn takes them."""
    if documents.one_per_row:
        return Prepared(None, None, slopes)
    return Prepared(documents.starts, documents.starts.clone(), slopes)


def attend(q: Tensor, k: Tensor, v: Tensor, prepared: Prepared) -> Tensor:
    """Fused attention, bf16 or fp16. The longest document is given as T: a bound that never varies."""
    options = {"causal": True, "alibi_slopes": prepared.slopes}
    if prepared.queries is None:
        return flash_attn_func(q, k, v, **options)
    rows, length = q.shape[:2]
    q, k, v = (heads.flatten(0, 1) for heads in (q, k, v))
    out = flash_attn_varlen_func(q, k, v, prepared.queries, prepared.keys, length, length, **options)
    return out.unflatten(0, (rows, length))


KERNEL = Kernel("flash", prepare, attend)
