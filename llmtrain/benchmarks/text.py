"""From raw text: live into packed rows, and ahead into token files, beside Hugging Face datasets.

Every measurement runs in a process of its own on one core, with the threads that the libraries start there.
What counts is the processor time of it and its children: others on the machine hardly change it.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from llmtrain.benchmarks.corpus import END, WEIGHTS, make_text, make_tokenizer
from llmtrain.benchmarks.measure import (
    FailedError,
    Result,
    Station,
    cpu_seconds,
    interleaved,
    markdown,
    medians,
    number,
)
from llmtrain.data.config import DataConfig, SourceConfig

logger = logging.getLogger(__name__)

ROWS, SEQ_LEN = 8, 2048
BATCH = 1000
"""Documents that `map` takes at a time: its default."""

TINY = 100_000
"""Bytes of the text that everything has been through before it is measured."""

Encode = Callable[[list[str]], list[list[int]]]


@dataclass(frozen=True)
class Way:
    """A way from text to tokens: one of the functions below and its backend."""

    function: str
    backend: str
    needs: tuple[str, ...] = ()
    slow: bool = False
    """Slow ones are given a quarter of the text."""


FASTEST = "auto"
_DATASETS = ("datasets",)
_TRANSFORMERS = ("datasets", "transformers")
_HF = "Hugging Face interleave + map"
WAYS: dict[str, dict[str, Way]] = {
    "live": {
        "llmtrain, fastest": Way("live_ours", FASTEST),
        "llmtrain, tiktoken": Way("live_ours", "tiktoken", ("tiktoken",)),
        "llmtrain, tokenizers": Way("live_ours", "tokenizers", slow=True),
        f"{_HF}, tiktoken": Way("live_peer", "tiktoken", (*_DATASETS, "tiktoken"), True),
        f"{_HF}, transformers": Way("live_peer", "transformers", _TRANSFORMERS, True),
        f"{_HF}, tokenizers": Way("live_peer", "tokenizers", _DATASETS, True),
        f"{_HF} batched, tiktoken": Way("live_peer_batched", "tiktoken", (*_DATASETS, "tiktoken"), True),
        f"{_HF} batched, transformers": Way("live_peer_batched", "transformers", _TRANSFORMERS, True),
        f"{_HF} batched, tokenizers": Way("live_peer_batched", "tokenizers", _DATASETS, True),
    },
    "prepare": {
        "llmtrain prepare, fastest": Way("prepare_ours", FASTEST),
        "llmtrain prepare, tokenizers": Way("prepare_ours", "tokenizers", slow=True),
        "datasets.map, tiktoken": Way("prepare_peer", "tiktoken", (*_DATASETS, "tiktoken"), True),
        "datasets.map, transformers": Way("prepare_peer", "transformers", _TRANSFORMERS, True),
        "datasets.map, tokenizers": Way("prepare_peer", "tokenizers", _DATASETS, True),
    },
}
PAIRS = {
    "live": [
        ("llmtrain, tiktoken", f"{_HF}, tiktoken"),
        ("llmtrain, tokenizers", f"{_HF}, transformers"),
        ("llmtrain, tokenizers", f"{_HF}, tokenizers"),
        ("llmtrain, fastest", f"{_HF}, tokenizers"),
        ("llmtrain, tiktoken", f"{_HF} batched, tiktoken"),
        ("llmtrain, tokenizers", f"{_HF} batched, transformers"),
        ("llmtrain, tokenizers", f"{_HF} batched, tokenizers"),
        ("llmtrain, fastest", f"{_HF} batched, tokenizers"),
    ],
    "prepare": [
        ("llmtrain prepare, tokenizers", "datasets.map, transformers"),
        ("llmtrain prepare, tokenizers", "datasets.map, tokenizers"),
        ("llmtrain prepare, fastest", "datasets.map, transformers"),
        ("llmtrain prepare, fastest", "datasets.map, tokenizers"),
        ("llmtrain prepare, fastest", "datasets.map, tiktoken"),
    ],
}
"""What is compared with what."""


def compare_text(part: str, directory: Path, *, rounds: int, size: int) -> dict[str, Any]:
    """The ways of one part in interleaved rounds over the same jsonl files; `size`: bytes of text.

    {"ways": {name: medians, or missing, or error}, "ratios": {"a / b": ratio}}.
    """
    logger.info("%s: %d MB of text, %d rounds", part, size // 10**6, rounds)
    tokenizer = directory / "tokenizer" / "tokenizer.json"
    make_tokenizer(tokenizer)
    texts = {slow: directory / ("little" if slow else "much") for slow in (False, True)}
    for slow, where in texts.items():
        make_text(where, size // 4 if slow else size)
    tiny = directory / "tiny"
    make_text(tiny, TINY)
    with ExitStack() as stack:
        turns = {}
        for name, way in WAYS[part].items():
            station = stack.enter_context(Station(__name__, way.needs))
            arguments = way.function, way.backend, str(tokenizer), str(texts[way.slow]), str(tiny)
            turns[name] = partial(station.call, "measure", *arguments)
        found = interleaved(turns, rounds)
    ways: dict[str, Result] = {}
    for name, results in found.items():
        if isinstance(results, list):
            ways[name] = medians(results) | {"rounds": results}
        else:
            ways[name] = {"error" if isinstance(results, FailedError) else "missing": str(results)}
    return {"ways": ways, "ratios": _ratios(part, ways)}


def _ratios(part: str, ways: Mapping[str, Result]) -> dict[str, float]:
    """Speeds over speeds, of the pairs that were both measured."""
    key = "mtok_cpu_s"  # the same tokenizer everywhere: as good as bytes
    return {
        f"{a} / {b}": ways[a][key] / ways[b][key]
        for a, b in PAIRS[part]
        if key in ways.get(a, {}) and key in ways.get(b, {})
    }


def text_table(part: str, report: Mapping[str, Any]) -> str:
    """The ways as a Markdown table, and below it the ratios."""
    rows = []
    for name, way in report["ways"].items():
        if "missing" in way:
            rows.append([name, f"not installed: {way['missing']}", "-", "-", "-"])
        elif "error" in way:
            rows.append([name, f"failed: {way['error']}", "-", "-", "-"])
        else:
            numbers = (way["mb_cpu_s"], way["mtok_cpu_s"], way["mb_s"])
            rows.append([name, way["backend"], *map(number, numbers)])
    heading = {"live": "live text to packed rows", "prepare": "text to token files"}[part]
    table = markdown((heading, "backend", "MB a CPU-second", "Mtok a CPU-second", "MB/s"), rows)
    return "\n".join([table, "", *(f"{pair}: {ratio:.1f}" for pair, ratio in report["ratios"].items())])


# What is measured: called in a process of its own


def measure(function: str, backend: str, tokenizer: str, texts: str, tiny: str) -> Result:
    """One way over the texts; before that over a few, so that everything is imported and warm."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # before any library counts the cores
    for where in (tiny, texts):
        result: Result = globals()[function](backend, where, tokenizer)
    return result


