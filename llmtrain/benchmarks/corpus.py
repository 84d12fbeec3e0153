"""What the benchmarks read: tokens and text made of what every Python brings along, at any size.

The documents are those of the embedded sources, so their lengths are real; they are repeated in new orders
until there are enough. A token stands for four bytes of text, as in most tokenizers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from llmtrain.data import readers
from llmtrain.data.config import SourceConfig
from llmtrain.data.records import Document

WEIGHTS = {"code": 0.5, "docstrings": 0.3, "prose": 0.2}
"""The sources and their shares of the stream."""
VOCABULARY = 50_000
TOKEN_BYTES = 4
LONGEST = 1 << 30
END = "<|endoftext|>"


@dataclass(frozen=True)
class TokenFiles:
    """A directory with <source>.bin (uint16) and <source>.offsets.npy (int64 [documents + 1]) a source."""

    directory: Path
    seq_len: int
    """Tokens a window, without the one that is only a label."""

    def tokens(self, source: str) -> NDArray[np.uint16]:
        """All tokens of a source, mapped."""
        return np.memmap(self.directory / f"{source}.bin", np.uint16, "r")

    def offsets(self, source: str) -> NDArray[np.int64]:
        """Where its documents begin, and where the last one ends."""
        return np.load(self.directory / f"{source}.offsets.npy")


def make_tokens(directory: Path, seq_len: int, tokens: int) -> TokenFiles:
    """At least so many tokens of each source, in documents of real lengths."""
    directory.mkdir(parents=True)
    for number, name in enumerate(WEIGHTS):
        encoded = [_ids(text) for text in _texts(name)]
        order = _repeated([len(ids) for ids in encoded], tokens, np.random.default_rng(number))
        _write(directory, name, np.concatenate([encoded[i] for i in order]), [len(encoded[i]) for i in order])
    return TokenFiles(directory, seq_len)


def make_marked(directory: Path, seq_len: int, windows: int, like: int) -> TokenFiles:
    """Files for `windows` windows of the mixture in which every token is the number of its source.

    The documents are as long, in windows, as real ones are for windows of `like` tokens. What a loader gives
    tells by itself where it is from.
    """
    directory.mkdir(parents=True)
    for number, (name, weight) in enumerate(WEIGHTS.items()):
        scale = TOKEN_BYTES * like / seq_len
        lengths = [max(1, round(len(text.encode()) / scale)) for text in _texts(name)]
        tokens = int(1.2 * weight * windows + 64) * (seq_len + 1)
        order = _repeated(lengths, tokens, np.random.default_rng(number))
        chosen = np.array(lengths)[order]
        _write(directory, name, np.full(chosen.sum(), number, np.uint16), chosen)
    return TokenFiles(directory, seq_len)


def make_text(directory: Path, size: int) -> dict[str, Path]:
    """A jsonl file for each source, together of about `size` bytes of text in the shares of the mixture.

    `bytes` beside them says how much it is.
    """
    directory.mkdir(parents=True)
    files = {name: directory / f"{name}.jsonl" for name in WEIGHTS}
    there = 0
    for number, (name, path) in enumerate(files.items()):
        texts = _texts(name)
        enough = int(size * WEIGHTS[name])
        order = _repeated([len(text.encode()) for text in texts], enough, np.random.default_rng(number))
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"text": texts[i]}, ensure_ascii=False) + "\n" for i in order)
        there += sum(len(texts[i].encode()) for i in order)
    (directory / "bytes").write_text(str(there))
    return files


def make_tokenizer(path: Path, vocab_size: int = 32_000) -> None:
    """A byte-level BPE tokenizer.json, trained on the text of all sources: the kind that most models have."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator((text for name in WEIGHTS for text in _texts(name)), trainer)
    tokenizer.add_special_tokens([END])
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


@lru_cache
def _texts(name: str) -> Sequence[str]:
    source = SourceConfig(path=name, format="embedded", weight=1)
    slices = [piece for part in readers.parts(source) for piece in part.slices]
    records = (record for piece in slices for record in readers.read(source, piece, LONGEST))
    return [record.text for record in records if isinstance(record, Document)]


def _ids(text: str) -> NDArray[np.uint16]:
    content = text.encode()
    padded = content + bytes(-len(content) % TOKEN_BYTES)
    return (np.frombuffer(padded, np.uint32) % VOCABULARY).astype(np.uint16)


def _repeated(lengths: Sequence[int], enough: int, random: np.random.Generator) -> NDArray[np.int64]:
    """Numbers of documents in random orders, one pass after the other, until their lengths are enough."""
    each = np.array(lengths)
    passes = -(-enough // int(each.sum()))
    order = np.concatenate([random.permutation(len(each)) for _ in range(passes)])
    return order[: int(each[order].cumsum().searchsorted(enough)) + 1]


def _write(
    directory: Path, name: str, tokens: NDArray[np.uint16], lengths: Sequence[int] | NDArray[np.int64]
) -> None:
    tokens.tofile(directory / f"{name}.bin")
    np.save(directory / f"{name}.offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
