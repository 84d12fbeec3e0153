"""AdamW and its parameter groups."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from llmtrain.config import Config

Beta = Annotated[float, Field(ge=0, lt=1)]


class OptimizerConfig(Config):
    """Base of every optimizer: what the trainer itself needs to know of it."""

    lr: Annotated[float, Field(gt=0)]
    gradient_clipping: Annotated[float, Field(ge=0)]

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """An optimizer over `groups` as `parameter_groups` makes them."""
        raise NotImplementedError

    def parameter_groups(
        self, parameters: Iterable[tuple[str, torch.nn.Parameter]], dimensions: Callable[[torch.Tensor], int]
    ) -> list[dict[str, Any]]:
        """The parameters in groups; `dimensions` tells how many a parameter has, even a partitioned one."""
        raise NotImplementedError


class AdamWConfig(OptimizerConfig):
    """AdamW (Loshchilov and Hutter 2019), torch's fused implementation."""

    kind: Literal["adamw"]
    betas: tuple[Beta, Beta]
    eps: Annotated[float, Field(gt=0)]
    weight_decay: Annotated[float, Field(ge=0)]

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.AdamW:
        return torch.optim.AdamW(groups, lr=self.lr, betas=self.betas, eps=self.eps, fused=True)

    def parameter_groups(
        self, parameters: Iterable[tuple[str, torch.nn.Parameter]], dimensions: Callable[[torch.Tensor], int]
    ) -> list[dict[str, Any]]:
        """Matrices decay; gains and biases do not. A group without parameters is left out."""
        decayed: list[torch.nn.Parameter] = []
        others: list[torch.nn.Parameter] = []
        for _, parameter in parameters:
            (decayed if dimensions(parameter) >= 2 else others).append(parameter)
        groups = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]
