"""Training loops side by side on the same model and tokens: `llmtrain bench model`."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from llmtrain.benchmarks.corpus import make_tokenizer
from llmtrain.benchmarks.data import machine
from llmtrain.benchmarks.measure import (
    NotInstalledError,
    Result,
    Station,
    interleaved,
    markdown,
    medians,
    number,
)
from llmtrain.benchmarks.model_turns import EVERY, Task
from llmtrain.config import UserError

logger = logging.getLogger(__name__)

TURNS = "llmtrain.benchmarks.model_turns"
LIMIT = 1800.0
"""Seconds that a turn may take: the first one compiles."""
FLOOR = "torch, bare loop"
PACKAGES = ("deepspeed", "transformers", "litgpt")


@dataclass(frozen=True)
class Sizes:
    """What is trained."""

    model: str
    """A preset of conf/model."""
    vocab_size: int
    seq_len: int
    micro_batch_size: int
    global_batch_size: int
    steps: int
    """Timed steps."""


LARGE = Sizes("124m", 50_304, seq_len=1024, micro_batch_size=64, global_batch_size=64, steps=30)
"""On a GPU: GPT-2 small's shape."""
SMALL = Sizes("tiny", 4096, seq_len=128, micro_batch_size=4, global_batch_size=8, steps=20)
"""What a CPU trains in seconds."""


@dataclass(frozen=True)
class Candidate:
    """A way to train the model: a function of model_turns and what it needs."""

    function: str
    arguments: tuple[Any, ...] = ()
    needs: tuple[str, ...] = ()
    reads_weights: bool = False
    """Whether it loads the first weights of the run as a Hugging Face directory."""
    same: bool = True
    """Whether it begins with the weights of the run, so that losses can be compared."""


def candidates_of(peers: Sequence[str], stages: Sequence[int]) -> dict[str, Candidate]:
    """What is compared, by the names in the table."""
    ours = {f"llmtrain, ZeRO {stage}": Candidate("ours", (stage,)) for stage in stages}
    known = {
        "torch": {FLOOR: Candidate("bare")},
        "llmtrain": ours,
        "huggingface": {
            "Hugging Face, DeepSpeed's stage 2": Candidate(
                "huggingface", needs=("transformers",), reads_weights=True
            )
        },
        "litgpt": {"litgpt": Candidate("litgpt", needs=("litgpt", "lightning"), reads_weights=True)},
        "nanogpt": {"nanoGPT": Candidate("nanogpt", same=False)},
    }
    return {name: candidate for peer in peers for name, candidate in known[peer].items()}


def sizes_here(**changes: Any) -> Sizes:
    """LARGE with a GPU, else SMALL, but for changes that are not None; UserError where they do not fit."""
    import torch

    given = {key: value for key, value in changes.items() if value is not None}
    start = LARGE if torch.cuda.is_available() else SMALL
    sizes = replace(start, **given)
    if "micro_batch_size" in given and "global_batch_size" not in given:
        sizes = replace(sizes, global_batch_size=sizes.micro_batch_size)
    if sizes.steps % EVERY:
        raise UserError(f"--steps {sizes.steps} is not a multiple of {EVERY}: so many are timed as one")
    return sizes


def overrides(sizes: Sizes, directory: str) -> list[str]:
    """The run that all candidates train: whole rows, each position a target, a constant learning rate."""
    return [
        *(f"{key}={getattr(sizes, key)}" for key in ("model", "seq_len")),
        *(f"{key}={getattr(sizes, key)}" for key in ("micro_batch_size", "global_batch_size")),
        *("tokenizer=huggingface", f"tokenizer.path={directory}/tokenizer.json", "data.boundary=eos"),
        *("data.documents=attend", "data.validation_fraction=0", "data.preparation=ahead"),
        *("~data.sources.code", "~data.sources.docstrings", "data.sources.prose.weight=1"),  # soon prepared
        *("optimizer=adamw", "scheduler=constant", "max_steps=1000000"),
        *(f"log_every={EVERY}", "logger.progress=none"),
        *("callbacks.evaluation.every=0", "callbacks.sample.every=0", "callbacks.sample.prompts=[]"),
        *("checkpoint.every=1000000", "resume=never"),
        *(f"cache_dir={directory}/cache", f"output_dir={directory}/runs"),
    ]


def compare_models(
    sizes: Sizes,
    candidates: Mapping[str, Candidate],
    *,
    rounds: int,
    nanogpt: Path | None = None,
    directory: Path | None = None,
) -> dict[str, Any]:
    """Every candidate's medians, or `missing` or `error`; files are made below `directory` and removed."""
    with tempfile.TemporaryDirectory(prefix="llmtrain-bench-", dir=directory) as place:
        make_tokenizer(Path(place) / "tokenizer.json", sizes.vocab_size)
        task = Task(overrides(sizes, place), place, sizes.steps, str(nanogpt.resolve()) if nanogpt else None)
        task.config(stage=0)  # a preset that does not exist is told before anything starts
        exports = any(candidate.reads_weights for candidate in candidates.values())
        here = _call("make", asdict(task), exports)
        turns = {name: partial(_turn, name, candidate, task) for name, candidate in candidates.items()}
        ceilings = [_call("ceiling")["tflops"]]
        found = interleaved(turns, rounds)
        ceilings.append(_call("ceiling")["tflops"])
    results: dict[str, Result] = {}
    for name, measured in found.items():
        if isinstance(measured, list):
            results[name] = medians(measured) | {"rounds": measured}
            results[name] |= _speeds(results[name], sizes, here)
        else:
            key = "missing" if isinstance(measured, NotInstalledError) else "error"
            results[name] = {key: str(measured)}
    _compare_losses({name: results[name] for name, candidate in candidates.items() if candidate.same})
    return {
        "machine": machine() | {"device": here["device"], "versions": _versions()},
        "sizes": asdict(sizes),
        "matmul_tflops": ceilings,
        "candidates": results,
    }


