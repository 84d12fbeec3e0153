"""An attention kernel: the same function as every other, written as two sums."""

from __future__ import annotations

import torch
from torch import Tensor

from llmtrain.config import UserError
from llmtrain.model.documents import Documents
from llmtrain.model.kernels import Kernel, KernelConfig, Shape, Use


def prepare(documents: Documents, slopes: Tensor | None, dtype: torch.dtype) -> Tensor:
    """What a token may see, bool [B or 1, 1, T, T]; once a forward pass."""
    return documents.allowed


def attend(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor) -> Tensor:
    """q [B, T, H, D], k and v [B, T, K, D] -> [B, T, H, D]; in every block."""
    groups = q.unflatten(2, (k.shape[2], -1))  # [B, T, K, H / K, D]
    scores = torch.einsum("btkgd,bskd->bkgts", groups, k).float() * q.shape[-1] ** -0.5
    weights = scores.masked_fill(~allowed[:, :, None], float("-inf")).softmax(dim=-1).to(v.dtype)
    return torch.einsum("bkgts,bskd->btkgd", weights, v).flatten(2, 3)


class EinsumConfig(KernelConfig):
    """`model/attention=einsum`."""

    def kernel(self, shape: Shape, use: Use | None = None) -> Kernel:
        """It works everywhere, but has no ALiBi."""
        if shape.slopes:
            raise UserError("einsum has no ALiBi: take another model.position")
        return Kernel("einsum", prepare, attend)
