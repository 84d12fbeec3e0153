"""What goes between host and device while the device computes: rows in, results out."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llmtrain.data.batch import Batch


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step was; everything is on the host.

    source_losses, source_targets: fp64 [sources], sums of target losses and trained targets on all ranks.
    row_losses, row_targets: fp64 [rows], the same of each of this rank's rows.
    grad_norm: global L2 norm before clipping; not finite where a gradient or a loss was not.
    applied: False where the step was left out: because of that, or above the limits that it was given.
    stop: whether any rank asked to stop.
    """

    source_losses: Tensor
    source_targets: Tensor
    row_losses: Tensor
    row_targets: Tensor
    grad_norm: float
    applied: bool
    stop: bool

    @property
    def loss(self) -> float:
        """The mean loss of a trained target; NaN where there is none."""
        targets = sum(self.source_targets.tolist())
        return sum(self.source_losses.tolist()) / targets if targets else math.nan


class Moment:
    """When the device has done what it was given so far."""

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self._event is not None:
            self._event.record()
        self._time = time.perf_counter()

    def wait(self) -> None:
        """Return when it has come."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Moment) -> float:
        """Seconds on the device's clock between two moments that have come."""
        if self._event is None or earlier._event is None:
            return self._time - earlier._time
        return earlier._event.elapsed_time(self._event) / 1000


class PendingStep:
    """A step that the device may still be computing: nothing waits for it before `result` is called.

    sums [2, sources] and rows [2, rows] of losses and targets; grad_norm, applied and stop are scalars on
    the same device.
    """

    def __init__(self, sums: Tensor, rows: Tensor, grad_norm: Tensor, applied: Tensor, stop: Tensor) -> None:
        scalars = torch.stack([grad_norm, applied, stop]).to(sums.dtype)
        values = torch.cat([sums.flatten(), rows.flatten(), scalars])
        self._sizes = [sums.numel(), rows.numel(), len(scalars)]
        if values.is_cuda:
            self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
            self._values.copy_(values, non_blocking=True)
        else:
            self._values = values
        self.done = Moment(values.device)

    def result(self) -> StepResult:
        """What the step was; waits until the device has done it."""
        self.done.wait()
        sums, rows, scalars = self._values.split(self._sizes)
        grad_norm, applied, stop = scalars.tolist()
        (losses, targets), (row_losses, row_targets) = sums.view(2, -1), rows.view(2, -1)
        applied, stop = bool(applied), bool(stop)
        return StepResult(losses, targets, row_losses, row_targets, grad_norm, applied, stop)


class Upload:
    """Copies micro-batches to the device beside what it computes.

    The host is a step ahead of a GPU, so on a stream of their own the rows of a step arrive while the one
    before is computed. They come out of pinned memory, from where a GPU copies by itself.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, parts: Sequence[Batch]) -> list[Batch]:
        """The parts on the device, for use on its current stream."""
        if self._stream is None:
            return [part.to(self._device) for part in parts]
        with torch.cuda.stream(self._stream):
            arrived = [part.pin_memory().to(self._device) for part in parts]
        compute = torch.cuda.current_stream(self._device)
        compute.wait_stream(self._stream)
        for part in arrived:  # their memory is the copying stream's, which must not fill it while it is read
            part.record_stream(compute)
        return arrived
