"""What ranks hold twice: alike on each of them, or as fp32 masters too; and exact checksums of it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from llmtrain.training.engine.state import WEIGHT

if TYPE_CHECKING:
    from llmtrain.training.engine.engine import Engine

CHUNK = 2**22
"""Elements that are widened at once: 64 MiB of the device's memory."""

INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""An element's bits, by its size in bytes."""


def replicas(engine: Engine) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of what must be the same on every rank now, in the same order on each of them.

    Stages 0 to 2: every parameter; stage 0: the optimizer's state as well. Stage 3: the parameters that are
    too small to be partitioned, once they have been gathered.
    """
    stage = engine.deepspeed.zero_optimization_stage()
    parameters: list[tuple[str, Any]] = list(engine.model.named_parameters())
    if stage == 3:
        parameters = [(name, p) for name, p in parameters if p.ds_persist and p.numel() == p.ds_numel]
    for name, parameter in parameters:
        yield name, parameter
    if stage > 0:
        return
    state = engine.deepspeed.optimizer.state
    for name, parameter in parameters:
        for key, value in state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"{name}: {key}", value


def rounded(engine: Engine) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(name, weights, the same from the fp32 masters) of what this rank answers for and holds as both.

    A step ends with the masters rounded to the weights: they are equal bit by bit. Stage 0 has only one.
    """
    stage = engine.deepspeed.zero_optimization_stage()
    parameters: dict[str, Any] = dict(engine.model.named_parameters())
    for piece in engine.look().pieces if stage > 0 else ():
        masters, parameter = piece.tensors[WEIGHT], parameters[piece.name]
        start = 0 if stage == 3 else piece.start
        flat = (parameter.ds_tensor if stage == 3 else parameter).detach().view(-1)
        weights = flat[start : start + len(masters)]
        yield piece.name, weights, masters.to(weights.device, weights.dtype)


@torch.no_grad()
def checksum(tensor: Tensor) -> Tensor:
    """An int64 scalar on the tensor's device that any change of a single element changes.

    The sum modulo 2^64 of each element's bits times an odd number that its place gives: exact, so the order
    in which a device adds has no effect. An odd factor cannot make a difference below 2^64 vanish.
    """
    bits = tensor.detach().flatten().view(INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].long()
        places = torch.arange(start, start + len(part), device=tensor.device)
        total += part.mul_(places.mul_(2).add_(1)).sum()
    return total
