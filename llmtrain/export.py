"""Write a checkpoint as a Hugging Face directory: llmtrain export runs/quickstart exported/."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from llmtrain.config.door import plain_door


def export(run: Path, output: Path, step: int | None) -> int:
    """Write weights, config and tokenizer for `transformers`; returns the exported step."""
    from llmtrain.config import UserError
    from llmtrain.model.huggingface import export_llama
    from llmtrain.training.finished import open_finished

    if output.exists() and not (output.is_dir() and not any(output.iterdir())):
        raise UserError(f"{output}: exists and is not empty; name a new directory")
    finished = open_finished(run, step)
    export_llama(
        output,
        finished.config.model,
        finished.model.state_dict(),
        vocab_size=finished.tokenizer.vocab_size,
        seq_len=finished.config.seq_len,
        bos_id=finished.tokenizer.bos_id,
        eos_id=finished.tokenizer.eos_id,
    )
    finished.tokenizer.save(output)
    return finished.step


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="llmtrain export", description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("output", type=Path, help="a new directory for the Hugging Face files")
    parser.add_argument("--step", type=int, help="the checkpoint of this step (default: the newest)")
    a = parser.parse_args(argv)

    def run() -> None:
        step = export(a.run, a.output, a.step)
        sys.stdout.write(f"step {step} of {a.run} -> {a.output}\n")

    return plain_door(run)


if __name__ == "__main__":
    raise SystemExit(main())
