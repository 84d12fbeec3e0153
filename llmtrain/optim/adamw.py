"""AdamW."""

from __future__ import annotations

from typing import Any, Literal

import torch

from llmtrain.optim.base import Beta, OptimizerConfig, Positive


class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019), torch's fused implementation."""

    kind: Literal["adamw"]
    betas: tuple[Beta, Beta]
    eps: Positive

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)
