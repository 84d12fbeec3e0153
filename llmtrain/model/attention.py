"""Causal self-attention: projections and heads. How positions act and how scores are computed is given.

Letters: B rows, T positions, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from llmtrain.model.documents import Documents
from llmtrain.model.kernels import Kernel
from llmtrain.model.layers import Linear

Rotate = Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
Slopes = Callable[[torch.device], Tensor | None]


class Attention(nn.Module):
    """MHA (K = H), GQA or MQA (K = 1), with two hooks of the position part and a kernel.

    `qkv.weight` holds the rows of q (H * D), then of k (K * D), then of v (K * D).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        rotate: Rotate,
        slopes: Slopes,
        kernel: Kernel,
    ) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, head_dim
        self.rotate, self.slopes, self.kernel = rotate, slopes, kernel
        self.qkv = Linear(d_model, (n_heads + 2 * n_kv_heads) * head_dim)
        self.out = Linear(n_heads * head_dim, d_model)

    def forward(self, x: Tensor, position_ids: Tensor, documents: Documents) -> Tensor:
        """[B, T, d_model] -> the same; `position_ids` int [B or 1, T]."""
        heads = self.qkv(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, H + 2K, T, D]
        q, k, v = heads.split([self.n_heads, self.n_kv_heads, self.n_kv_heads], dim=1)
        q, k = self.rotate(q, k, position_ids)
        out = self.kernel(q, k, v, self.slopes(x.device), documents)  # [B, H, T, D]
        return self.out(out.transpose(1, 2).flatten(2))
