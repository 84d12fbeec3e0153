"""A position part: sines and cosines added to the embedded tokens (Vaswani et al. 2017, section 3.5)."""

from __future__ import annotations

import torch
from pydantic import PositiveFloat
from torch import Tensor

from llmtrain.model.position import Position, PositionConfig


class Sinusoidal(Position):
    """`embed` of three hooks; the others stay identities."""

    def __init__(self, d_model: int, base: float) -> None:
        super().__init__()
        self.d_model, self.base = d_model, base

    def embed(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """[B, T, d_model] -> the same."""
        pairs = torch.arange(0, self.d_model, 2, device=x.device)
        angles = position_ids[..., None] / self.base ** (pairs / self.d_model)
        return x + torch.cat([angles.sin(), angles.cos()], dim=-1).to(x.dtype)


class SinusoidalConfig(PositionConfig):
    """`model/position=sinusoidal`."""

    base: PositiveFloat

    def build(self, *, d_model: int, n_heads: int, head_dim: int, seq_len: int) -> Position:
        """The part, which has no parameters."""
        return Sinusoidal(d_model, self.base)
