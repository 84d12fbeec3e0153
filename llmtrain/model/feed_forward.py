"""The feed-forward half of a block: SwiGLU or GELU, d_model -> d_ff -> d_model, without biases."""

from __future__ import annotations

from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.model.layers import Linear

FeedForwardKind = Literal["swiglu", "gelu"]


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020, eq. 6); gate and up are one matrix [2 * d_ff, d_model]."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_up = Linear(d_model, 2 * d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d_model] -> the same."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class GELU(nn.Module):
    """down(gelu(up(x))), with the exact GELU (Hendrycks and Gimpel 2016)."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.up = Linear(d_model, d_ff)
        self.down = Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d_model] -> the same."""
        return self.down(F.gelu(self.up(x)))


def build_feed_forward(kind: FeedForwardKind, d_model: int, d_ff: int) -> nn.Module:
    """The feed-forward part that `kind` names."""
    return SwiGLU(d_model, d_ff) if kind == "swiglu" else GELU(d_model, d_ff)
