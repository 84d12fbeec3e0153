"""Training a SentencePiece model that loses nothing."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import sentencepiece

from llmtrain.config import UserError

_LINE = 4096  # characters; SentencePiece skips sentences above 4192 bytes unless told otherwise

LOSSLESS: dict[str, Any] = {
    "model_type": "bpe",
    "byte_fallback": True,  # an unseen character becomes its UTF-8 bytes, never <unk>
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "allow_whitespace_only_pieces": True,  # indentation as one piece: a third fewer tokens on code
    "user_defined_symbols": ["\n", "\t"],
}
"""Settings under which decode(encode(x)) == x for code too: tabs, newlines, runs of spaces."""


def train_sentencepiece(texts: Iterable[str], vocab_size: int, output: Path) -> None:
    """Train a byte-fallback BPE model on some texts and write it to `output`.

    The same texts give the same bytes on every machine. UserError where the text is too small or the
    vocabulary too small for it (256 byte pieces and every character must fit).
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_lines(texts),
            model_writer=model,
            vocab_size=vocab_size,
            max_sentence_length=4 * _LINE,
            num_threads=16,  # a constant: the number is written into the model, so into its fingerprint
            minloglevel=2,
            **LOSSLESS,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2].strip() or str(error)
        raise UserError(f"tokenizer.vocab_size={vocab_size} does not suit this text: {reason}") from error
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(model.getvalue())


def _lines(texts: Iterable[str]) -> Iterator[str]:
    """Lines, cut where they are too long. Newlines are symbols of their own: no merge crosses them."""
    for text in texts:
        for line in text.split("\n"):
            for start in range(0, len(line), _LINE):
                yield line[start : start + _LINE]
