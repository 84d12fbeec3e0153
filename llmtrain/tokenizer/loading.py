"""Reading back what a tokenizer saved."""

from __future__ import annotations

from pathlib import Path

from llmtrain.config import UserError
from llmtrain.tokenizer import huggingface, raw_bytes, sentencepiece
from llmtrain.tokenizer.base import Tokenizer, TokenizerConfig


def load_tokenizer(directory: Path, backend: str | None = None) -> Tokenizer:
    """The tokenizer whose `save` wrote into this directory; UserError where there is none.

    `backend` is the `backend_name` of the same tokenizer in another process, which is taken as it is.
    """
    if (directory / sentencepiece.FILE).is_file():
        return sentencepiece.SentencePieceTokenizer.from_file(directory / sentencepiece.FILE)
    if (directory / huggingface.FILE).is_file():
        return huggingface.HuggingFaceTokenizer.from_path(
            directory, backend or "auto", trusted=backend is not None
        )
    if (directory / raw_bytes.FILE).is_file():
        return raw_bytes.BytesTokenizer()
    names = ", ".join((sentencepiece.FILE, huggingface.FILE, raw_bytes.FILE))
    raise UserError(f"no tokenizer in {directory}: it holds none of {names}")


def vocab_size_of(config: TokenizerConfig) -> int:
    """Ids of a tokenizer, without text: of one that is yet to be trained, those that it is asked for."""
    if isinstance(config, sentencepiece.SentencePieceConfig) and config.path is None:
        return config.vocab_size
    return config.load().vocab_size
