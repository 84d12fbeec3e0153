"""The reference: every step of attention is a line."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.model.documents import Documents
from llmtrain.model.kernels.base import Kernel, repeat_heads
from llmtrain.model.layers import full_precision


def prepare(documents: Documents, slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What is added to the scores, fp32 or better [B or 1, H or 1, T, T]: ALiBi's bias, -inf where unseen."""
    bias = torch.zeros((), device=documents.device, dtype=torch.promote_types(dtype, torch.float32))
    if slopes is not None:
        bias = -slopes[:, None, None].to(bias.dtype) * documents.distance
    return torch.where(documents.allowed, bias, float("-inf"))


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D) + bias) v; the softmax runs in fp32 or better."""
    k, v = repeat_heads(k, v, q.shape[2])
    q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
    scores = full_precision(q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5 + bias
    return (scores.softmax(dim=-1).to(v.dtype) @ v).transpose(1, 2)


KERNEL = Kernel("eager", prepare, attend)
