"""From the last hidden states to the loss: the head and its cross entropy in one piece."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from llmtrain.model.layers import full_precision

IGNORED = -100
"""The label of a position that is not trained."""


class Losses(NamedTuple):
    """Losses of a batch, fp32 or better."""

    total: Tensor
    """Scalar with a gradient: what is minimised, summed over all targets."""
    rows: Tensor
    """[B] without gradient: each row's NLLs in nats, summed over its targets."""


def head_losses(hidden: Tensor, weight: Tensor, labels: Tensor, vocab_size: int) -> Losses:
    """Losses of hidden [B, T, d] under the head `weight` [>= V, d]; int labels [B, T], IGNORED where none."""
    logits = full_precision(F.linear(hidden, weight)[..., :vocab_size])
    losses = F.cross_entropy(
        logits.flatten(0, 1), labels.flatten().long(), ignore_index=IGNORED, reduction="none"
    )
    rows = losses.view(labels.shape).sum(dim=1)
    return Losses(rows.sum(), rows.detach())
