"""Text to token shards, once: train or load the tokenizer, encode each source, keep both in the cache.

What lies in the cache depends on the text, the tokenizer, the boundary policy and the held-out fraction; not
on seed, weights or the number of ranks. Documents are counted on their way in and on their way out.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np

from llmtrain.config import UserError
from llmtrain.data import readers
from llmtrain.data.artefacts import artefact_key, make_once
from llmtrain.data.config import Boundary, DataConfig, SourceConfig
from llmtrain.data.progress import Progress, console_progress, work
from llmtrain.data.readers import Document, Input
from llmtrain.data.shards import INDEX, ShardedSource, ShardWriter
from llmtrain.tokenizer import SentencePieceConfig, Tokenizer, TokenizerConfig, load_tokenizer
from llmtrain.tokenizer.base import Ids
from llmtrain.tokenizer.training import LOSSLESS, train_sentencepiece

logger = logging.getLogger(__name__)

VERSION = 1
"""Part of every key: raise it when the same input would give other shards."""
SAMPLE_BYTES = 10_000_000
"""Text that a tokenizer is trained on: more makes it slower and hardly better at these sizes."""
SAMPLE_INPUTS = 64
"""Files a source is sampled from, evenly spaced."""
BATCH_BYTES = 1_000_000
"""Text encoded at a time: enough to keep every core busy."""
TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class PreparedSource:
    """Where a source's shards are."""

    train: Path
    validation: Path | None
    """None where no document is held out."""


@dataclass(frozen=True)
class Prepared:
    """The tokenizer and the shards of every source, by name."""

    tokenizer: Tokenizer
    sources: dict[str, PreparedSource]

    def open(self) -> tuple[dict[str, ShardedSource], dict[str, ShardedSource]]:
        """The training text of every source, and the held-out text of those that have some."""
        train = {name: ShardedSource.open(source.train) for name, source in self.sources.items()}
        held_out = {
            name: ShardedSource.open(source.validation)
            for name, source in self.sources.items()
            if source.validation is not None
        }
        return train, held_out

    @classmethod
    def from_dict(cls, tokenizer: Tokenizer, paths: Mapping[str, Mapping[str, str | None]]) -> Prepared:
        """The inverse of `as_dict`; whether the shards are still there is not looked at."""
        sources = {}
        for name, source in paths.items():
            train, validation = source[TRAIN], source[VALIDATION]
            assert train is not None
            sources[name] = PreparedSource(Path(train), Path(validation) if validation else None)
        return cls(tokenizer, sources)

    def is_there(self) -> bool:
        """Whether there are sources, and every directory of theirs."""
        paths = [path for source in self.sources.values() for path in (source.train, source.validation)]
        return bool(paths) and all(path is None or path.is_dir() for path in paths)

    def as_dict(self) -> dict[str, dict[str, str | None]]:
        """The absolute path of each source's shards, as JSON."""
        return {
            name: {
                TRAIN: str(source.train.resolve()),
                VALIDATION: str(source.validation.resolve()) if source.validation else None,
            }
            for name, source in self.sources.items()
        }


def prepare(
    data: DataConfig,
    tokenizer: TokenizerConfig | Tokenizer,
    cache_dir: Path,
    progress: Progress | None = None,
) -> Prepared:
    """Shards of every source and the tokenizer they were made with; quick where they exist already.

    Any process may call it at any time. UserError for text that cannot be read, a boundary policy that
    the tokenizer cannot serve, or prepared shards of another tokenizer.
    """
    progress = progress or console_progress()
    if isinstance(tokenizer, TokenizerConfig):
        tokenizer, _ = build_tokenizer(data, tokenizer, cache_dir)
    ready = tokenizer
    boundary_ids(data.boundary, ready)
    sources = {
        name: _prepare_source(name, source, data, ready, cache_dir, progress)
        for name, source in data.sources.items()
    }
    return Prepared(ready, sources)


def check_inputs(data: DataConfig) -> None:
    """Raise, before any work, if a source's files are not there or its keys do not suit them."""
    mistakes = []
    for name, source in data.sources.items():
        try:
            if readers.resolve_format(source) != "shards":
                readers.inputs(source)
        except UserError as error:
            mistakes += [f"data.sources.{name}.path={line}" for line in error.lines]
    if mistakes:
        raise UserError(*mistakes)


# The tokenizer


def build_tokenizer(
    data: DataConfig, config: TokenizerConfig, cache_dir: Path
) -> tuple[Tokenizer, Path | None]:
    """The tokenizer, and the directory in the cache where it is if it was trained there."""
    check_inputs(data)
    if not (isinstance(config, SentencePieceConfig) and config.path is None):
        return config.load(), None
    directory = train_tokenizer(data, config.vocab_size, cache_dir)
    return load_tokenizer(directory), directory


