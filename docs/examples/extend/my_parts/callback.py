"""A callback: how sure the model is of what follows a prompt."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import PositiveInt

from llmtrain.training.callbacks import Callback, CallbackConfig, Run


class EntropyConfig(CallbackConfig):
    """`callbacks=entropy`."""

    every: PositiveInt
    prompt: str

    def build(self) -> Callback:
        """On every rank."""
        return Entropy(self.every, self.prompt)


class Entropy(Callback):
    """Puts `entropy` into the line of every `every`-th step, in nats."""

    def __init__(self, every: int, prompt: str) -> None:
        self._every, self._prompt = every, prompt

    def is_due(self, run: Run, step: int) -> bool:
        """Every rank answers alike."""
        return step % self._every == 0

    def after_step(self, run: Run, line: dict[str, Any]) -> None:
        """`logits` is collective under ZeRO-3: every rank calls it equally often."""
        ids = torch.from_numpy(run.tokenizer.encode_batch([self._prompt])[0].astype("int64"))
        logits = run.engine.logits(ids[None].to(run.engine.device))[0, -1].float()
        line["entropy"] = torch.distributions.Categorical(logits=logits).entropy().item()
