"""The protocol that every tokenizer speaks, and the base of their configs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from llmtrain.config import Config, UserError

Ids = NDArray[np.int32]


@runtime_checkable
class Tokenizer(Protocol):
    """Text to ids and back, with no control ids but those that the caller adds himself.

    Text that looks like a special token ("</s>", "<|endoftext|>") is encoded as the characters it is: a
    corpus about language models would end its documents in the middle otherwise.
    """

    @property
    def bos_id(self) -> int | None:
        """Id that begins a document, or None where the tokenizer has none."""

    @property
    def eos_id(self) -> int | None:
        """Id that ends a document, or None where the tokenizer has none."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest id."""

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of everything that determines the ids: equal fingerprints give equal ids."""

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """The ids of each text, int32, without control ids; parallel inside."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids; control ids have none."""

    def save(self, directory: Path) -> None:
        """Write the tokenizer's own files into a directory; `load_tokenizer` reads them back."""


class TokenizerConfig(Config):
    """The base of every tokenizer's config; subclass it to bring your own (`_target_`)."""

    def load(self) -> Tokenizer:
        """The tokenizer, ready for use."""
        raise NotImplementedError


def fingerprint(*parts: bytes) -> str:
    """Hex sha256 of some byte strings, told apart by their lengths."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()


def refuse_control_text(tokenizer: Tokenizer, tokens: Iterable[tuple[str, int]], path: Path) -> None:
    """Raise if the text of a control token encodes to the control id itself.

    `tokens` holds (text, id) pairs. Some vocabularies (Unigram ones, for instance) reach their control
    tokens by plain matching, where no switch of the library helps.
    """
    for text, token in tokens:
        if token in tokenizer.encode_batch([text])[0]:
            raise UserError(
                f"tokenizer.path={path}: the plain text {text!r} becomes the control id {token}, so a"
                " document that holds it would be cut there; use one whose model holds no control tokens"
            )
