"""Loaders side by side on the same tokens, in one interleaved run: `llmtrain bench data`."""

from __future__ import annotations

import logging
import os
import platform
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from llmtrain.benchmarks.corpus import WEIGHTS, TokenFiles, make_marked, make_tokens
from llmtrain.benchmarks.measure import (
    FailedError,
    NotInstalledError,
    Result,
    Station,
    interleaved,
    markdown,
    medians,
    number,
)
from llmtrain.config import UserError

logger = logging.getLogger(__name__)

OURS = "llmtrain"
LATE = 10**9
"""The batch at which ours is resumed."""


@dataclass(frozen=True)
class Candidate:
    """A loader and what it needs."""

    loader: str
    """module:Class, see loaders.Loader."""
    package: str | None = None
    """The distribution whose version is told."""
    needs: tuple[str, ...] = ()
    """Modules that it imports."""
    late: int | None = 10**6
    """The window at which it is resumed, of short ones: ours and it alike; None: it cannot be."""
    mixes: bool = True


_LOADERS, _PEERS = "llmtrain.benchmarks.loaders", "llmtrain.benchmarks.peers"
CANDIDATES = {
    OURS: Candidate(f"{_LOADERS}:Ours"),
    "llmtrain, prefetch thread": Candidate(f"{_LOADERS}:OursAhead"),
    "nanoGPT random crop": Candidate(f"{_LOADERS}:NanoGPT", late=None, mixes=False),
    "MosaicML streaming": Candidate(f"{_PEERS}:MosaicML", "mosaicml-streaming", ("streaming",)),
    "litdata combined": Candidate(f"{_PEERS}:LitData", "litdata", ("litdata",)),
    "grain mix": Candidate(f"{_PEERS}:Grain", "grain", ("grain",)),
    "Megatron-core blended": Candidate(
        f"{_PEERS}:Megatron",
        "megatron-core",
        ("megatron.core.datasets.gpt_dataset", "megatron.core.datasets.helpers_cpp"),
    ),
    "Hugging Face interleave": Candidate(f"{_PEERS}:HuggingFace", "datasets", ("datasets",), late=10**4),
}


@dataclass(frozen=True)
class Sizes:
    """How much is read."""

    tokens: int = 50_000_000
    """Tokens of each source."""
    seq_len: int = 2048
    rows: int = 8
    windows: int = 100_000
    """Windows over whose prefixes the mixture is followed."""
    short: int = 15
    """Tokens of a window where only its source matters."""
    late: int = 10**6
    """Short windows that there are at least."""
    repeats: int = 5
    """Times that a start and a resumption are measured, in turns."""


def compare(
    directory: Path,
    *,
    seconds: float,
    rounds: int,
    sizes: Sizes,
    candidates: Mapping[str, Candidate] = CANDIDATES,
) -> dict[str, Any]:
    """Every candidate's numbers, or `missing` or `error`; the files are made in `directory`, which is new.

    Beside its medians each has `ratio`: its speed over that of the first candidate, in the same rounds.
    """
    logger.info("writing %d sources of %s tokens", len(WEIGHTS), f"{sizes.tokens:,}")
    files = make_tokens(directory / "tokens", sizes.seq_len, sizes.tokens)
    enough = max(sizes.windows, sizes.late + 1000)
    marked = make_marked(directory / "marked", sizes.short, enough, like=sizes.seq_len)
    with ExitStack() as stack:
        stations = {
            name: stack.enter_context(Station(_LOADERS, candidate.needs))
            for name, candidate in candidates.items()
        }
        found = {
            name: _alone(name, candidate, stations[name], files, marked, sizes)
            for name, candidate in candidates.items()
        }
        arguments = str(files.directory), files.seq_len, sizes.rows, seconds
        turns = {
            name: partial(stations[name].call, "turn", candidate.loader, *arguments)
            for name, candidate in candidates.items()
            if found[name].keys().isdisjoint(("missing", "error"))
        }
        logger.info("%d rounds of %g s each: %s", rounds, seconds, ", ".join(turns))
        for name, results in interleaved(turns, rounds).items():
            found[name] |= _summary(results)
    _compare_speeds(found, next(iter(candidates)))
    versions = {name: _version(candidate) for name, candidate in candidates.items()}
    return {"machine": machine(), "versions": versions, "loaders": found}


