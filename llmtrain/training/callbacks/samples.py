"""Text by the model at intervals: the quickest way to see that it learns to write."""

from __future__ import annotations

import logging
import re
from typing import TYPE_CHECKING, Annotated, Any

import torch
from pydantic import Field

from llmtrain.config import Config, UserError
from llmtrain.training.callbacks.base import Callback
from llmtrain.training.run_directory import disk_may_refuse, write_atomically

if TYPE_CHECKING:
    from llmtrain.tokenizer import Tokenizer
    from llmtrain.training.callbacks.base import Run

logger = logging.getLogger(__name__)

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class SampleConfig(Config):
    """When the model continues which prompts, and how."""

    every: Annotated[int, Field(ge=0)]
    prompts: list[str]
    max_new_tokens: Annotated[int, Field(gt=0)]
    temperature: Annotated[float, Field(ge=0)]


class SampleCallback(Callback):
    """Writes samples/step_XXXXXXXX.txt every `every` steps and after the last one, which is also logged."""

    def __init__(self, config: SampleConfig) -> None:
        self._config = config

    def on_start(self, run: Run) -> None:
        """Find prompts that cannot be continued before the first step, not after the last."""
        for prompt in self._config.prompts:
            prompt_ids(run.tokenizer, prompt, run.config.data.boundary)

    def is_due(self, run: Run, step: int) -> bool:
        every = self._config.every
        last = run.finished or step >= run.config.max_steps
        return bool(self._config.prompts) and (last or (every > 0 and step % every == 0))

    def after_step(self, run: Run, line: dict[str, Any]) -> None:
        step = run.step
        text = self._sample(run, step)
        if run.world.is_main:
            with disk_may_refuse():
                write_atomically(run.directory.samples_of(step), text)
            if run.finished:
                logger.info("samples after step %d:\n%s", step, printable(text.rstrip()))

    def _sample(self, run: Run, step: int) -> str:
        """Each prompt with its continuation. Every rank draws alike, so ZeRO-3's calls stay in step."""
        from llmtrain.model.generation import generate

        parts = []
        for number, prompt in enumerate(self._config.prompts):
            new = generate(
                run.engine.logits,
                prompt_ids(run.tokenizer, prompt, run.config.data.boundary),
                max_new_tokens=self._config.max_new_tokens,
                seq_len=run.config.seq_len,
                temperature=self._config.temperature,
                generator=_generator(run.config.seed, step, number),
                eos_id=run.tokenizer.eos_id,
            )
            parts.append(f"--- prompt {number + 1}: {prompt!r}\n{prompt}{run.tokenizer.decode(new)}\n")
        return "\n".join(parts)


def printable(text: str) -> str:
    """Text that is safe on a terminal: a young model also writes escape sequences. Newlines and tabs stay."""
    return CONTROL.sub("\N{REPLACEMENT CHARACTER}", text)


def prompt_ids(tokenizer: Tokenizer, prompt: str, boundary: str) -> list[int]:
    """The ids of a document that begins with `prompt`, as `data.boundary` lays documents out.

    An empty prompt is the beginning of a new document; without a control id for it that is a UserError.
    """
    begins = tokenizer.bos_id if boundary.startswith("bos") else None
    ids = [] if begins is None else [begins]
    if prompt:
        ids += tokenizer.encode_batch([prompt])[0].tolist()
    if not ids and boundary == "eos" and tokenizer.eos_id is not None:
        ids = [tokenizer.eos_id]  # what stands before a document in a stream that only marks ends
    if not ids:
        raise UserError(
            f"callbacks.sample.prompts: {prompt!r} has no tokens, and data.boundary={boundary} gives no id "
            "that begins a document; write at least one character"
        )
    return ids


def _generator(seed: int, step: int, number: int) -> torch.Generator:
    """The same draws for a step and prompt of a run, however often it is resumed."""
    return torch.Generator().manual_seed(((seed * 1_000_003 + step) * 1_000_003 + number) % 2**63)
