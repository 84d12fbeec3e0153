"""The command line of `llmtrain bench`; nothing is imported to read it."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path

Run = Callable[[argparse.Namespace], None]

PARTS = ("loaders", "live", "prepare", "scale")
BACKENDS = ("eager", "sdpa", "flex", "flash", "flash4", "varlen")
PEERS = ("torch", "llmtrain", "huggingface", "litgpt", "nanogpt")


def parser(description: str | None, runs: Mapping[str, Run]) -> argparse.ArgumentParser:
    """A parser with a command for each of `runs`, described by its docstring; `run` is what it chose."""
    top = argparse.ArgumentParser(prog="llmtrain bench", description=description)
    commands = top.add_subparsers(dest="benchmark", required=True)
    for name, (words, add) in COMMANDS.items():
        one = commands.add_parser(name, help=words, description=runs[name].__doc__)
        add(one)
        one.add_argument("--output", type=Path, help="a JSON file with every number that was measured")
        one.set_defaults(run=runs[name])
    return top


def _data(one: argparse.ArgumentParser) -> None:
    one.add_argument("--seconds", type=float, default=3.0, help="of each loader's turn (default: 3)")
    one.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of it (default: all)")
    words = "beside ours, those with a word in their names"
    one.add_argument("--loaders", nargs="+", metavar="WORD", help=words)
    one.add_argument("--smaller", type=int, default=1, help="read so many times less (default: 1)")
    _rounds(one, 3)
    _directory(one)


def _step(one: argparse.ArgumentParser) -> None:
    one.add_argument("--turns", type=int, default=30, help="of ten steps; medians are reported (default: 30)")
    _stages(one)
    _directory(one)


def _kernels(one: argparse.ArgumentParser) -> None:
    for name, words in {
        "rows": "sequences of the batch",
        "length": "positions of each",
        "heads": "query heads",
        "kv-heads": "key/value heads",
        "head-dim": "width of a head",
        "documents": "documents of a row, where there are several",
    }.items():
        one.add_argument(f"--{name}", type=_count, metavar="N", help=words)
    one.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help="of q, k and v")
    one.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="(default: all)")
    one.add_argument("--seconds", type=float, default=0.2, help="of each measurement (default: 0.2)")
    _rounds(one, 4)


def _model(one: argparse.ArgumentParser) -> None:
    one.add_argument("--model", metavar="PRESET", help="of conf/model (default: 124m, without a GPU tiny)")
    for name, words in {
        "vocab-size": "rows of the embedding",
        "seq-len": "tokens of a row",
        "micro-batch-size": "rows at once",
        "global-batch-size": "rows a step (default: as many as at once)",
        "steps": "steps that are timed, after ten that are not",
    }.items():
        one.add_argument(f"--{name}", type=_count, metavar="N", help=words)
    _stages(one)
    one.add_argument("--candidates", nargs="+", choices=PEERS, default=PEERS, help="(default: all)")
    one.add_argument(
        "--nanogpt", type=Path, metavar="FILE", help="nanoGPT's model.py; without, it is left out"
    )
    _rounds(one, 2)
    _directory(one)


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "data": ("the data engine beside other loaders", _data),
    "step": ("the trainer beside DeepSpeed alone", _step),
    "kernels": ("attention backends beside each other", _kernels),
    "model": ("the trainer beside other ways to train the same model", _model),
}


def _rounds(one: argparse.ArgumentParser, default: int) -> None:
    words = f"turns of each; medians are reported (default: {default})"
    one.add_argument("--rounds", type=_count, default=default, metavar="N", help=words)


def _stages(one: argparse.ArgumentParser) -> None:
    one.add_argument("--stages", nargs="+", type=int, choices=range(4), default=range(4), help="of ZeRO")


def _directory(one: argparse.ArgumentParser) -> None:
    one.add_argument("--directory", type=Path, help="where its files are made and removed (default: TMPDIR)")


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value
