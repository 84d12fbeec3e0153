"""Normalisation before each part of a block and before the head."""

from __future__ import annotations

from typing import Literal

from torch import nn

NormKind = Literal["rmsnorm", "layernorm"]


def build_norm(kind: NormKind, d_model: int, eps: float) -> nn.Module:
    """RMSNorm (Zhang and Sennrich 2019; a weight) or LayerNorm (Ba et al. 2016; a weight and a bias).

    torch's own modules: both reduce in fp32 inside whatever the dtype of their input, which is also the
    dtype of their output.
    """
    if kind == "rmsnorm":
        return nn.RMSNorm(d_model, eps=eps)
    return nn.LayerNorm(d_model, eps=eps)
