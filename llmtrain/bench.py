"""Measure llmtrain beside its peers: llmtrain bench data, llmtrain bench step, llmtrain bench kernels."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from llmtrain.config.door import plain_door

PARTS = ("loaders", "live", "prepare", "scale")


def data(a: argparse.Namespace) -> None:
    """Loaders, live text and preparation beside the peers that are installed, and a source of 10T tokens."""
    from llmtrain.benchmarks.data import Sizes, chosen, compare, loaders_table, smaller
    from llmtrain.benchmarks.scale import compare_scale, scale_table
    from llmtrain.benchmarks.text import compare_text, text_table

    sizes = smaller(Sizes(), a.smaller)
    directory = Path(tempfile.mkdtemp(prefix="llmtrain-bench-", dir=a.directory))
    report: dict[str, Any] = {"seconds": a.seconds, "rounds": a.rounds}
    try:
        if "loaders" in a.only:
            candidates = chosen(a.loaders)
            loaders = compare(
                directory, seconds=a.seconds, rounds=a.rounds, sizes=sizes, candidates=candidates
            )
            report |= loaders
            title = f"packed [{sizes.rows}, {sizes.seq_len}] of three sources, .5/.3/.2"
            _say(f"\n{title}\n\n{loaders_table(loaders)}\n")
        for part in ("live", "prepare"):
            if part in a.only:
                size = max(100_000, 20_000_000 // a.smaller)
                report[part] = compare_text(part, directory / part, rounds=a.rounds, size=size)
                _say(f"\n{text_table(part, report[part])}\n")
        if "scale" in a.only:
            report["scale"] = compare_scale(directory / "scale", 100_000 // a.smaller)
            _say(f"\n{scale_table(report['scale'])}\n")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
    if a.output is not None:
        _write(a.output, report)


def step(a: argparse.Namespace) -> None:
    """Processor time a step of the trainer beside DeepSpeed's own loop, on 171 tiny parameters."""
    from llmtrain.benchmarks.step import TENSORS, compare_steps, steps_table

    results = compare_steps(a.directory, a.turns, a.stages)
    _say(f"\n{TENSORS} parameters, processor time\n\n{steps_table(results)}\n")
    if a.output is not None:
        _write(a.output, {"turns": a.turns, "stages": results})


def _write(path: Path, report: dict[str, Any]) -> None:
    path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def kernels(a: argparse.Namespace) -> None:
    """Every attention backend for every mask: error against float64 and speed, on the device that is here."""
    from llmtrain.benchmarks.kernels import compare_kernels, kernels_table, sizes_here

    names = ("rows", "length", "heads", "kv_heads", "head_dim", "documents", "dtype")
    sizes = sizes_here(**{name: getattr(a, name) for name in names})
    report = compare_kernels(sizes, backends=a.backends, seconds=a.seconds, rounds=a.rounds)
    shape = ", ".join(f"{name} {value}" for name, value in report["sizes"].items())
    _say(f"\n{report['machine']['device']}: {shape}\n\n{kernels_table(report)}\n")
    if a.output is not None:
        _write(a.output, report)


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """The door of `llmtrain bench`."""
    parser = argparse.ArgumentParser(prog="llmtrain bench", description=__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    one = benchmarks.add_parser("data", help="the data engine beside other loaders", description=data.__doc__)
    one.add_argument("--seconds", type=float, default=3.0, help="of each loader's turn (default: 3)")
    one.add_argument("--rounds", type=int, default=3, help="turns of each; medians are reported (default: 3)")
    one.add_argument("--output", type=Path, help="a JSON file with every number that was measured")
    one.add_argument("--only", nargs="+", choices=PARTS, default=PARTS, help="parts of it (default: all)")
    one.add_argument(
        "--loaders", nargs="+", metavar="WORD", help="beside ours, those with a word in their names"
    )
    one.add_argument("--smaller", type=int, default=1, help="read so many times less (default: 1)")
    one.add_argument("--directory", type=Path, help="where its files are made and removed (default: TMPDIR)")
    one.set_defaults(run=data)
    one = benchmarks.add_parser("step", help="the trainer beside DeepSpeed alone", description=step.__doc__)
    one.add_argument("--turns", type=int, default=30, help="of ten steps; medians are reported (default: 30)")
    one.add_argument("--stages", nargs="+", type=int, choices=range(4), default=range(4), help="of ZeRO")
    one.add_argument("--output", type=Path, help="a JSON file with every number")
    one.add_argument("--directory", type=Path, help="where its files are made and removed (default: TMPDIR)")
    one.set_defaults(run=step)
    _kernels_options(benchmarks)
    a = parser.parse_args(argv)
    return plain_door(lambda: a.run(a))


def _kernels_options(benchmarks: Any) -> None:
    backends = ("eager", "sdpa", "flex", "flash", "flash4", "varlen")
    one = benchmarks.add_parser(
        "kernels", help="attention backends beside each other", description=kernels.__doc__
    )
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
    one.add_argument("--backends", nargs="+", choices=backends, default=backends, help="(default: all)")
    one.add_argument("--seconds", type=float, default=0.2, help="of each measurement (default: 0.2)")
    one.add_argument("--rounds", type=int, default=4, help="turns of each; medians are reported (default: 4)")
    one.add_argument("--output", type=Path, help="a JSON file with every number that was measured")
    one.set_defaults(run=kernels)


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return value


if __name__ == "__main__":
    raise SystemExit(main())
