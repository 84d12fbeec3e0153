"""The loaders of `llmtrain bench data`, ours and nanoGPT's, and what is measured of every loader.

Each gives batches of inputs and labels, [rows, L] tensors, in the process that asks for them. The functions
at the end run in a process of their own each, see measure.Station.
"""

from __future__ import annotations

import json
import time
from collections.abc import Generator, Iterator
from importlib import import_module
from itertools import count, islice
from pathlib import Path
from statistics import median
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from llmtrain.benchmarks.corpus import VOCABULARY, WEIGHTS, TokenFiles
from llmtrain.benchmarks.measure import Result, memory, rate
from llmtrain.data.dataset import PackedDataset
from llmtrain.data.shards import Header, ShardedSource, ShardWriter, shard_path, write_index

Tensors = tuple[Tensor, Tensor]

SHARDS = 4
SHUFFLE_SPAN = 65_536
"""The default of `data.shuffle_span`."""
WARM_UP = 0.5


class Loader(Protocol):
    """Something that gives batches made of token files; a peer writes the files in its own format first."""

    @staticmethod
    def prepare(files: TokenFiles) -> None:
        """Write its own files; once."""

    def __init__(self, files: TokenFiles, rows: int) -> None:
        """Open them."""

    def batches(self, start: int) -> Iterator[Tensors | None]:
        """Batch `start` and those after it, without end; None where it has to start over in between."""

    def state(self, batches: int) -> str | None:
        """What it saves after so many batches, as text; None where it saves nothing."""


def inputs_and_labels(windows: list[NDArray[Any]]) -> Tensors:
    """The usual collation, in the type that ours has: int32 tensors of windows of L + 1 tokens."""
    tokens = torch.from_numpy(np.stack(windows).astype(np.int32))
    return tokens[:, :-1], tokens[:, 1:]


class Ours:
    """PackedDataset: three sources, exact shares, positions and segments, in process."""

    @staticmethod
    def prepare(files: TokenFiles) -> None:
        for name in WEIGHTS:
            tokens, offsets = files.tokens(name), files.offsets(name)
            header = Header(tokenizer="0" * 64, vocab_size=VOCABULARY, boundary="none")
            directory = files.directory / "ours" / name
            documents = np.linspace(0, len(offsets) - 1, SHARDS + 1).astype(int).tolist()
            for shard in range(SHARDS):
                cuts = offsets[documents[shard] : documents[shard + 1] + 1]
                ids = np.split(tokens[cuts[0] : cuts[-1]], cuts[1:-1] - cuts[0])
                writer = ShardWriter(shard_path(directory, shard), header)
                writer.begin(f"{name}.bin", "byte")
                writer.add_batch(ids, [4 * len(one) for one in ids], (2 * cuts[:-1]).tolist())
                writer.finish()
            write_index(directory, header, SHARDS)

    def __init__(self, files: TokenFiles, rows: int) -> None:
        self.rows = rows
        self.dataset = PackedDataset(
            {name: ShardedSource.open(files.directory / "ours" / name) for name in WEIGHTS},
            WEIGHTS,
            seq_len=files.seq_len,
            global_batch_size=rows,
            seed=1,
            documents="separate",
            shuffle_span=SHUFFLE_SPAN,
        )

    def batches(self, start: int) -> Iterator[Tensors | None]:
        for step in count(start + 1):
            batch = self.dataset.rows(step, 0, self.rows)
            yield batch.input_ids, batch.labels

    def state(self, batches: int) -> str | None:
        return json.dumps(self.dataset.state(batches))


class OursAhead(Ours):
    """The same through the prefetch thread, as training reads it."""

    @staticmethod
    def prepare(files: TokenFiles) -> None:
        if not (files.directory / "ours").exists():
            Ours.prepare(files)

    def batches(self, start: int) -> Iterator[Tensors | None]:
        for batch in self.dataset.batches(start + 1, 0, 1):
            yield batch.input_ids, batch.labels


