"""What each source's text costs the model, summed over the steps between two ledgers."""

from __future__ import annotations

import torch

from llmtrain.training.engine.transfer import StepResult


class SourceLosses:
    """The mean training loss of each source since the last ledger."""

    def __init__(self) -> None:
        self._sums: torch.Tensor | None = None

    def add(self, result: StepResult) -> None:
        """Count a step."""
        step = torch.stack([result.source_losses, result.source_targets])
        self._sums = step if self._sums is None else self._sums + step

    def take(self, names: list[str]) -> dict[str, float]:
        """The mean of each source that had a target, in nats a token; begins anew."""
        if self._sums is None:
            return {}
        losses, targets = self._sums.tolist()
        self._sums = None
        return {n: loss / count for n, loss, count in zip(names, losses, targets, strict=True) if count}
