"""Continue a prompt with a trained model: llmtrain generate runs/quickstart --prompt "def main("."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.config.door import Parser, plain_door, step_or_best

if TYPE_CHECKING:
    from llmtrain.training.finished import Step


def generate(run: Path, prompt: str, step: Step, tokens: int, temperature: float, seed: int) -> str:
    """The prompt and its continuation by the run's newest checkpoint, or by the one of `step`."""
    import torch

    from llmtrain.model.generation import generate as continue_ids
    from llmtrain.training.callbacks.samples import prompt_ids
    from llmtrain.training.finished import LocalModel, open_finished

    finished = open_finished(run, step)
    new = continue_ids(
        LocalModel(finished.model).logits,
        prompt_ids(finished.tokenizer, prompt, finished.config.data.boundary),
        max_new_tokens=tokens,
        seq_len=finished.config.seq_len,
        temperature=temperature,
        generator=torch.Generator().manual_seed(seed),
        eos_id=finished.tokenizer.eos_id,
    )
    return prompt + finished.tokenizer.decode(new)


def _count(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError("must be 1 or more")
    return int(text)


def _temperature(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise argparse.ArgumentTypeError("must be 0 or more")
    return float(text)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="llmtrain generate", description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("--prompt", default="", help="text to continue (default: a new document)")
    parser.add_argument(
        "--step", type=step_or_best, help="the checkpoint of this step, or `best` (default: the newest)"
    )
    parser.add_argument("--tokens", type=_count, default=100, help="most tokens to add (default: 100)")
    parser.add_argument(
        "--temperature", type=_temperature, default=0.8, help="0 takes the likeliest (default: 0.8)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: 0)")
    a = parser.parse_args(argv)

    def run() -> None:
        from llmtrain.training.callbacks.samples import printable

        text = generate(a.run, a.prompt, a.step, a.tokens, a.temperature, a.seed)
        sys.stdout.write((printable(text) if sys.stdout.isatty() else text) + "\n")

    return plain_door(run)


if __name__ == "__main__":
    raise SystemExit(main())
