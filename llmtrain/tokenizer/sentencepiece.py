"""SentencePiece models: trained by us on the user's text (training.py), or brought along."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import sentencepiece
from pydantic import Field

from llmtrain.config import UserError
from llmtrain.distributed import usable_cores
from llmtrain.tokenizer.base import Ids, TokenizerConfig, fingerprint, refuse_control_text

FILE = "tokenizer.model"
_SPACE = "\u2581"  # what SentencePiece writes for a space inside its pieces, and reads back as one
_BYTES_OF_SPACE = [f"<0x{byte:02X}>" for byte in _SPACE.encode()]


class SentencePieceTokenizer:
    """A SentencePiece model; lossless on any text when trained by `train_sentencepiece`."""

    def __init__(self, model: bytes, path: Path) -> None:
        self._model = model
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except RuntimeError as error:
            raise UserError(f"tokenizer.path={path}: not a SentencePiece model: {error}") from error
        self._threads = usable_cores()
        self._literal_space = self._ids_of_literal_space()
        controls = [i for i in (self.bos_id, self.eos_id) if i is not None]
        refuse_control_text(self, [(self._processor.id_to_piece(i), i) for i in controls], path)

    @classmethod
    def from_file(cls, path: Path) -> SentencePieceTokenizer:
        """Read a `.model` file."""
        try:
            return cls(path.read_bytes(), path)
        except OSError as error:
            raise UserError(f"tokenizer.path={path} cannot be read: {error.strerror}") from error

    @property
    def bos_id(self) -> int | None:
        """See Tokenizer."""
        return _id_or_none(self._processor.bos_id())

    @property
    def eos_id(self) -> int | None:
        """See Tokenizer."""
        return _id_or_none(self._processor.eos_id())

    @property
    def vocab_size(self) -> int:
        """See Tokenizer."""
        return self._processor.vocab_size()

    @property
    def fingerprint(self) -> str:
        """See Tokenizer."""
        return fingerprint(self._model)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer."""
        encoded = self._processor.encode(list(texts), out_type=int, num_threads=self._threads)
        ids = [np.array(one, np.int32) for one in encoded]
        if self._literal_space:
            for i, text in enumerate(texts):
                if _SPACE in text:
                    ids[i] = self._encode_around_literal_space(text)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return self._processor.decode([int(i) for i in ids])

    def save(self, directory: Path) -> None:
        """See Tokenizer."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FILE).write_bytes(self._model)

    def _ids_of_literal_space(self) -> list[int]:
        """Byte pieces that spell U+2581, or none where the model cannot keep it from becoming a space.

        A model that puts a space before every text would put one between the parts too.
        """
        ids = [self._processor.piece_to_id(piece) for piece in _BYTES_OF_SPACE]
        has_bytes = all(self._processor.is_byte(i) for i in ids)
        adds_prefix = self._processor.encode("a", out_type=str)[0].startswith(_SPACE)
        return ids if has_bytes and not adds_prefix else []

    def _encode_around_literal_space(self, text: str) -> Ids:
        parts = self._processor.encode(text.split(_SPACE), out_type=int)
        ids = list(parts[0])
        for part in parts[1:]:
            ids += self._literal_space + part
        return np.array(ids, np.int32)


class SentencePieceConfig(TokenizerConfig):
    """A SentencePiece model from a file, or trained on the data where `path` is null."""

    kind: Literal["sentencepiece"]
    path: Path | None
    """A `.model` file; null trains one of `vocab_size` on the training documents."""
    vocab_size: Annotated[int, Field(ge=300, le=1_000_000)]
    """Ids of the model to train where `path` is null; a model from a file has the size it has."""

    def load(self) -> SentencePieceTokenizer:
        """The tokenizer of `path`; a null path must have been trained before."""
        if self.path is None:
            raise UserError("tokenizer.path is null: train a tokenizer first (llmtrain train_tokenizer)")
        return SentencePieceTokenizer.from_file(self.path.expanduser())


def _id_or_none(token: int) -> int | None:
    return token if token >= 0 else None
