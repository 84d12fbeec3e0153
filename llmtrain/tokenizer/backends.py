"""Faster libraries for a tokenizer.json, each used only where its ids are those of `tokenizers`.

A backend is built from the same document and encodes what was made to be hard (hard_texts.py) and some of the
user's own documents; at the first difference it is out. The fastest of the others is taken. So the choice
changes the speed and nothing else: it is no part of a tokenizer's fingerprint.
"""

from __future__ import annotations

import importlib
import itertools
import json
import logging
import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from llmtrain.config import UserError
from llmtrain.tokenizer.base import Ids
from llmtrain.tokenizer.hard_texts import CHINESE, byte_characters, hard_texts, library, token_bytes

logger = logging.getLogger(__name__)

Backend = Literal["auto", "tokenizers", "tiktoken", "gigatoken", "fastokens"]
Encode = Callable[[Sequence[str]], list[Ids]]

REFERENCE = "tokenizers"
OWN_DOCUMENTS, OWN_CHARACTERS = 200, 2**20
"""The user's documents that take part in the choice, and all their characters."""
_DOCUMENT = 2**14  # characters of each
_TIMED_CHARACTERS = 2**16  # of the user's documents, to be taken for what is to come
_TIMED_SECONDS = 0.05
_BATCH = 16

# What ByteLevel splits by when it has no other expression before it.
_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class Choice(NamedTuple):
    """A backend that gives the ids of the reference."""

    name: str
    encode: Encode


class _UnsuitedError(Exception):
    """A backend that cannot do what the document says, or does not."""


class OtherIdsError(_UnsuitedError):
    """A backend whose ids are not those of the reference."""


def choose(reference: Encode, document: dict[str, Any], documents: Sequence[str] = ()) -> Choice:
    """The fastest installed backend with the ids of `reference`, which is that of `tokenizers`.

    `document` is the content of the tokenizer.json, `documents` are some of the user's own texts. Says in one
    line what was chosen, and in one more what was not and why.
    """
    installed = [name for name in _BUILD if _is_installed(name)]
    if not installed:
        logger.info("tokenizer: %s; faster ones come with pip install 'llmtrain[fast]'", REFERENCE)
        return Choice(REFERENCE, reference)
    texts = [*_own(documents), *hard_texts(document)]
    expected, timed = reference(texts), _timed(documents)
    speeds = {REFERENCE: _speed(reference, timed)}
    equal = {REFERENCE: reference}
    for name in installed:
        try:
            encode = _built(name, reference, document, texts, expected)
        except _UnsuitedError as error:
            logger.info("tokenizer: %s is not used: %s", name, error)
            continue
        equal[name], speeds[name] = encode, _speed(encode, timed)
    best = max(speeds, key=lambda name: speeds[name])
    others = ", ".join(f"{name} {speed:.3g}" for name, speed in speeds.items() if name != best)
    logger.info(
        "tokenizer: %s (%.3g MB/s a core, ids equal to %s on %d texts; %s)",
        best, speeds[best], REFERENCE, len(texts), others or "no other is equal",
    )  # fmt: skip
    return Choice(best, equal[best])


def require(name: str, reference: Encode, document: dict[str, Any], documents: Sequence[str] = ()) -> Choice:
    """The backend that the user names; UserError where it is not installed, or its ids are other ones."""
    if name == REFERENCE:
        return Choice(name, reference)
    if not _is_installed(name):
        raise UserError(
            f"tokenizer.backend={name} is not installed: pip install {name} (or 'llmtrain[fast]'),"
            " or choose auto"
        )
    texts = [*_own(documents), *hard_texts(document)]
    try:
        return Choice(name, _built(name, reference, document, texts, reference(texts)))
    except _UnsuitedError as error:
        raise UserError(
            f"tokenizer.backend={name} does not suit this tokenizer.json: {error}; choose auto"
        ) from error


