"""The command line of `llmtrain bench`; no benchmark is imported to read it."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path

from llmtrain.config.door import Parser

Run = Callable[[argparse.Namespace], None]

PARTS = ("loaders", "live", "prepare", "scale")
BACKENDS = ("eager", "sdpa", "flex", "flash", "flash4", "varlen")
PEERS = ("torch", "llmtrain", "huggingface", "litgpt", "nanogpt")


def parser(description: str | None, runs: Mapping[str, Run]) -> argparse.ArgumentParser:
    """A parser with a command for each of `runs`, described by its docstring; `run` is what it chose."""
    top = Parser(prog="llmtrain bench", description=description)
    commands = top.add_subparsers(dest="benchmark", required=True)
    for name, (words, add) in COMMANDS.items():
        one = commands.add_parser(name, help=words, description=runs[name].__doc__)
        add(one)
        one.add_argument(
            "--output", type=_new_file, metavar="FILE", help="a JSON file with every number that was measured"
        )
        one.set_defaults(run=runs[name])
    return top


def _data(one: argparse.ArgumentParser) -> None:
    one.add_argument(
        "--seconds", type=_seconds, default=3.0, metavar="S", help="of each loader's turn (default: 3)"
    )
    one.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of it (default: all)")
    words = "beside ours, those with a word in their names"
    one.add_argument("--loaders", nargs="+", metavar="WORD", help=words)
    one.add_argument(
        "--smaller", type=_count, default=1, metavar="N", help="read so many times less (default: 1)"
    )
    _rounds(one, 3)
    _directory(one)


def _step(one: argparse.ArgumentParser) -> None:
    words = "of ten steps; medians are reported (default: 30)"
    one.add_argument("--turns", type=_count, default=30, metavar="N", help=words)
    _stages(one)
    _directory(one)


def _kernels(one: argparse.ArgumentParser) -> None:
    for name, words in {
        "rows": f"sequences of the batch {_default(8, 1)}",
        "length": f"positions of each {_default(2048, 256)}",
        "heads": f"query heads {_default(16, 4)}",
        "kv-heads": f"key/value heads {_default(16, 1)}",
        "head-dim": f"width of a head {_default(128, 32)}",
        "documents": "documents of a row, where there are several (default: 4)",
    }.items():
        one.add_argument(f"--{name}", type=_count, metavar="N", help=words)
    words = f"of q, k and v {_default('bf16', 'fp32')}"
    one.add_argument("--dtype", choices=("bf16", "fp16", "fp32"), help=words)
    one.add_argument("--backends", nargs="+", choices=BACKENDS, default=BACKENDS, help="(default: all)")
    words = "of each measurement (default: 0.2)"
    one.add_argument("--seconds", type=_seconds, default=0.2, metavar="S", help=words)
    _rounds(one, 4)


def _model(one: argparse.ArgumentParser) -> None:
    one.add_argument("--model", metavar="PRESET", help=f"of conf/model {_default('124m', 'tiny')}")
    for name, words in {
        "vocab-size": f"rows of the embedding {_default(50_304, 4096)}",
        "seq-len": f"tokens of a row {_default(1024, 128)}",
        "micro-batch-size": f"rows at once {_default(64, 4)}",
        "global-batch-size": f"rows a step {_default(64, 8)}; as many as at once where those are given",
        "steps": f"steps that are timed, a multiple of 5, after ten that are not {_default(30, 20)}",
    }.items():
        one.add_argument(f"--{name}", type=_count, metavar="N", help=words)
    _stages(one)
    one.add_argument("--candidates", nargs="+", choices=PEERS, default=PEERS, help="(default: all)")
    words = "nanoGPT's model.py; without, it is left out"
    one.add_argument("--nanogpt", type=_file, metavar="FILE", help=words)
    _rounds(one, 2)
    _directory(one)


def _save(one: argparse.ArgumentParser) -> None:
    words = "of the checkpoints, about (default: 30 200 700)"
    one.add_argument("--sizes", nargs="+", type=_count, default=[30, 200, 700], metavar="MB", help=words)
    one.add_argument("--stage", type=int, choices=range(1, 4), default=2, help="of ZeRO (default: 2)")
    _rounds(one, 5)
    _directory(one)


COMMANDS: dict[str, tuple[str, Callable[[argparse.ArgumentParser], None]]] = {
    "data": ("the data engine beside other loaders", _data),
    "step": ("the trainer beside DeepSpeed alone", _step),
    "kernels": ("attention backends beside each other", _kernels),
    "model": ("the trainer beside other ways to train the same model", _model),
    "save": ("checkpoints beside DeepSpeed's", _save),
}


def _rounds(one: argparse.ArgumentParser, default: int) -> None:
    words = f"turns of each; medians are reported (default: {default})"
    one.add_argument("--rounds", type=_count, default=default, metavar="N", help=words)


def _stages(one: argparse.ArgumentParser) -> None:
    words = "of ZeRO (default: all)"
    one.add_argument("--stages", nargs="+", type=int, choices=range(4), default=range(4), help=words)


def _directory(one: argparse.ArgumentParser) -> None:
    words = "where its files are made and removed (default: TMPDIR)"
    one.add_argument("--directory", type=_existing_directory, metavar="DIR", help=words)


def _default(gpu: object, cpu: object) -> str:
    return f"(default: {gpu}, without a GPU {cpu})"


# What a value may be: told before anything is measured


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


def _seconds(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and finite")
    return value


def _new_file(text: str) -> Path:
    path = Path(text)
    _existing_directory(str(path.parent))
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{path} is a directory; name a file in it")
    return path


def _file(text: str) -> Path:
    if not (path := Path(text)).is_file():
        raise argparse.ArgumentTypeError(f"{path}: no such file")
    return path


def _existing_directory(text: str) -> Path:
    if not (path := Path(text)).is_dir():
        raise argparse.ArgumentTypeError(f"{path}: no such directory; make it first")
    if not os.access(path, os.W_OK | os.X_OK):
        raise argparse.ArgumentTypeError(f"{path}: may not be written to")
    return path
