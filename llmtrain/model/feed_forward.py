"""The feed-forward half of a block, d_model -> d_ff -> d_model: gated (two matrices up) or plain (one)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from llmtrain.model.layers import Linear

FeedForwardKind = Literal["swiglu", "geglu", "gelu", "gelu_tanh", "relu_squared"]

Activation = Callable[[Tensor], Tensor]


def relu_squared(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021)."""
    return F.relu(x).square()


GATED: dict[str, Activation] = {"swiglu": F.silu, "geglu": F.gelu}
PLAIN: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu_squared": relu_squared,
}
"""gelu is exact (Hendrycks and Gimpel 2016), gelu_tanh the approximation of GPT-2 and BLOOM."""


class Gated(nn.Module):
    """down(activation(gate(x)) * up(x)) (Shazeer 2020); gate and up are one matrix [2 * d_ff, d_model]."""

    def __init__(self, activation: Activation, d_model: int, d_ff: int, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.gate_up = Linear(d_model, 2 * d_ff, bias)
        self.down = Linear(d_ff, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d_model] -> the same."""
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class Plain(nn.Module):
    """down(activation(up(x)))."""

    def __init__(self, activation: Activation, d_model: int, d_ff: int, bias: bool) -> None:
        super().__init__()
        self.activation = activation
        self.up = Linear(d_model, d_ff, bias)
        self.down = Linear(d_ff, d_model, bias)

    def forward(self, x: Tensor) -> Tensor:
        """[B, T, d_model] -> the same."""
        return self.down(self.activation(self.up(x)))


def build_feed_forward(kind: FeedForwardKind, d_model: int, d_ff: int, bias: bool = False) -> nn.Module:
    """The feed-forward part that `kind` names."""
    if kind in GATED:
        return Gated(GATED[kind], d_model, d_ff, bias)
    return Plain(PLAIN[kind], d_model, d_ff, bias)
