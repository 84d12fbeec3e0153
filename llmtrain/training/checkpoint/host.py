"""A copy of the state in host memory, so that a step may change it while the copy is written."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class HostCopy:
    """Host memory for one state, kept from save to save; page-locked where a GPU is copied from."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def of(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors' values in this memory, which the next call overwrites."""
        self._buffers = {name: self._buffer(name, tensor) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            self._buffers[name].copy_(tensor.detach(), non_blocking=True)
        if any(tensor.is_cuda for tensor in tensors.values()):
            torch.cuda.synchronize()
        return self._buffers

    def _buffer(self, name: str, tensor: Tensor) -> Tensor:
        there = self._buffers.get(name)
        if there is not None and there.shape == tensor.shape and there.dtype == tensor.dtype:
            return there
        return torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