# Ours


def live_ours(backend: str, texts: str, tokenizer: str) -> Result:
    """Parts are tokenised one after the other in this process, as a worker does it; then rows are read."""
    from llmtrain.data.dataset import PackedDataset
    from llmtrain.data.growing import GrowingShards, Preparation
    from llmtrain.data.shards import Header, ShardedSource
    from llmtrain.data.tokenizing import TRAIN, make

    ours = _our_tokenizer(backend, tokenizer)
    with _measured(texts) as (result, cache):
        data = _config(texts)
        header = Header(ours.fingerprint, ours.vocab_size, data.boundary)
        sources, tokens = {}, 0
        for name, source in data.sources.items():
            preparation = Preparation(name, source, data, header, cache)
            preparation.begin()
            for part in range(len(preparation.parts)):
                make(preparation.task(part), ours, lambda *_: None)
            preparation.finish()
            sources[name] = ShardedSource(GrowingShards(preparation, TRAIN))
            tokens += sources[name].tokens or 0
        dataset = PackedDataset(
            sources, WEIGHTS, seq_len=SEQ_LEN, global_batch_size=ROWS, seed=1, documents="separate",
            shuffle_span=data.shuffle_span,
        )  # fmt: skip
        for step in range(1, tokens // (ROWS * SEQ_LEN) + 1):
            dataset.rows(step, 0, ROWS)
        result |= {"tokens": tokens, "backend": ours.backend_name}
    return _per_second(result)


def prepare_ours(backend: str, texts: str, tokenizer: str) -> Result:
    """`prepare` itself, the start of its worker included."""
    from llmtrain.data.prepare import prepare

    ours = _our_tokenizer(backend, tokenizer)
    with _measured(texts) as (result, cache):
        prepared = prepare(_config(texts), ours, cache, workers=1)
        train, _ = prepared.open()
        result |= {
            "tokens": sum(source.tokens or 0 for source in train.values()),
            "backend": ours.backend_name,
        }
    return _per_second(result)


def _our_tokenizer(backend: str, path: str) -> Any:
    from llmtrain.tokenizer.huggingface import HuggingFaceTokenizer

    tokenizer = HuggingFaceTokenizer.from_path(Path(path), backend)
    if backend == FASTEST:
        tokenizer.choose_backend()
    return tokenizer


def _config(texts: str) -> DataConfig:
    """The sources, nothing held out, everything else as it comes in conf/data/base.yaml."""
    import yaml

    from llmtrain.config.hydra import config_directory

    base = yaml.safe_load((config_directory() / "data" / "base.yaml").read_text(encoding="utf-8"))
    sources = {
        name: SourceConfig(path=str(Path(texts) / f"{name}.jsonl"), weight=weight)
        for name, weight in WEIGHTS.items()
    }
    return DataConfig(**{**base, "sources": sources, "boundary": "eos", "validation_fraction": 0.0})


# The peer


def live_peer(backend: str, texts: str, tokenizer: str) -> Result:
    """interleave_datasets over streamed jsonl, a map that tokenises each document, cut into windows."""
    return _live_peer(backend, texts, tokenizer, {})


def live_peer_batched(backend: str, texts: str, tokenizer: str) -> Result:
    """The same with a map over BATCH documents at a time."""
    return _live_peer(backend, texts, tokenizer, {"batched": True, "batch_size": BATCH})


def _live_peer(backend: str, texts: str, tokenizer: str, batching: Mapping[str, Any]) -> Result:
    import datasets

    from llmtrain.benchmarks.peers import document_probabilities, packed

    encode = _peer_tokenizer(backend, tokenizer)
    probabilities = document_probabilities(_mean_lengths(texts))
    with _measured(texts) as (result, _):
        datasets.disable_progress_bars()
        parts = [_jsonl(texts, name, streaming=True) for name in WEIGHTS]
        mixed = datasets.interleave_datasets(
            parts, probabilities=probabilities, seed=1
        )  # until one is exhausted
        mapped = mixed.map(_mapped(encode, **batching), remove_columns=["text"], **batching)
        documents = (np.array(document["input_ids"], np.int32) for document in mapped)
        tokens = sum(inputs.numel() for inputs, _ in packed(documents, ROWS, SEQ_LEN))
        result |= {"tokens": tokens, "bytes": None, "backend": backend}
    return _per_second(result)


def prepare_peer(backend: str, texts: str, tokenizer: str) -> Result:
    """load_dataset of the jsonl files and a batched map that tokenises, one process; Arrow files result."""
    import datasets

    encode = _peer_tokenizer(backend, tokenizer)
    with _measured(texts) as (result, cache):
        datasets.disable_progress_bars()
        tokens = 0
        for name in WEIGHTS:
            loaded = _jsonl(texts, name, cache_dir=str(cache))
            mapped = loaded.map(
                _mapped(encode, batched=True), batched=True, batch_size=BATCH, remove_columns=["text"]
            )
            tokens += sum(
                len(ids) for chunk in mapped.data.column("input_ids").chunks for ids in [chunk.flatten()]
            )
        result |= {"tokens": tokens, "backend": backend}
    return _per_second(result)


def _jsonl(texts: str, name: str, **more: Any) -> Any:
    import datasets

    return datasets.load_dataset("json", data_files=str(Path(texts) / f"{name}.jsonl"), split="train", **more)


def _mapped(encode: Encode, batched: bool = False, **_: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    if batched:
        return lambda batch: {"input_ids": encode(batch["text"])}
    return lambda document: {"input_ids": encode([document["text"]])[0]}


def _mean_lengths(texts: str) -> dict[str, float]:
    """Bytes a document of each source, which is as good as tokens for probabilities."""
    means = {}
    for name in WEIGHTS:
        content = (Path(texts) / f"{name}.jsonl").read_bytes()
        means[name] = len(content) / content.count(b"\n")
    return means


def _peer_tokenizer(backend: str, path: str) -> Encode:
    """The library called as its manual says, with the end of text after each document.

    `transformers` is what the manual of `datasets` calls; `tokenizers` is the library below it, called bare.
    """
    document = json.loads(Path(path).read_text(encoding="utf-8"))
    end = next(token["id"] for token in document["added_tokens"] if token["content"] == END)
    if backend == "tiktoken":
        encode = _tiktoken(document, end).encode_ordinary_batch
        return lambda texts: [[*ids, end] for ids in encode(texts, num_threads=1)]
    if backend == "transformers":
        from transformers import PreTrainedTokenizerFast

        fast = PreTrainedTokenizerFast(tokenizer_file=path, eos_token=END)
        return lambda texts: [[*ids, end] for ids in fast(texts)["input_ids"]]
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(path)
    return lambda texts: [
        [*one.ids, end] for one in tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    ]


def _tiktoken(document: Mapping[str, Any], end: int) -> Any:
    """The same vocabulary for tiktoken: a token's rank is its id, in the order of make_tokenizer."""
    import tiktoken

    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]  # GPT-2's characters for bytes
    others = [byte for byte in range(256) if byte not in visible]
    bytes_of = {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}
    ranks = {
        bytes(bytes_of[character] for character in token): rank
        for token, rank in document["model"]["vocab"].items()
        if token != END
    }
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"
    return tiktoken.Encoding("bench", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END: end})


# Around each


@contextmanager
def _measured(texts: str) -> Iterator[tuple[Result, Path]]:
    """A cache directory, and on leaving the seconds that passed beside the bytes of text."""
    cache = Path(tempfile.mkdtemp(prefix="cache-", dir=Path(texts).parent))
    result: Result = {"bytes": _text_bytes(Path(texts))}
    try:
        begin = time.perf_counter()
        with cpu_seconds(result):
            yield result, cache
        result["seconds"] = time.perf_counter() - begin
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def _text_bytes(texts: Path) -> int:
    return int((texts / "bytes").read_text())


def _per_second(result: Result) -> Result:
    size = result.pop("bytes")
    rates: Result = {"mtok_cpu_s": result["tokens"] / result["cpu_s"] / 1e6, "mb_cpu_s": None, "mb_s": None}
    if size is not None:
        rates |= {"mb_cpu_s": size / result["cpu_s"] / 1e6, "mb_s": size / result["seconds"] / 1e6}
    return result | rates
