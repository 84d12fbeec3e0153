"""The peers of `llmtrain bench data`: each reads the same tokens, in its own format, as its manual says.

All run in process, which is where each of them is fastest on memory-mapped files.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Iterator
from itertools import count, pairwise
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from llmtrain.benchmarks.corpus import WEIGHTS, TokenFiles
from llmtrain.benchmarks.loaders import Tensors, inputs_and_labels

SEED = 1
DOCUMENTS_A_FILE = 50_000


def _windows(files: TokenFiles, source: str) -> Iterator[NDArray[np.uint16]]:
    tokens, size = files.tokens(source), files.seq_len + 1
    return (tokens[i : i + size] for i in range(0, len(tokens) - size + 1, size))


def _collated(windows: Iterable[Any], rows: int) -> Iterator[Tensors]:
    held = []
    for window in windows:
        held.append(window)
        if len(held) == rows:
            yield inputs_and_labels(held)
            held = []


class MosaicML:
    """StreamingDataset over a Stream with a proportion for each source.

    What it shares with other processes it would leave behind: lock files, and memory.
    """

    @staticmethod
    def prepare(files: TokenFiles) -> None:
        from streaming import MDSWriter

        for name in WEIGHTS:
            columns = {"tokens": f"ndarray:uint16:{files.seq_len + 1}"}
            with MDSWriter(out=str(files.directory / "mosaicml" / name), columns=columns) as out:
                for window in _windows(files, name):
                    out.write({"tokens": window})

    def __init__(self, files: TokenFiles, rows: int) -> None:
        from streaming import Stream, StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        local = files.directory / "mosaicml"
        tempfile.tempdir = str(local)  # of this process, for its locks
        self.rows = rows
        self.dataset = StreamingDataset(
            streams=[Stream(local=str(local / name), proportion=weight) for name, weight in WEIGHTS.items()],
            batch_size=rows,
            shuffle=True,
            shuffle_seed=SEED,
            num_canonical_nodes=1,
        )

    def batches(self, start: int) -> Iterator[Tensors | None]:
        epoch, first = divmod(start, max(1, self.dataset.size // self.rows))
        if start:
            state = self.dataset.state_dict(first * self.rows, from_beginning=True) | {"epoch": epoch}
            self.dataset.load_state_dict(state)
        try:
            while True:
                yield from _collated((sample["tokens"] for sample in self.dataset), self.rows)
                yield None
        finally:
            for left in Path("/dev/shm").glob(f"{self.dataset._shm_prefix_int:06}_*"):
                left.unlink()

    def state(self, batches: int) -> str | None:
        return json.dumps(self.dataset.state_dict(batches * self.rows, from_beginning=True))


class LitData:
    """CombinedStreamingDataset over StreamingDatasets with the TokensLoader."""

    @staticmethod
    def prepare(files: TokenFiles) -> None:
        import torch
        from litdata.streaming import Cache, TokensLoader

        for name in WEIGHTS:
            directory = files.directory / "litdata" / name
            directory.mkdir(parents=True)
            cache = Cache(str(directory), chunk_bytes="64MB", item_loader=TokensLoader())
            tokens, offsets = files.tokens(name).astype(np.int32), files.offsets(name)
            step = max(
                1, len(offsets) // 1000
            )  # items are cut into blocks again, so they need not be documents
            for number, first in enumerate(range(0, len(offsets) - 1, step)):
                last = min(first + step, len(offsets) - 1)
                cache[number] = torch.from_numpy(tokens[offsets[first] : offsets[last]]).to(torch.uint16)
            cache.done()
            cache.merge()

    def __init__(self, files: TokenFiles, rows: int) -> None:
        from litdata import CombinedStreamingDataset, StreamingDataset, TokensLoader

        self.rows = rows
        parts = [
            StreamingDataset(
                str(files.directory / "litdata" / name),
                item_loader=TokensLoader(block_size=files.seq_len + 1),
                shuffle=True,
                seed=SEED,
            )
            for name in WEIGHTS
        ]
        self.combined = CombinedStreamingDataset(
            parts, seed=SEED, weights=list(WEIGHTS.values()), iterate_over_all=False
        )

    def batches(self, start: int) -> Iterator[Tensors | None]:
        if start:
            yield from self._resumed(start)
        for epoch in count():
            self.combined.set_epoch(epoch)
            yield from _collated((block.numpy() for block in self.combined), self.rows)
            yield None

    def _resumed(self, start: int) -> Iterator[Tensors]:
        from litdata import StreamingDataLoader

        loader = StreamingDataLoader(self.combined, batch_size=self.rows, num_workers=0)
        loader.load_state_dict(self._state(start))
        for tokens in loader:
            yield tokens[:, :-1].long(), tokens[:, 1:].long()

    def _state(self, batches: int) -> dict[str, Any]:
        yielded = [round(weight * batches * self.rows) for weight in WEIGHTS.values()]
        parts = self.combined.state_dict(0, self.rows, yielded)
        return {
            "dataset": parts,
            "current_epoch": 0,
            "latest_worker_idx": 0,
            "num_samples_yielded": {0: yielded},
        }

    def state(self, batches: int) -> str | None:
        return json.dumps(self._state(batches))


class Grain:
    """MapDataset.mix over a shuffled random access source for each source."""

    @staticmethod
    def prepare(files: TokenFiles) -> None:
        """A random access source is any object with a length and items."""

    def __init__(self, files: TokenFiles, rows: int) -> None:
        import grain

        parts = [
            grain.MapDataset.source(_Windows(files, name)).seed(SEED).shuffle().repeat() for name in WEIGHTS
        ]
        self.rows = rows
        self.dataset = grain.MapDataset.mix(parts, weights=list(WEIGHTS.values())).batch(rows)

    def batches(self, start: int) -> Iterator[Tensors | None]:
        for number in count(start):
            yield inputs_and_labels(self.dataset[number])

    def state(self, batches: int) -> str | None:
        return json.dumps({"next_index": batches})


class _Windows:
    """Consecutive windows of a flat file."""

    def __init__(self, files: TokenFiles, source: str) -> None:
        self._tokens, self._size = files.tokens(source), files.seq_len + 1

    def __len__(self) -> int:
        return len(self._tokens) // self._size

    def __getitem__(self, index: int) -> NDArray[np.uint16]:
        return self._tokens[index * self._size : (index + 1) * self._size]


class Megatron:
    """Megatron-core's blended GPTDataset, with the helpers that it compiles."""

    @staticmethod
    def prepare(files: TokenFiles) -> None:
        import torch
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

        directory = files.directory / "megatron"
        directory.mkdir()
        for name in WEIGHTS:
            tokens, offsets = files.tokens(name), files.offsets(name).tolist()
            builder = IndexedDatasetBuilder(str(directory / f"{name}.bin"), dtype=np.uint16)
            for begin, end in pairwise(offsets):
                builder.add_document(torch.from_numpy(tokens[begin:end].astype(np.int32)), [end - begin])
            builder.finalize(str(directory / f"{name}.idx"))

    def __init__(self, files: TokenFiles, rows: int) -> None:
        import torch
        from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
        from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

        if not torch.distributed.is_initialized():  # a blend asks for its rank
            store = torch.distributed.HashStore()
            torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        directory, self.rows = files.directory / "megatron", rows
        config = GPTDatasetConfig(
            random_seed=SEED,
            sequence_length=files.seq_len,
            blend=([str(directory / name) for name in WEIGHTS], list(WEIGHTS.values())),
            split="1,0,0",
            path_to_cache=str(directory / "cache"),
            reset_position_ids=False,
            reset_attention_mask=False,
            eod_mask_loss=False,
            create_attention_mask=False,
            tokenizer=_NoTokenizer(),
        )
        self.size = int(1.1 * max(files.tokens(name).size for name in WEIGHTS) / files.seq_len) + 10 * rows
        train, _, _ = BlendedMegatronDatasetBuilder(
            GPTDataset, [self.size, 0, 0], lambda: True, config
        ).build()
        self.dataset = train

    def batches(self, start: int) -> Iterator[Tensors | None]:
        from torch.utils.data import default_collate

        for number in count(start):
            first = number * self.rows % (self.size - self.rows)
            batch = default_collate([self.dataset[first + row] for row in range(self.rows)])
            yield batch["tokens"], batch["labels"]

    def state(self, batches: int) -> str | None:
        return json.dumps({"consumed_train_samples": batches * self.rows})


