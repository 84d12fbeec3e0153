"""Write a checkpoint as a Hugging Face directory: llmtrain export runs/quickstart exported/."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from llmtrain.config.door import Parser, plain_door, step_or_best


def _told(note: dict[str, Any]) -> str:
    if note["max_logit_difference"] is None:
        return f"not compared with transformers: {note['not_compared']}"
    reason = f" ({note['rounding_there']})" if note["rounding_there"] else ""
    return f"largest logit difference to transformers {note['max_logit_difference']:.2g}{reason}"


def _size(text: str) -> float:
    if not float(text) > 0:
        raise argparse.ArgumentTypeError("must be above 0")
    return float(text)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="llmtrain export", description=__doc__)
    parser.add_argument("run", type=Path, help="a run directory")
    parser.add_argument("output", type=Path, help="a new directory for the Hugging Face files")
    parser.add_argument(
        "--step", type=step_or_best, help="the checkpoint of this step, or `best` (default: the newest)"
    )
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights (default: fp32)"
    )
    parser.add_argument(
        "--max-shard-gb", type=_size, default=5.0, help="size of a file, and memory needed (default: 5)"
    )
    a = parser.parse_args(argv)

    def run() -> None:
        from llmtrain.training.exporting import export

        note = export(a.run, a.output, a.step, a.dtype, a.max_shard_gb)
        what = f"{note['family']}, {note['dtype']}; {_told(note)}"
        sys.stdout.write(f"step {note['step']} of {a.run} -> {a.output}: {what}\n")

    return plain_door(run)


if __name__ == "__main__":
    raise SystemExit(main())