def _summary(results: list[Result] | NotInstalledError | FailedError) -> Result:
    return medians(results) | {"rounds": results} if isinstance(results, list) else _entry(results)


def _compare_speeds(found: Mapping[str, Result], first: str) -> None:
    speed = found[first].get("mtok_s")
    for result in found.values():
        if speed and "mtok_s" in result:
            result["ratio"] = result["mtok_s"] / speed


def _alone(
    name: str, candidate: Candidate, station: Station, files: TokenFiles, marked: TokenFiles, sizes: Sizes
) -> Result:
    """What need not be interleaved of one candidate: it writes its files; mixture, resumption and state."""
    logger.info("%s: files, mixture, resumption", name)
    result: Result = {"late": None}
    try:
        for one in (files, marked):
            station.call("prepare", candidate.loader, str(one.directory), one.seq_len)
        if candidate.mixes:
            arguments = candidate.loader, str(marked.directory), marked.seq_len, sizes.rows, sizes.windows
            result |= station.call("deviation", *arguments)
        if candidate.late is not None:
            ours = candidate.loader.startswith(_LOADERS)
            at = files if ours else marked  # a peer that ends with its files needs many windows
            late = LATE if ours else min(candidate.late, sizes.late)
            rows = sizes.rows if ours else 1
            repeats = sizes.repeats if ours else 1
            arguments = candidate.loader, str(at.directory), at.seq_len, rows, late
            result |= {"late": late} | _resumption(station.call("resume", *arguments, repeats))
    except (NotInstalledError, FailedError) as error:
        result |= _entry(error)
    return result


def _resumption(result: Result) -> Result:
    return {"resume_ratio" if key == "ratio" else key: value for key, value in result.items()}


def _entry(error: NotInstalledError | FailedError) -> Result:
    return {"missing" if isinstance(error, NotInstalledError) else "error": str(error)}


def _version(candidate: Candidate) -> str:
    try:
        return version(candidate.package or "llmtrain")
    except PackageNotFoundError:
        return "-"


def machine() -> dict[str, Any]:
    """What the numbers were measured on."""
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "torch": version("torch"),
        "numpy": version("numpy"),
    }


def loaders_table(report: Mapping[str, Any]) -> str:
    """The loaders as a Markdown table."""
    headings = (
        "loader", "version", "Mtok/s", "of ours", "first batch, ms", "memory, MB (own)",
        "resume: start -> late, s", "ratio", "largest prefix deviation, windows", "state, bytes",
    )  # fmt: skip
    rows = [_row(name, report["versions"][name], result) for name, result in report["loaders"].items()]
    return markdown(headings, rows)


def _row(name: str, version_: str, result: Result) -> Sequence[str]:
    if "missing" in result:
        return [name, "not installed", *["-"] * 8]
    if "error" in result:
        return [name, version_, f"failed: {result['error']}", *["-"] * 7]
    late = result["late"]
    resumed = f"{number(result['start_s'])} -> {number(result['resume_s'])} (at {late:.0e})" if late else "-"
    return [
        name,
        version_,
        number(result["mtok_s"]),
        f"{result['ratio']:.2f}",
        number(result["first_ms"]),
        f"{number(result['rss_mb'])} ({number(result['own_mb'])})",
        resumed,
        number(result.get("resume_ratio")),
        number(result.get("deviation")),
        number(result.get("state_bytes"), 6),
    ]


def chosen(words: Sequence[str] | None) -> dict[str, Candidate]:
    """Ours, and those that have one of the words in their names; None: all."""
    if words is None:
        return dict(CANDIDATES)
    for word in words:
        if not any(word.lower() in name.lower() for name in CANDIDATES):
            raise UserError(f"--loaders {word}: no loader is called so; there are {', '.join(CANDIDATES)}")
    return {
        name: candidate
        for name, candidate in CANDIDATES.items()
        if name == OURS or any(word.lower() in name.lower() for word in words)
    }


def smaller(sizes: Sizes, factor: int) -> Sizes:
    """The same measurements of less."""
    return replace(
        sizes, tokens=sizes.tokens // factor, windows=sizes.windows // factor, late=sizes.late // factor
    )