class _NoTokenizer:
    """What GPTDatasetConfig asks of a tokenizer where the text is tokens already."""

    vocab_size = 50_000
    eod = pad = 49_999
    unique_identifiers: ClassVar = {"class": "none"}


class HuggingFace:
    """interleave_datasets over streamed parquet files of tokenised documents, packed as they come.

    It draws documents, so the probabilities are the shares divided by the mean lengths: the best there is.
    """

    @staticmethod
    def prepare(files: TokenFiles) -> None:
        import datasets

        directory = files.directory / "huggingface"
        directory.mkdir()
        for name in WEIGHTS:
            tokens, offsets = files.tokens(name), files.offsets(name)
            features = datasets.Features({"input_ids": datasets.List(datasets.Value("uint16"))})
            for number, first in enumerate(range(0, len(offsets) - 1, DOCUMENTS_A_FILE)):
                cuts = offsets[first : first + DOCUMENTS_A_FILE + 1]
                documents = np.split(np.asarray(tokens[cuts[0] : cuts[-1]]), cuts[1:-1] - cuts[0])
                part = datasets.Dataset.from_dict({"input_ids": documents}, features=features)
                part.to_parquet(directory / f"{name}-{number:05d}.parquet")

    def __init__(self, files: TokenFiles, rows: int) -> None:
        import datasets

        datasets.disable_progress_bars()
        self.files, self.rows = files, rows
        probabilities = document_probabilities(
            {name: float(np.diff(files.offsets(name)).mean()) for name in WEIGHTS}
        )
        parts = [
            datasets.load_dataset(
                "parquet",
                data_files=sorted(map(str, (files.directory / "huggingface").glob(f"{name}-*.parquet"))),
                split="train",
                streaming=True,
            ).with_format("numpy")
            for name in WEIGHTS
        ]
        self.dataset = datasets.interleave_datasets(
            parts, probabilities=probabilities, seed=SEED, stopping_strategy="all_exhausted"
        )

    def batches(self, start: int) -> Iterator[Tensors | None]:
        skipped = int(start * self.rows * self.files.seq_len / self._mean())
        documents = self.dataset.skip(skipped) if start else self.dataset
        while True:
            yield from packed(
                (document["input_ids"] for document in documents), self.rows, self.files.seq_len
            )
            yield None

    def _mean(self) -> float:
        """Tokens a document, as drawn."""
        means = {name: float(np.diff(self.files.offsets(name)).mean()) for name in WEIGHTS}
        return 1 / sum(weight / means[name] for name, weight in WEIGHTS.items())

    def state(self, batches: int) -> str | None:
        return json.dumps(self.dataset.state_dict())


def document_probabilities(means: dict[str, float]) -> list[float]:
    """How often to draw a document of each source so that tokens come in the shares of WEIGHTS."""
    often = [weight / means[name] for name, weight in WEIGHTS.items()]
    return [one / sum(often) for one in often]


def packed(documents: Iterable[NDArray[Any]], rows: int, seq_len: int) -> Iterator[Tensors]:
    """Documents laid end to end and cut into windows, the way every tutorial does it."""
    held: list[NDArray[Any]] = []
    size, there = rows * (seq_len + 1), 0
    for document in documents:
        held.append(document)
        there += len(document)
        if there >= size:
            joined = np.concatenate(held)
            whole = len(joined) // size * size
            for block in joined[:whole].reshape(-1, rows, seq_len + 1):
                yield inputs_and_labels(list(block))
            held, there = [joined[whole:]], len(joined) - whole
