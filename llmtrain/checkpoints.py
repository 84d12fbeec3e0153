"""List, verify or thin out the checkpoints of a run: llmtrain checkpoints verify runs/mine.

llmtrain checkpoints list runs/mine              what there is, by names and sizes
llmtrain checkpoints verify runs/mine            every byte is read; exit code 1 if one is damaged
llmtrain checkpoints prune runs/mine --dry-run   what would go: damaged ones, and those older than the newest
                                                 `checkpoint.keep` that are neither kept for ever nor the best
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from llmtrain.config import UserError
from llmtrain.config.door import Parser, plain_door
from llmtrain.config.table import print_table

if TYPE_CHECKING:
    from llmtrain.training.checkpoint.inspecting import Row

DAMAGED = 1


def show(title: str, rows: Sequence[Row], whole: str, as_json: bool) -> None:
    """Print rows as a table, or as a line of JSON each; `whole` is said of those without damage."""
    if as_json:
        for row in rows:
            sys.stdout.write(json.dumps(row.as_dict()) + "\n")
        return
    headings = "step", "bytes", "ranks", "ZeRO stage", "precision", "state"
    cells = [
        [f"{row.step}", f"{row.bytes:,}"]
        + ["-" if value is None else f"{value}" for value in (row.ranks, row.stage, row.precision)]
        + [row.damage or (f"{whole}, best" if row.best else whole)]
        for row in rows
    ]
    print_table(title, headings, cells)


def look(run: Path, *, content: bool, as_json: bool) -> int:
    """`list` and `verify`; the exit code."""
    from llmtrain.training.checkpoint.inspecting import inspect

    rows = list(inspect(_directory(run), content=content))
    show(f"checkpoints of {run}", rows, "verified" if content else "complete", as_json)
    return DAMAGED if content and any(row.damage for row in rows) else 0


def prune(run: Path, keep: int | None, *, dry: bool, as_json: bool) -> int:
    """`prune`, under the lock of the run; the exit code."""
    from llmtrain.training.checkpoint.inspecting import inspect, prunable
    from llmtrain.training.checkpoint.inspecting import prune as remove
    from llmtrain.training.finished import read_config
    from llmtrain.training.run_directory import RunDirectory

    directory, config = _directory(run), read_config(run).checkpoint
    lock = RunDirectory(run)
    lock.lock()
    try:
        going = prunable(list(inspect(directory, content=True)), keep or config.keep, config.keep_every)
        show("would be removed" if dry else "removed", going, "older", as_json)
        if not dry:
            remove(directory, going)
    finally:
        lock.unlock()
    return 0


def _directory(run: Path) -> Path:
    from llmtrain.training.checkpoint import checkpoints
    from llmtrain.training.run_directory import RunDirectory

    directory = RunDirectory(run).checkpoints
    if not checkpoints(directory):
        raise UserError(f"{run}: no checkpoint in it; is it the directory of a run?")
    return directory


def _at_least_two(text: str) -> int:
    if not text.isdecimal() or int(text) < 2:
        raise argparse.ArgumentTypeError(f"{text}: must be a number, 2 or more")
    return int(text)


def main(argv: list[str] | None = None) -> int:
    """The door of `llmtrain checkpoints`."""
    parser = Parser(
        prog="llmtrain checkpoints", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("list", "verify", "prune"))
    parser.add_argument("run", type=Path, help="a run directory, finished or running")
    parser.add_argument("--json", action="store_true", help="a line of JSON a checkpoint")
    parser.add_argument(
        "--keep", type=_at_least_two, help="prune: how many newest ones stay (default: checkpoint.keep)"
    )
    parser.add_argument("--dry-run", action="store_true", help="prune: only say what would go")
    a = parser.parse_args(argv)
    if a.what == "prune":
        return plain_door(lambda: prune(a.run, a.keep, dry=a.dry_run, as_json=a.json))
    return plain_door(lambda: look(a.run, content=a.what == "verify", as_json=a.json))


if __name__ == "__main__":
    raise SystemExit(main())
