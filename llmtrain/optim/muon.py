"""Muon for the matrices of the blocks, AdamW for everything else."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import field_validator

from llmtrain.optim.base import Beta, OptimizerConfig, Positive, Role


class MuonConfig(OptimizerConfig):
    """Muon (Jordan et al. 2024): the momentum of a matrix is orthogonalised before it is taken as a step.

    DeepSpeed computes it, so llmtrain/training/engine/optimizers.py builds it.
    """

    kind: Literal["muon"]
    momentum: Beta
    betas: tuple[Beta, Beta]
    eps: Positive

    fp32_weights: ClassVar[bool] = True

    @field_validator("gradient_clipping")
    @classmethod
    def _clips_nothing(cls, value: float) -> float:
        if value:
            raise ValueError(
                "must be 0 with muon: DeepSpeed would clip what Muon has made of the gradients, and so "
                "shrink its steps; Muon itself takes no notice of a gradient's norm"
            )
        return value

    def settings(self, role: Role) -> dict[str, Any]:
        decay = super().settings(role)
        if role == "matrices":
            return {**decay, "use_muon": True, "momentum": self.momentum, "ns_method": "gram"}
        return {**decay, "use_muon": False, "betas": self.betas, "eps": self.eps}

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        raise NotImplementedError("the engine builds it: only it may import DeepSpeed")

    def states(self, role: Role) -> int:
        return 1 if role == "matrices" else 2
