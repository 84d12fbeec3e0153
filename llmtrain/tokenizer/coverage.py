"""How a tokenizer fares on text: one that was made for another language spells it in bytes, or loses it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from llmtrain.tokenizer.base import Tokenizer
from llmtrain.tokenizer.raw_bytes import BytesTokenizer

REPLACEMENT = "\ufffd"

UNKNOWN = 0.01
"""Part of the characters that may be lost."""
IN_BYTES = 0.1
"""Part of the tokens that may be bytes: more, and the text is longer than it needs to be."""


@dataclass(frozen=True)
class Coverage:
    """Of a sample of text."""

    bytes: int
    tokens: int
    unknown: float
    """Part of the characters that ids do not give back."""
    in_bytes: float | None
    """Part of the tokens that are a piece of a character; None for a tokenizer of bytes."""

    @property
    def words(self) -> str:
        """The numbers as a phrase."""
        ratio = f"{self.bytes / max(1, self.tokens):.2f} bytes a token, {self.unknown:.2%} unknown"
        return ratio if self.in_bytes is None else f"{ratio}, {self.in_bytes:.1%} of the tokens bytes"

    @property
    def warnings(self) -> list[str]:
        """What is wrong with it."""
        found = []
        if self.unknown > UNKNOWN:
            found.append(f"{self.unknown:.1%} of the characters are unknown to the tokenizer and lost")
        if self.in_bytes is not None and self.in_bytes > IN_BYTES:
            found.append(f"{self.in_bytes:.0%} of the tokens are bytes: it was made for other text")
        return found


def coverage(tokenizer: Tokenizer, texts: Sequence[str]) -> Coverage:
    """Encode some texts and look at the ids and at what they give back."""
    encoded = [ids.tolist() for ids in tokenizer.encode_batch(texts)]
    given = Counter(character for text in texts for character in text)
    back = Counter(character for ids in encoded for character in tokenizer.decode(ids))
    counts = Counter(token for ids in encoded for token in ids)
    return Coverage(
        bytes=sum(len(text.encode()) for text in texts),
        tokens=counts.total(),
        unknown=(given - back).total() / max(1, given.total()),
        in_bytes=None if isinstance(tokenizer, BytesTokenizer) else _in_bytes(tokenizer, counts),
    )


def _in_bytes(tokenizer: Tokenizer, counts: Counter[int]) -> float:
    pieces = _pieces(tokenizer, counts)
    return sum(counts[token] for token in pieces) / max(1, counts.total())


def _pieces(tokenizer: Tokenizer, tokens: Iterable[int]) -> set[int]:
    """Those ids that alone are no text."""
    return {token for token in tokens if REPLACEMENT in tokenizer.decode([token])}
