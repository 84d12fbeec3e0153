"""Lion: the sign of an interpolated momentum."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from llmtrain.optim.base import Beta, OptimizerConfig, Role


class LionConfig(OptimizerConfig):
    """Lion (Chen et al. 2023): one state a parameter, where AdamW has two."""

    kind: Literal["lion"]
    betas: tuple[Beta, Beta]

    def build(self, groups: list[dict[str, Any]]) -> Lion:
        return Lion(groups, lr=self.lr, betas=self.betas)

    def states(self, role: Role) -> int:
        return 1


class Lion(torch.optim.Optimizer):
    """Chen et al. 2023, "Symbolic discovery of optimization algorithms", algorithm 2.

        c = beta1 m + (1 - beta1) g
        x = x - lr (sign(c) + weight_decay x)
        m = beta2 m + (1 - beta2) g

    As torch.amp asks of fused optimizers, `step` divides gradients by `grad_scale` and changes nothing where
    `found_inf` is 1. Both are scalars on the device, or absent, and the host reads neither.
    """

    _step_supports_amp_scaling = True
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]) -> None:
        super().__init__(groups, {"lr": lr, "betas": betas, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if not weights:
                continue
            for weight in weights:
                if "exp_avg" not in self.state[weight]:
                    self.state[weight]["exp_avg"] = torch.zeros_like(weight)
            momenta = [self.state[weight]["exp_avg"] for weight in weights]
            self._update(group, weights, momenta, [weight.grad for weight in weights])

    def _update(
        self, group: dict[str, Any], weights: list[Tensor], momenta: list[Tensor], gradients: list[Tensor]
    ) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        if self.grad_scale is not None:
            gradients = list(torch._foreach_div(gradients, self.grad_scale))
        if self.found_inf is not None:
            # A momentum that moves towards itself stays, and a rate of 0 moves no weight.
            skip = self.found_inf.bool()
            gradients = [torch.where(skip, m, g) for m, g in zip(momenta, gradients, strict=True)]
            lr = lr * (1 - self.found_inf)
        updates = torch._foreach_lerp(momenta, gradients, 1 - beta1)
        torch._foreach_sign_(updates)
        torch._foreach_mul_(updates, lr)
        torch._foreach_mul_(weights, 1 - lr * group["weight_decay"])
        torch._foreach_sub_(weights, updates)
        torch._foreach_lerp_(momenta, gradients, 1 - beta2)
