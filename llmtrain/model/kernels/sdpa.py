"""torch's `scaled_dot_product_attention`: exact on every device; documents and ALiBi are one mask a forward.

Without a mask torch takes its fastest kernel: cuDNN's or flash attention on CUDA.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.model.documents import Documents
from llmtrain.model.kernels.base import Kernel, repeat_heads


def prepare(documents: Documents, slopes: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What is added to the scores, [B or 1, H or 1, T, T] of `dtype`; None for the causal mask alone.

    Never bool: torch makes numbers of that anew in every layer, and each layer keeps its own until the
    backward pass.
    """
    if slopes is None and documents.one_per_row:
        return None
    return documents.bias(slopes, dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Fused attention under `mask`."""
    if mask is not None and q.is_cuda:
        # CUDA's fused kernels that take a mask take no grouped heads: torch would fall back to unfused math.
        k, v = repeat_heads(k, v, q.shape[2])
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    grouped = k.shape[1] != q.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return out.transpose(1, 2)


KERNEL = Kernel("sdpa", prepare, attend)
