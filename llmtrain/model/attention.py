"""Causal self-attention: projections and heads. How positions act and how scores are computed is given.

Letters: B rows, T positions, H query heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from llmtrain.model.kernels import Kernel, Prepared
from llmtrain.model.layers import Linear
from llmtrain.model.norm import build_norm
from llmtrain.model.position import Position


class Context(NamedTuple):
    """What all blocks share in a forward pass: made once, outside of them."""

    turns: Tensor | None
    """What the position part made for `rotate`."""
    prepared: Prepared
    """What the kernel made of the documents and the slopes."""


class Attention(nn.Module):
    """MHA (K = H), GQA or MQA (K = 1).

    `qkv.weight` holds the rows of q (H * D), then of k (K * D), then of v (K * D). With `qk_norm_eps` each
    head of q and k goes through an RMSNorm before it is rotated (Henry et al. 2020, Qwen3).
    """

    def __init__(
        self,
        d_model: int,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        *,
        position: Position,
        kernel: Kernel,
        qkv_bias: bool,
        out_bias: bool,
        qk_norm_eps: float | None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim = [n_heads, n_kv_heads, n_kv_heads], head_dim
        self.rotate, self.kernel = position.rotate, kernel
        self.qkv = Linear(d_model, sum(self.heads) * head_dim, qkv_bias)
        self.q_norm = self.k_norm = None
        if qk_norm_eps is not None:
            self.q_norm = build_norm("rmsnorm", head_dim, qk_norm_eps)
            self.k_norm = build_norm("rmsnorm", head_dim, qk_norm_eps)
        self.out = Linear(n_heads * head_dim, d_model, out_bias)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, T, d_model] -> the same."""
        q, k, v = self.qkv(x).unflatten(-1, (-1, self.head_dim)).split(self.heads, dim=2)  # [B, T, H or K, D]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        q, k = self.rotate(q, k, context.turns)
        return self.out(self.kernel.attend(q, k, v, context.prepared).flatten(2))