class NanoGPT:
    """The random crop of nanoGPT's train.py: one source, no order, no boundaries."""

    @staticmethod
    def prepare(files: TokenFiles) -> None:
        """It reads the flat file."""

    def __init__(self, files: TokenFiles, rows: int) -> None:
        self.path, self.block_size, self.rows = (
            files.directory / f"{next(iter(WEIGHTS))}.bin",
            files.seq_len,
            rows,
        )

    def batches(self, start: int) -> Iterator[Tensors | None]:
        while True:
            data = np.memmap(self.path, dtype=np.uint16, mode="r")  # anew each time, as there
            ix = torch.randint(len(data) - self.block_size, (self.rows,)).tolist()
            x = torch.stack([torch.from_numpy(data[i : i + self.block_size].astype(np.int64)) for i in ix])
            y = torch.stack(
                [torch.from_numpy(data[i + 1 : i + 1 + self.block_size].astype(np.int64)) for i in ix]
            )
            yield x, y

    def state(self, batches: int) -> str | None:
        return None


# What is measured: called in a process of its own


def prepare(loader: str, directory: str, seq_len: int) -> Result:
    """Writes the loader's own files."""
    begin = time.perf_counter()
    _class(loader).prepare(TokenFiles(Path(directory), seq_len))
    return {"seconds": time.perf_counter() - begin}


def turn(loader: str, directory: str, seq_len: int, rows: int, seconds: float) -> Result:
    """One round: Mtok/s, the time to the first batch from opening the files, and MB of memory after."""
    before, begin = memory(), time.perf_counter()
    batches = _open(loader, directory, seq_len, rows).batches(0)
    next(batches)
    first = time.perf_counter() - begin
    tokens = rate(map(_count, batches), seconds, WARM_UP) / 1e6
    after = memory()
    return {
        "mtok_s": tokens,
        "first_ms": 1e3 * first,
        "rss_mb": after["rss"],
        "own_mb": after["own"] - before["own"],
    }


def deviation(loader: str, directory: str, seq_len: int, rows: int, windows: int) -> Result:
    """The farthest that a source ever was from its share, in windows, over all prefixes; of marked files.

    Counted in tokens that were really given: the inputs' values are the numbers of their sources.
    """
    batches = (batch for batch in _open(loader, directory, seq_len, rows).batches(0) if batch is not None)
    marks = np.concatenate([batch[0].numpy() for batch in islice(batches, -(-windows // rows))])[:windows]
    return {"deviation": largest_deviation(marks, list(WEIGHTS.values()))}


def largest_deviation(marks: NDArray[Any], weights: list[float]) -> float:
    """Over all prefixes of rows and all sources: | windows of the source - weight * windows |."""
    parts = np.stack([(marks == source).mean(axis=1) for source in range(len(weights))])
    shares = np.array(weights)[:, None] / sum(weights)
    return float(np.abs(np.cumsum(parts - shares, axis=1)).max())


def resume(loader: str, directory: str, seq_len: int, rows: int, batch: int, times: int) -> Result:
    """Seconds to the first batch at the beginning and at a late batch, in turns; bytes of the state."""
    seconds: dict[int, list[float]] = {0: [], batch: []}
    late = None
    for number in range(times + 1):
        for start in (0, batch) if number % 2 else (batch, 0):
            begin = time.perf_counter()
            late = _open(loader, directory, seq_len, rows)
            batches = late.batches(start)
            next(batches)
            seconds[start].append(time.perf_counter() - begin)
            if isinstance(batches, Generator):
                batches.close()
    assert late is not None
    state = late.state(batch)
    first = {
        start: median(taken[1:] or taken) for start, taken in seconds.items()
    }  # the very first one warms up
    return {
        "start_s": first[0],
        "resume_s": first[batch],
        "ratio": first[batch] / first[0],
        "state_bytes": None if state is None else len(state.encode()),
    }


def _count(batch: Tensors | None) -> int:
    return 0 if batch is None else batch[0].numel()


def _open(loader: str, directory: str, seq_len: int, rows: int) -> Loader:
    opened: Loader = _class(loader)(TokenFiles(Path(directory), seq_len), rows)
    return opened


def _class(loader: str) -> Any:
    module, _, name = loader.partition(":")
    return getattr(import_module(module), name)