def _turn(name: str, candidate: Candidate, task: Task) -> Result:
    lacking = [need for need in candidate.needs if find_spec(need) is None]
    if lacking:
        raise NotInstalledError(lacking[0])
    if candidate.function == "nanogpt" and task.nanogpt is None:
        raise NotInstalledError("say where its model.py is with --nanogpt")
    result = _call(candidate.function, asdict(task), *candidate.arguments)
    logger.info("%s: %.1f ms a step", name, result["ms"])
    return result


def _call(function: str, *arguments: Any) -> Result:
    """In a process that ends with it, so that neither memory nor a compiled graph is left to the next."""
    with Station(TURNS) as station:
        return station.call(function, *arguments, limit=LIMIT)


def _speeds(result: Result, sizes: Sizes, here: Result) -> Result:
    """Tokens a second, and what they are of the device's peak by the three usual counts of operations.

    6 N; with attention's masked half left out, 6 N + 6 L d S; in full, 6 N + 12 L d S, which the trainer
    reports. N are all parameters of the candidate's own model.
    """
    speed = sizes.global_batch_size * sizes.seq_len / result["ms"] * 1e3
    attention = here["attention_width"] * sizes.seq_len
    counts = {"6N": 0, "6N_6LdS": 6, "6N_12LdS": 12}
    flops = {name: (6 * result["parameters"] + c * attention) * speed for name, c in counts.items()}
    speeds = {"tokens_s": speed} | {f"tflops_{name}": value / 1e12 for name, value in flops.items()}
    if here["peak_flops"] is not None:
        speeds |= {f"mfu_{name}": value / here["peak_flops"] for name, value in flops.items()}
    return speeds


def _compare_losses(results: Mapping[str, Result]) -> None:
    """`loss_difference`: the largest, over the steps, from the first of them, relative to it."""
    measured = [result for result in results.values() if "losses" in result]
    for result in measured:
        pairs = zip(result["losses"], measured[0]["losses"], strict=True)
        result["loss_difference"] = max(abs(loss - first) / first for loss, first in pairs)


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def models_table(report: Mapping[str, Any]) -> str:
    """The comparison as Markdown: MFU where the device's peak is known, else TFLOP/s."""
    results: Mapping[str, Result] = report["candidates"]
    known = any("mfu_6N" in result for result in results.values())
    unit, key, factor = ("MFU, %:", "mfu", 100.0) if known else ("TFLOP/s:", "tflops", 1.0)
    headings = (
        "candidate", "parameters", "dtype", "attention", "ms a step", "tokens/s", "of bare torch",
        f"{unit} 6N", "+ 6LdS", "+ 12LdS", "peak, MB", "last loss", "largest loss difference",
    )  # fmt: skip
    floor = results.get(FLOOR, {}).get("ms")
    rows, notes = [], []
    for name, result in results.items():
        lacking = result.get("missing", result.get("error"))
        if lacking is not None:
            notes.append(f"- {name}: {lacking}")
            rows.append([name, "not here" if "missing" in result else "failed", *["-"] * 11])
            continue
        difference = result.get("loss_difference")
        rows.append(
            [
                name, f"{result['parameters']:,}", result["precision"], result["attention"],
                number(result["ms"]), number(result["tokens_s"]),
                "-" if floor is None else f"{floor / result['ms']:.3f}",
                *(number(factor * result[f"{key}_{c}"]) for c in ("6N", "6N_6LdS", "6N_12LdS")),
                number(result["peak_mb"]), f"{result['losses'][-1]:.4f}",
                "other weights" if difference is None else f"{difference:.1e}",
            ]
        )  # fmt: skip
    return "\n".join([markdown(headings, rows), *(["", *notes] if notes else [])])


def describe(report: Mapping[str, Any]) -> str:
    """What was measured on what, in a line."""
    sizes, here = report["sizes"], report["machine"]
    before, after = report["matmul_tflops"]
    packages = {"torch": here["torch"]} | here["versions"]
    return (
        f"{here['device']} ({number(before)} TFLOP/s in a large matrix product before the turns, "
        f"{number(after)} after): {sizes['model']}, vocabulary {sizes['vocab_size']:,}, "
        f"{sizes['global_batch_size']} x {sizes['seq_len']} tokens a step in micro-batches of "
        f"{sizes['micro_batch_size']}; " + ", ".join(f"{name} {value}" for name, value in packages.items())
    )