def trust(name: str, reference: Encode, document: dict[str, Any]) -> Choice:
    """The backend that another process of this run chose; the reference where it cannot be had here."""
    try:
        if name != REFERENCE:
            return Choice(name, _guarded(name, reference, document))
    except (ImportError, _UnsuitedError) as error:
        logger.warning("tokenizer: %s cannot be used here, so %s is: %s", name, REFERENCE, error)
    return Choice(REFERENCE, reference)


def check(texts: Sequence[str], ids: Sequence[Ids], expected: Sequence[Ids]) -> None:
    """OtherIdsError with the first difference between a backend's ids and those of the reference."""
    for text, got, want in zip(texts, ids, expected, strict=True):
        if not np.array_equal(got, want):
            raise OtherIdsError(_difference(text, got, want))


def _is_installed(name: str) -> bool:
    try:
        importlib.import_module(name)
    except ImportError as error:
        logger.debug("tokenizer: %s: %s", name, error)
        return False
    return True


def _built(
    name: str, reference: Encode, document: dict[str, Any], texts: list[str], expected: list[Ids]
) -> Encode:
    """A backend that gave what is expected; _UnsuitedError with the first difference otherwise."""
    encode = _guarded(name, reference, document, forgiving=False)
    with _as_unsuited("fails on the sample"):
        found = encode(texts)
    check(texts, found, expected)
    return _guarded(name, reference, document)


def _difference(text: str, got: Ids, want: Ids) -> str:
    shared = min(len(got), len(want))
    unequal = np.flatnonzero(got[:shared] != want[:shared])
    first = int(unequal[0]) if len(unequal) else shared
    here = slice(first, first + 4)
    return (
        f"its ids differ from token {first} of {text[:80]!r}{'...' if len(text) > 80 else ''}:"
        f" {got[here].tolist()}, {REFERENCE} has {want[here].tolist()}"
    )


class _as_unsuited:  # noqa: N801
    """Turns whatever a library raises into _UnsuitedError; a panic in Rust is no Exception."""

    def __init__(self, what: str) -> None:
        self.what = what

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if error is not None and not isinstance(error, (KeyboardInterrupt, SystemExit, _UnsuitedError)):
            raise _UnsuitedError(f"{self.what}: {error!r}") from error


def _guarded(name: str, reference: Encode, document: dict[str, Any], forgiving: bool = True) -> Encode:
    """A backend that leaves the documents it may get wrong to the reference.

    Those are the ones that hold an added token which it does not know, and with `forgiving` the batches on
    which it fails.
    """
    with _as_unsuited("cannot be built"):
        encode, unknown = _BUILD[name](document)
    pattern = re.compile("|".join(map(re.escape, unknown)) or r"(?!)")

    def guarded(texts: Sequence[str]) -> list[Ids]:
        apart = [number for number, text in enumerate(texts) if pattern.search(text)] if unknown else []
        try:
            with _as_unsuited("fails"):
                ids = encode(texts)
        except _UnsuitedError:
            if not forgiving:
                raise
            return reference(texts)
        for number, right in zip(apart, reference([texts[i] for i in apart]) if apart else [], strict=True):
            ids[number] = right
        return ids

    return guarded


# The libraries. Preparation gives each core a process of its own, so they work on the calling thread.

_Built = tuple[Encode, list[str]]
"""The backend, and the texts of added tokens that it does not know."""


