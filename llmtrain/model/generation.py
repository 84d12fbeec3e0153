"""Continue a prompt, one token a forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


@torch.no_grad()
def generate(
    forward: Callable[[Tensor], Tensor],
    prompt_ids: Sequence[int],
    max_new_tokens: int,
    seq_len: int,
    temperature: float,
    generator: torch.Generator,
    eos_id: int | None,
) -> list[int]:
    """The ids that follow `prompt_ids` (at least one), up to `eos_id` or `max_new_tokens`; eos is left out.

    `forward` takes ids int64 [1, T] on the CPU, T <= seq_len, and gives logits [1, T, V] on any device. It is
    called exactly `max_new_tokens` times, whatever comes out: under ZeRO-3 every call is a collective, and
    every rank, its generator (on the CPU) seeded alike, makes the same calls. Temperature 0 takes the
    likeliest token. The context is the last `seq_len` ids.
    """
    if not prompt_ids:
        raise ValueError("a prompt needs at least one id, for example that of a document's beginning")
    ids = list(prompt_ids)
    for _ in range(max_new_tokens):
        logits = forward(torch.tensor([ids[-seq_len:]]))[0, -1]
        ids.append(sample(logits.float().cpu(), temperature, generator))
    new = ids[len(prompt_ids) :]
    return new[: new.index(eos_id)] if eos_id in new else new


def sample(logits: Tensor, temperature: float, generator: torch.Generator) -> int:
    """An id drawn from softmax(logits [V] / temperature); the likeliest at temperature 0."""
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(dim=0), 1, generator=generator))