def train_tokenizer(data: DataConfig, vocab_size: int, cache_dir: Path) -> Path:
    """A SentencePiece model trained on the training documents, once; the directory it is in."""
    texts = _texts(data)
    prints = sorted(readers.input_fingerprint(source) for source in texts.values())
    key = artefact_key(VERSION, vocab_size, LOSSLESS, SAMPLE_BYTES, data.validation_fraction, prints)

    def build(directory: Path) -> None:
        logger.info("training a tokenizer of %d ids on at most %d MB", vocab_size, SAMPLE_BYTES // 10**6)
        sample = (document.text for document in sample_documents(data))
        train_sentencepiece(sample, vocab_size, directory / "tokenizer.model")

    return make_once(cache_dir.expanduser() / "tokenizers" / key, build, "tokenizer")


def _texts(data: DataConfig) -> dict[str, SourceConfig]:
    """The sources that are text; UserError where all are shards already."""
    texts = {n: s for n, s in data.sources.items() if readers.resolve_format(s) != "shards"}
    if not texts:
        raise UserError(
            "tokenizer.path is null, and every source is already made of tokens: give the tokenizer"
            " that the shards were prepared with"
        )
    return texts


def sample_documents(data: DataConfig) -> Iterator[Document]:
    """About SAMPLE_BYTES of training documents of all sources, each in proportion to its size on disk.

    Always the same documents, whatever the sources are called; a long one is cut.
    """
    texts = sorted(_texts(data).values(), key=readers.input_fingerprint)
    parts = [readers.inputs(source) for source in texts]
    sizes = [_size_of(part) for part in parts]
    known = [size for size in sizes if size is not None]
    typical = sum(known) // len(known) if known else SAMPLE_BYTES  # for a source whose size nobody knows
    guessed = [typical if size is None else size for size in sizes]
    for part, size in zip(parts, guessed, strict=True):
        share = SAMPLE_BYTES * size // max(1, sum(guessed))
        yield from _sample_inputs(part, share, data.validation_fraction)


def _size_of(part: list[Input]) -> int | None:
    sizes = [one.size for one in part]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _sample_inputs(part: list[Input], share: int, validation_fraction: float) -> Iterator[Document]:
    """The first training documents of evenly spaced inputs, together `share` bytes of text if there are."""
    chosen = part[:: -(-len(part) // SAMPLE_INPUTS)]
    left = share
    for number, one in enumerate(chosen):
        budget = left // (len(chosen) - number)  # what a short file leaves over goes to those after it
        for document in one.read():
            if budget <= 0:
                break
            if not is_held_out(document.text.encode(), validation_fraction):
                kept = document._replace(text=document.text[:budget])
                size = len(kept.text.encode())
                budget, left = budget - size, left - size
                yield kept


# Documents to ids


def is_held_out(text: bytes, fraction: float) -> bool:
    """Whether a document is in the validation split: by its content, so that duplicates stay together."""
    number = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return number < fraction * 2**64


def boundary_ids(boundary: str, tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Ids before and after each document; UserError where the tokenizer lacks one of them."""
    have = {"bos": tokenizer.bos_id, "eos": tokenizer.eos_id}
    for name, token in have.items():
        if name in boundary and token is None:
            possible = [policy for policy in get_args(Boundary) if _can_serve(policy, have)]
            raise UserError(
                f"data.boundary={boundary}: the tokenizer has no {name} id; set data.boundary to"
                f" {' or '.join(possible)}"
            )
    before, after = (
        [token] if name in boundary and token is not None else [] for name, token in have.items()
    )
    return before, after


def _can_serve(boundary: str, have: Mapping[str, int | None]) -> bool:
    return all(have[name] is not None for name in ("bos", "eos") if name in boundary)


class _Encoder:
    """Encodes documents into the two splits of a source and counts what becomes of each."""

    def __init__(self, data: DataConfig, tokenizer: Tokenizer, directory: Path) -> None:
        self._tokenizer, self._fraction = tokenizer, data.validation_fraction
        self._before, self._after = (
            np.array(ids, np.int32) for ids in boundary_ids(data.boundary, tokenizer)
        )
        self.writers = {
            split: ShardWriter(
                directory / split,
                tokenizer=tokenizer.fingerprint,
                vocab_size=tokenizer.vocab_size,
                boundary=data.boundary,
            )
            for split in (TRAIN, VALIDATION)
        }
        self.counts: Counter[str] = Counter()

    def add(self, batch: list[Document]) -> None:
        encoded = self._tokenizer.encode_batch([document.text for document in batch])
        for document, ids in zip(batch, encoded, strict=True):
            content = document.text.encode()
            self.counts["documents"] += 1
            self.counts["text_bytes"] += len(content)
            if len(ids):
                self._write(document, content, ids)
            else:
                self.counts["empty"] += 1
                self.counts["empty_text_bytes"] += len(content)

    def _write(self, document: Document, content: bytes, ids: Ids) -> None:
        split = VALIDATION if is_held_out(content, self._fraction) else TRAIN
        whole = np.concatenate([self._before, ids, self._after])
        self.counts["tokens"] += len(whole)
        self.writers[split].add(whole, len(content), document.file, document.row)

    def finish(self) -> dict[str, Any]:
        """Write both indexes, the conservation line in the first of them; return it."""
        validation = self.writers[VALIDATION].finish()
        line = {key: self.counts[key] for key in ("documents", "tokens", "text_bytes", "empty")}
        train = self.writers[TRAIN].finish(input=line)
        for key in ("documents", "tokens", "text_bytes"):
            lost = {
                "documents": self.counts["empty"],
                "text_bytes": self.counts["empty_text_bytes"],
                "tokens": 0,
            }
            assert line[key] == train[key] + validation[key] + lost[key], f"{key} were lost: {line}"
        return {**line, TRAIN: train, VALIDATION: validation}


def _prepare_source(
    name: str,
    source: SourceConfig,
    data: DataConfig,
    tokenizer: Tokenizer,
    cache_dir: Path,
    progress: Progress,
) -> PreparedSource:
    if readers.resolve_format(source) == "shards":
        return _already_prepared(name, source, data, tokenizer)
    key = artefact_key(
        VERSION,
        tokenizer.fingerprint,
        data.boundary,
        data.validation_fraction,
        readers.input_fingerprint(source),
    )
    directory = make_once(
        cache_dir.expanduser() / "shards" / key,
        lambda aside: _encode(name, source, data, tokenizer, aside, progress),
        f"source {name}",
    )
    held_out = directory / VALIDATION
    has_validation = ShardedSource.open(held_out).documents > 0
    return PreparedSource(directory / TRAIN, held_out if has_validation else None)


def _encode(
    name: str, source: SourceConfig, data: DataConfig, tokenizer: Tokenizer, aside: Path, progress: Progress
) -> None:
    parts = readers.inputs(source)
    encoder = _Encoder(data, tokenizer, aside)
    done = 0
    with work(progress, f"prepare {name}", _size_of(parts)):
        for one in parts:
            for batch in batches(one.read(), BATCH_BYTES):
                encoder.add(batch)
                counts = encoder.counts
                consumed = done + batch[-1].consumed
                progress.update(consumed, counts["documents"], counts["text_bytes"], counts["tokens"])
            done += one.size or 0
    line = encoder.finish()
    train, held_out = line[TRAIN], line[VALIDATION]
    if not train["documents"]:
        raise UserError(_nothing_to_train(name, source, line))
    logger.info(
        "prepared %s: %d documents = %d train + %d held out + %d empty; %d tokens = %d train + %d held out",
        name,
        line["documents"], train["documents"], held_out["documents"], line["empty"],
        line["tokens"], train["tokens"], held_out["tokens"],
    )  # fmt: skip


def _nothing_to_train(name: str, source: SourceConfig, line: Mapping[str, Any]) -> str:
    start = f"data.sources.{name} ({source.path}): of {line['documents']} documents"
    if held_out := line[VALIDATION]["documents"]:
        return f"{start} {held_out} are held out and none is left to train on: lower data.validation_fraction"
    return f"{start} none has any text"


def batches(documents: Iterable[Document], size: int) -> Iterator[list[Document]]:
    """Consecutive documents, in lists of about `size` characters of text."""
    batch: list[Document] = []
    held = 0
    for document in documents:
        batch.append(document)
        held += len(document.text)
        if held >= size:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _already_prepared(
    name: str, source: SourceConfig, data: DataConfig, tokenizer: Tokenizer
) -> PreparedSource:
    """A source that `llmtrain prepare` wrote elsewhere: the same tokenizer and boundary, or an error."""
    train = Path(source.path).expanduser()
    beside = train.resolve().parent / VALIDATION
    splits = [train, beside] if (beside / INDEX).is_file() and beside != train.resolve() else [train]
    for split in splits:
        index = ShardedSource.open(split).index
        asked = {"tokenizer": tokenizer.fingerprint, "boundary": data.boundary}
        for key, value in asked.items():
            if index[key] != value:
                raise UserError(
                    f"data.sources.{name}.path={split} was prepared with {key} {index[key]}, not {value}:"
                    f" set {'tokenizer' if key == 'tokenizer' else 'data.boundary'} to that, or prepare again"
                )
    return PreparedSource(train, beside if len(splits) > 1 else None)
