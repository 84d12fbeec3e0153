"""A small decoder learns 64 rows by heart."""

from __future__ import annotations

import torch

from tests.model.small import POSITIONS, VOCAB, config


def test_64_rows_of_64_tokens_are_learnt_in_300_steps() -> None:
    shape = config(d_model=64, d_ff=128, position=POSITIONS["rope"], attention={"backend": "sdpa"})
    model = shape.build(vocab_size=VOCAB, seq_len=64, seed=0)
    ids = torch.randint(0, VOCAB, (64, 65), generator=torch.Generator().manual_seed(0))
    # The first token of a row tells it from the others: distinct, or the second could not be known.
    ids[:, 0] = torch.arange(64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1, (step + 1) / 20)
        loss = model(ids[:, :-1], ids[:, 1:]).total / (64 * 64)
        if loss.item() < 0.1:
            return
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    raise AssertionError(f"loss {loss.item():.3f} after 300 steps")
