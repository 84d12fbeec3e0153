"""Raw bytes as ids: no vocabulary to train, nothing to lose."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from llmtrain.tokenizer.base import Ids, TokenizerConfig, fingerprint

FILE = "tokenizer.bytes"
BOS, EOS = 256, 257
_DESCRIPTION = b'{"ids": "UTF-8 bytes 0 to 255", "bos": 256, "eos": 257}\n'


class BytesTokenizer:
    """The UTF-8 bytes of a text are its ids (0 to 255); 256 begins a document and 257 ends it."""

    bos_id: int | None = BOS
    eos_id: int | None = EOS
    vocab_size: int = 258

    @property
    def fingerprint(self) -> str:
        """Constant: there is only one way to do it."""
        return fingerprint(_DESCRIPTION)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer."""
        return [np.frombuffer(text.encode(), np.uint8).astype(np.int32) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer; bytes that are not UTF-8 (a cut character) become U+FFFD."""
        return bytes(int(i) for i in ids if i < BOS).decode(errors="replace")

    def save(self, directory: Path) -> None:
        """See Tokenizer."""
        directory.mkdir(parents=True, exist_ok=True)
        (directory / FILE).write_bytes(_DESCRIPTION)


class BytesConfig(TokenizerConfig):
    """Raw bytes."""

    kind: Literal["bytes"]

    def load(self) -> BytesTokenizer:
        """The tokenizer, ready for use."""
        return BytesTokenizer()
