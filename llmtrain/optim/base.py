"""What all optimizers share: the roles of parameters, one group a role, and a learning rate for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import Field

from llmtrain.config import Config

Role = Literal["embedding", "head", "matrices", "vectors"]
"""Tables that ids look up; a head of its own; matrices of the blocks; gains and biases."""

TABLES: dict[str, Role] = {
    "embedding.weight": "embedding",
    "position.embedding.weight": "embedding",
    "head.weight": "head",
}

Positive = Annotated[float, Field(gt=0)]
Beta = Annotated[float, Field(ge=0, lt=1)]


class LrScales(Config):
    """Factors of the learning rate, by role."""

    embedding: Positive
    head: Positive
    matrices: Positive
    vectors: Positive


class OptimizerConfig(Config):
    """Base of every optimizer: what the trainer itself needs to know of it.

    The learning rate of a parameter is lr x the schedule's factor x the scale of its role.
    """

    lr: Positive
    lr_scales: LrScales
    weight_decay: Annotated[float, Field(ge=0)]
    gradient_clipping: Annotated[float, Field(ge=0)]

    fp32_weights: ClassVar[bool] = False
    """Whether it is right over fp32 weights only: bf16 is then autocast."""

    def build(self, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        """An optimizer over `groups` as `parameter_groups` makes them."""
        raise NotImplementedError

    def settings(self, role: Role) -> dict[str, Any]:
        """Of a role's group: everything decays but gains and biases."""
        return {"weight_decay": 0.0 if role == "vectors" else self.weight_decay}

    def states(self, role: Role) -> int:
        """fp32 values that are kept of a parameter from step to step: AdamW's unless it says otherwise."""
        return 2

    def parameter_groups(
        self, parameters: Iterable[tuple[str, torch.nn.Parameter]], dimensions: Callable[[torch.Tensor], int]
    ) -> list[dict[str, Any]]:
        """A group for each role that has parameters; `dimensions` tells how many one has, even in parts.

        Roles never share a group, so that every setting may change when a run goes on.
        """
        found: dict[Role, list[torch.nn.Parameter]] = {role: [] for role in get_args(Role)}
        for name, parameter in parameters:
            found[role_of(name, dimensions(parameter))].append(parameter)
        return [
            {"params": members, "role": role, "lr_scale": scale, "lr": self.lr * scale, **self.settings(role)}
            for role, members in found.items()
            if members and (scale := getattr(self.lr_scales, role))
        ]


def role_of(name: str, dimensions: int) -> Role:
    """The role of a parameter by its name in the decoder."""
    return "vectors" if dimensions < 2 else TABLES.get(name, "matrices")


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Give each of the optimizer's groups its share of `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
