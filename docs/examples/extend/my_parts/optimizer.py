"""An optimizer: stochastic gradient descent with momentum."""

from __future__ import annotations

from typing import Any

import torch

from llmtrain.optim.base import Beta, OptimizerConfig, Role


class SgdConfig(OptimizerConfig):
    """`optimizer=sgd`."""

    momentum: Beta

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """Over one group a role, each with its rate and decay."""
        return torch.optim.SGD(groups, lr=self.lr, momentum=self.momentum, fused=True)

    def states(self, role: Role) -> int:
        """The momentum; memory is planned with it."""
        return 1