def _build_tiktoken(document: dict[str, Any]) -> _Built:
    """tiktoken, from the merges of a byte-level BPE: its ranks are numbers of merges, translated to ids."""
    import tiktoken

    model = document["model"]
    plain = not (
        model.get("dropout") or model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    )
    if (
        model.get("type", "BPE") != "BPE"
        or model.get("byte_fallback")
        or document.get("normalizer")
        or not plain
    ):
        raise _UnsuitedError("it is for byte-level BPE without a normalizer")
    pattern, vocabulary = _pattern(document["pre_tokenizer"]), model["vocab"]
    characters = sorted(byte_characters().items(), key=lambda item: item[1])
    ranks = {bytes([byte]): byte for _, byte in characters}
    ids = [vocabulary[character] for character, _ in characters]
    for merge in model["merges"]:
        token = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        if ranks.setdefault(token_bytes(token), len(ids)) == len(ids):
            ids.append(vocabulary[token])
    encoding = tiktoken.Encoding(
        "tokenizer.json",
        pat_str=pattern,
        mergeable_ranks=ranks,
        special_tokens={"<|none|>": len(ids)},  # never allowed; but tiktoken wants one
    )
    table = np.array(ids, np.int32)

    def encode(texts: Sequence[str]) -> list[Ids]:
        return [table[encoding.encode_to_numpy(text, disallowed_special=())] for text in texts]

    return encode, [token["content"] for token in document.get("added_tokens", []) if not token["special"]]


def _pattern(pre: dict[str, Any]) -> str:
    """The one expression by which a pre-tokenizer splits; _UnsuitedError where it is more than that."""
    match pre:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}:
            return _GPT2
        case {
            "type": "Sequence",
            "pretokenizers": [
                {
                    "type": "Split",
                    "pattern": {"Regex": str(pattern)},
                    "behavior": "Isolated",
                    "invert": False,
                },
                {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
            ],
        }:
            return pattern
    raise _UnsuitedError("its text is not split by one regular expression")


def _build_gigatoken(document: dict[str, Any]) -> _Built:
    """gigatoken; it has no switch for special tokens, so it never hears of them."""
    import gigatoken

    plain = [token for token in document.get("added_tokens", []) if not token["special"]]
    tokenizer = gigatoken.Tokenizer.from_json(json.dumps({**document, "added_tokens": plain}))
    return lambda texts: [tokenizer.encode(text).astype(np.int32) for text in texts], []


def _build_fastokens(document: dict[str, Any]) -> _Built:
    """fastokens; `split_special_tokens` is its switch."""
    import fastokens

    tokenizer = fastokens.Tokenizer.from_json_str(json.dumps(document))

    def encode(texts: Sequence[str]) -> list[Ids]:
        ids, ends = tokenizer.encode_batch_flat(
            list(texts), add_special_tokens=False, split_special_tokens=True
        )
        flat = np.frombuffer(ids, np.uint32).astype(np.int32)
        return np.split(flat, np.frombuffer(ends, np.uint64)[1:-1].astype(np.int64)) if len(texts) else []

    return encode, []


_BUILD: dict[str, Callable[[dict[str, Any]], _Built]] = {
    "tiktoken": _build_tiktoken,
    "gigatoken": _build_gigatoken,
    "fastokens": _build_fastokens,
}


def _own(documents: Sequence[str]) -> list[str]:
    chosen, room = [], OWN_CHARACTERS
    for text in documents[:OWN_DOCUMENTS]:
        chosen.append(text[: min(_DOCUMENT, room)])
        room -= len(chosen[-1])
        if not room:
            break
    return chosen


def _timed(documents: Sequence[str]) -> list[str]:
    """Texts like those that will come, or like those that often come."""
    own = _own(documents)
    return own if sum(map(len, own)) >= _TIMED_CHARACTERS else [*own, *library(_DOCUMENT), *CHINESE * 200]


def _speed(encode: Encode, texts: Sequence[str]) -> float:
    """MB of text a second of processor time, which is a core's however many threads there are."""
    encode(texts[:1])
    done, spent = 0, 0.0
    for start in itertools.cycle(range(0, len(texts), _BATCH)):
        batch = texts[start : start + _BATCH]
        before = time.process_time()
        encode(batch)
        spent += time.process_time() - before
        done += sum(len(text.encode()) for text in batch)
        if spent >= _TIMED_SECONDS:
            break
    return done / spent / 1e6
