"""Measure llmtrain beside its peers: data, host time a step, attention, training loops, checkpoints."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from itertools import chain
from pathlib import Path
from typing import Any

from llmtrain.benchmarks.measure import failures_are_mistakes, require_one
from llmtrain.benchmarks.options import parser
from llmtrain.config.door import plain_door


def data(a: argparse.Namespace) -> None:
    """Loaders, live text and preparation beside the peers that are installed, and a source of 10T tokens."""
    from llmtrain.benchmarks.data import Sizes, chosen, compare, loaders_table, smaller
    from llmtrain.benchmarks.scale import compare_scale, scale_table
    from llmtrain.benchmarks.text import compare_text, text_table

    sizes = smaller(Sizes(), a.smaller)
    directory = Path(tempfile.mkdtemp(prefix="llmtrain-bench-", dir=a.directory))
    timing = {"seconds": a.seconds, "rounds": a.rounds}
    report: dict[str, Any] = {**timing}
    try:
        if "loaders" in a.only:
            loaders = compare(directory, sizes=sizes, candidates=chosen(a.loaders), **timing)
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
    _write(a.output, report)
    if "scale" not in a.only:
        ways = [report[part]["ways"].values() for part in ("live", "prepare") if part in a.only]
        require_one(chain(report.get("loaders", {}).values(), *ways))


def step(a: argparse.Namespace) -> None:
    """Processor time a step of the trainer beside DeepSpeed's own loop, on 171 tiny parameters."""
    from llmtrain.benchmarks.step import TENSORS, compare_steps, steps_table

    results = compare_steps(a.directory, a.turns, a.stages)
    _say(f"\n{TENSORS} parameters, processor time\n\n{steps_table(results)}\n")
    _write(a.output, {"turns": a.turns, "stages": results})


def kernels(a: argparse.Namespace) -> None:
    """Every attention backend for every mask: error against float64 and speed, on the device that is here."""
    from llmtrain.benchmarks.kernels import compare_kernels, kernels_table, sizes_here

    names = ("rows", "length", "heads", "kv_heads", "head_dim", "documents", "dtype")
    sizes = sizes_here(**{name: getattr(a, name) for name in names})
    report = compare_kernels(sizes, backends=a.backends, seconds=a.seconds, rounds=a.rounds)
    shape = ", ".join(f"{name} {value}" for name, value in report["sizes"].items())
    _say(f"\n{report['machine']['device']}: {shape}\n\n{kernels_table(report)}\n")
    _write(a.output, report)
    require_one(result for mask in report["masks"].values() for result in mask.values())


def model(a: argparse.Namespace) -> None:
    """Bare torch, the trainer under each ZeRO stage, and other projects, on the same model and tokens."""
    from llmtrain.benchmarks.model import candidates_of, compare_models, describe, models_table, sizes_here

    names = ("model", "vocab_size", "seq_len", "micro_batch_size", "global_batch_size", "steps")
    sizes = sizes_here(**{name: getattr(a, name) for name in names})
    candidates = candidates_of(a.candidates, a.stages)
    report = compare_models(sizes, candidates, rounds=a.rounds, nanogpt=a.nanogpt, directory=a.directory)
    _say(f"\n{describe(report)}\n\n{models_table(report)}\n")
    _write(a.output, report)
    require_one(report["candidates"].values())


def save(a: argparse.Namespace) -> None:
    """A checkpoint of ours beside DeepSpeed's, with and without fsync, and beside writing the bytes alone."""
    from llmtrain.benchmarks.save import compare_saves, saves_table

    report = compare_saves(a.sizes, a.stage, a.rounds, a.directory)
    _say(f"\n{saves_table(report)}\n")
    _write(a.output, report)


def _write(path: Path | None, report: dict[str, Any]) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def main(argv: list[str] | None = None) -> int:
    """The door of `llmtrain bench`."""
    runs = {"data": data, "step": step, "kernels": kernels, "model": model, "save": save}
    a = parser(__doc__, runs).parse_args(argv)

    def run() -> None:
        with failures_are_mistakes(f"llmtrain bench {a.benchmark}"):
            a.run(a)

    return plain_door(run)


if __name__ == "__main__":
    raise SystemExit(main())
