"""Normalisation before each part of a block and before the head."""

from __future__ import annotations

from typing import Literal

from torch import nn

NormKind = Literal["rmsnorm", "layernorm", "layernorm_no_bias"]


def build_norm(kind: NormKind | Literal["none"], width: int, eps: float) -> nn.Module:
    """RMSNorm (Zhang and Sennrich 2019; a weight) or LayerNorm (Ba et al. 2016; a weight, and a bias or not);
    none is the identity.

    torch's own modules: they reduce in fp32 inside whatever the dtype of their input, which is also the
    dtype of their output.
    """
    if kind == "none":
        return nn.Identity()
    if kind == "rmsnorm":
        return nn.RMSNorm(width, eps=eps)
    return nn.LayerNorm(width, eps=eps, bias=kind == "layernorm")
