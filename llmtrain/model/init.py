"""Initial values, in one table, keyed by (seed, parameter name).

    parameter                                       initial value
    ---------------------------------------------   ------------------------------------------
    embedding.weight, head.weight                   N(0, 0.02), rows of vocabulary padding 0
    position.embedding.weight (learned)             N(0, 0.02)
    blocks.*.attention.qkv.weight                   N(0, 0.02)
    blocks.*.feed_forward.{gate_up,up}.weight       N(0, 0.02)
    blocks.*.attention.out.weight                   N(0, 0.02 / sqrt(2 n_layers))
    blocks.*.feed_forward.down.weight               N(0, 0.02 / sqrt(2 n_layers))
    *norm.weight                                    1
    *.bias                                          0

The standard deviations are GPT-2's (Radford et al. 2019, section 2.3): the 2 n_layers projections that add
to the residual stream are scaled down so that its variance does not grow with depth. Rows of padding get
no gradient, so they stay 0.

Each parameter has a random generator of its own, on the CPU, in fp32, seeded by its name: the values do not
depend on the order of construction, the number of ranks, the ZeRO stage, the device or the weights' dtype.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

STD = 0.02
RESIDUAL = ("attention.out.weight", "feed_forward.down.weight")
VOCABULARY = ("embedding.weight", "head.weight")

Gather = Callable[[nn.Parameter], AbstractContextManager[Any]]


class Parameters(Protocol):
    """What the table needs to know of a decoder."""

    n_layers: int
    vocab_size: int

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter), each once."""


@torch.no_grad()
def initialize_parameters(decoder: Parameters, seed: int, gather: Gather = nullcontext) -> None:
    """Draws every parameter of the decoder.

    `gather(parameter)` is entered around each write and makes the whole parameter visible in it, where
    ranks hold only a part (ZeRO-3: every rank then writes the same values).
    """
    for name, parameter in decoder.named_parameters():
        with gather(parameter):
            value = initial_value(name, parameter.shape, seed, decoder.n_layers)
            if name in VOCABULARY:
                value[decoder.vocab_size :] = 0
            parameter.copy_(value)


def initial_value(name: str, shape: torch.Size, seed: int, n_layers: int) -> Tensor:
    """fp32 values on the CPU, a pure function of its arguments: the table above."""
    value = torch.empty(shape, dtype=torch.float32, device="cpu")
    if name.endswith("norm.weight"):
        return value.fill_(1)
    if name.endswith(".bias"):
        return value.fill_(0)
    std = STD / math.sqrt(2 * n_layers) if name.endswith(RESIDUAL) else STD
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))
    return value.normal_(0, std, generator=generator)
