"""A step above a limit is left out before the optimizer sees it, and no host waits for a device to know."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Limits(NamedTuple):
    """The highest mean loss, in nats a target, and gradient norm of a step that is applied."""

    loss: float = math.inf
    grad_norm: float = math.inf


class Guard:
    """Holds a step back whose loss or gradient norm, before clipping, is above the limits it was given.

    DeepSpeed leaves a step out in stages 1 to 3 where the norm is not finite: after the gradients were
    reduced and before weights and states change. Of a step to be held back it is told such a norm.
    """

    def __init__(self, optimizer: Any, stage: int) -> None:
        self._optimizer = optimizer
        self._limits: Limits | None = None
        self._loss = torch.tensor(0.0)
        self._norm = torch.tensor(math.nan)
        self._momenta: list[tuple[Tensor, Tensor]] = []
        if stage == 3:
            _wrap(optimizer, "_apply_muon_to_accumulated_grads", self._after_keeping)
            _wrap(optimizer, "_get_norm_groups", lambda measure: self._told(measure()))
        elif stage and hasattr(optimizer, "scaled_global_norm"):
            _wrap(optimizer, "_apply_muon_updates_cpu_offload", self._after_keeping)
            _wrap(optimizer, "scaled_global_norm", lambda measure: self._told([measure()])[0])
        elif stage:  # DeepSpeed's BF16_Optimizer: stage 1 with bf16 weights
            _wrap(optimizer, "get_grads_for_norm", self._spoilt)

    def watch(self, limits: Limits | None, sums: Tensor) -> None:
        """Judge the next step, of these sums [2, sources] of losses and targets; None: every step passes."""
        self._limits = limits
        if limits is not None:
            losses, targets = sums.sum(dim=1)
            self._loss = losses / targets

    def passes(self, norm: Tensor) -> Tensor:
        """Whether a step with this norm may be applied, on the norm's device."""
        passes = torch.isfinite(norm)
        if self._limits is not None:
            above = (self._loss.to(norm.device) > self._limits.loss) | (norm > self._limits.grad_norm)
            passes &= ~above
        return passes

    def true_norm(self, reported: Tensor | float, applied: bool) -> Tensor | float:
        """The norm that was measured, where DeepSpeed reports the one it was told."""
        return reported if applied or self._limits is None else self._norm

    def _after_keeping(self, apply_muon: Callable[[], None]) -> None:
        """Keep the momenta that DeepSpeed moves on here, before it knows the norm."""
        if self._limits is not None:
            kept = [state.get("momentum_buffer") for state in self._optimizer.optimizer.state.values()]
            self._momenta = [(buffer, buffer.clone()) for buffer in kept if buffer is not None]
        apply_muon()

    def _told(self, norms: list[Any]) -> list[Any]:
        """The norms of groups of parameters; none is finite of a step that is held back."""
        if self._limits is None:
            return norms
        from deepspeed.runtime.utils import combine_grad_norm_groups

        self._norm = combine_grad_norm_groups(norms)
        passes = self.passes(self._norm)
        for buffer, before in self._momenta:
            buffer.copy_(torch.where(passes.to(buffer.device), buffer, before))
        self._momenta = []
        return [torch.where(passes, norm, math.inf) for norm in norms]

    def _spoilt(self, collect: Callable[..., Any], for_clipping: bool = False) -> Any:
        """The gradients whose norm is taken, and of a step that is held back one that is not finite."""
        found = collect(for_clipping)
        if self._limits is None or for_clipping:
            return found
        from deepspeed.runtime.utils import get_global_norm_of_tensors

        gradients, experts = found
        (told,) = self._told([get_global_norm_of_tensors(gradients)])
        return [*gradients, torch.where(torch.isfinite(told), 0.0, math.inf).reshape(1)], experts


def _wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Have calls of a method go through `wrapper(method, ...)`."""
    setattr(owner, name, partial(wrapper, getattr(owner, name)))
