"""Texts on which tokenizers differ if they differ anywhere."""

# ruff: noqa: RUF001

from __future__ import annotations

import random
import re
import sysconfig
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

_SPECIALS = 64  # added tokens whose text is tried in several places


def hard_texts(document: dict[str, Any]) -> list[str]:
    """Some hundred texts, and one for every token of the vocabulary; the same for the same tokenizer.json."""
    return [
        *_FIXED,
        *_mixed(),
        *_unicode(),
        *_control_texts(document),
        *_vocabulary(document),
        *library(2**14),
    ]


_ENGLISH = (
    "The committee hadn't decided, they'd only agreed that it's late; we'll see what I'VE MISSED, won't we?",
    "In 1969, on July 20, about 650,000,000 people watched: 3.14159, $1,234.56, 50%, 10:45 a.m., 1st, x2y3.",
    "Naïve façade, coöperate, Ångström, Straße, İstanbul, ﬁne ligatures, e\u0301 and é, ½ ² ① Ⅷ ٣ ३.",
    "https://example.org/a_b-c?d=e&f=%20g#h  someone@example.org  C:\\Users\\name\\file.txt  /usr/lib/x86_64",
)
CHINESE = (
    "人工智能的发展离不开数据、算法与算力。2024年，研究人员发布了新的模型，参数量达到1000亿！",
    "「你好，世界」他说：“今天天气很好……我们去公园吧。”　全角空格　和标点（括号）《书名》，ＡＢＣ１２３。",
    "日本語のひらがなとカタカナ、한국어 문장, ภาษาไทย, हिन्दी में पाठ, العربية مع أرقام ١٢٣, עברית.",
)
_CODE = (
    'def f(x: int, *args, **kwargs) -> dict[str, Any]:\n    """Doc."""\n\treturn {k: v for k in x}\n',
    "for (int i = 0; i < n; ++i) {\r\n        a[i] += b[i] << 2;  // don't\r\n    }\r\n\r\n\r\n",
    "SELECT * FROM t WHERE a='it''s' AND b<>0x1F; -- <html><a href=\"#\">&nbsp;</a></html> $$x^2_{i}$$ \\n",
)
_FIXED = (
    "", " ", "  ", "\n", "\r\n", "\t", "\n\n\n   \n", " \n \n", "a", " a", "a ", "\u00a0", "\u3000x",
    "\ufeff", "\u200b\u200d\u2060", "\u2028\u2029\x85\x0b\x0c\x1c", "\x00\x01\x7f", "e\u0301\u0301\u0301",
    "\U0010ffff", "\ue000", "🎉🎉 👩\u200d👩\u200d👧 🇩🇪 👍🏽 ❤\ufe0f", "a" * 3000, "ab" * 1500,
    "漢" * 1000, "9" * 500, " " * 777 + "x", "\n" * 333, "\t" * 65, "-" * 400, "=" * 79 + "\n",
    "x" + " " * 40 + "y" + "\n" * 7 + "z", "'s 'S 'LL 're'VE\u2019s '\u017f", "İi\u0130 \u017f \u212a",
    "▁ ▁▁a Ġ Ċ", "<|endoftext|>", "</s>",
    "<s> </s> <unk> <pad> [CLS] [SEP] [MASK] <0x41> <|im_start|>user\n<|im_end|>",
    *_ENGLISH, *CHINESE, *_CODE, " ".join(_ENGLISH + CHINESE + _CODE),
)  # fmt: skip


def _mixed() -> Iterator[str]:
    """Fragments of all kinds against each other."""
    pieces = [piece for text in (*_ENGLISH, *CHINESE, *_CODE) for piece in re.findall(r"\s+|\S{1,9}", text)]
    pieces += [
        "  ",
        "\n\n",
        "\r\n",
        "\t\t",
        "\u00a0",
        "\u3000",
        "🎉",
        "1234567",
        "'ll",
        "...",
        "</s>",
        "\x00",
        "\u200d",
    ]
    draw = random.Random(1)
    for _ in range(150):
        yield "".join(draw.choices(pieces, k=draw.randint(2, 60)))


def _unicode() -> Iterator[str]:
    """Characters of everywhere, half surrogates excepted: they are no text."""
    draw = random.Random(2)
    limits = (0x80, 0x250, 0x800, 0x3100, 0xD800, 0x20000, 0x110000)
    for number in range(150):
        limit = limits[number % len(limits)]
        codes = [draw.randrange(limit) for _ in range(draw.randint(1, 60))]
        yield "".join(" " if 0xD800 <= code < 0xE000 else chr(code) for code in codes)


def _control_texts(document: dict[str, Any]) -> Iterator[str]:
    """The text of each added token, alone and among others."""
    tokens = [token["content"] for token in document.get("added_tokens", [])]
    for token in tokens[:_SPECIALS]:
        yield from (
            token,
            f"a{token}b",
            f" {token} {token}\n",
            f"{token[:-1]}{token}{token[1:]}",
            token.upper(),
        )
    yield "".join(tokens)


def _vocabulary(document: dict[str, Any]) -> Iterator[str]:
    """The text of every token, some on each line: a token that no merge reaches shows here."""
    vocabulary = document["model"].get("vocab", {})
    tokens = vocabulary if isinstance(vocabulary, dict) else [token for token, _ in vocabulary]
    texts = []
    for token in tokens:
        try:
            texts.append(token_bytes(token).decode())
        except KeyError:  # no byte-level vocabulary
            texts.append(token.replace("\u2581", " "))
        except UnicodeDecodeError:  # part of a character
            continue
    for start in range(0, len(texts), 32):
        yield "\n".join(texts[start : start + 32])


def library(size: int) -> Iterator[str]:
    """Code and prose that every Python has, in pieces of `size` characters."""
    for name in ("argparse.py", "typing.py", "this.py", "textwrap.py", "json/decoder.py", "html/entities.py"):
        file = Path(sysconfig.get_path("stdlib")) / name
        if file.is_file():
            text = file.read_text("utf-8")
            yield from (text[start : start + size] for start in range(0, len(text), size))


@lru_cache(1)
def byte_characters() -> dict[str, int]:
    """The character by which byte-level BPE writes each byte (GPT-2's table)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(visible)]
    table = {chr(byte): byte for byte in visible}
    return table | {chr(256 + number): byte for number, byte in enumerate(others)}


def token_bytes(token: str) -> bytes:
    """The bytes of a byte-level token; KeyError where it is none."""
    return bytes(byte_characters()[character] for character in token)
