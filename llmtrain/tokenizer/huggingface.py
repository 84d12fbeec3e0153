"""Hugging Face `tokenizer.json` files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tokenizers

from llmtrain.config import UserError
from llmtrain.tokenizer import backends
from llmtrain.tokenizer.base import Ids, TokenizerConfig, fingerprint, refuse_control_text

FILE = "tokenizer.json"
_SIDE_FILES = ("tokenizer_config.json", "special_tokens_map.json")
_COMMON = {
    "bos_token": ("<s>", "<|begin_of_text|>", "<bos>", "[BOS]", "<|startoftext|>", "<|endoftext|>"),
    "eos_token": ("</s>", "<|end_of_text|>", "<eos>", "[EOS]", "<|endoftext|>"),
}
_DETERMINES_IDS = ("added_tokens", "normalizer", "pre_tokenizer", "model")
_ADDS_IDS = ("post_processor", "truncation", "padding")
CHOOSE_AFTER = 2**20
"""Characters after which `auto` looks for the fastest backend: for less it does not pay."""


class HuggingFaceTokenizer:
    """A `tokenizer.json`: its own ids for text, and none that a template or special-token text would add.

    The backend that encodes changes no id (backends.py). `auto` chooses one when there is much to encode.
    """

    def __init__(
        self, files: dict[str, bytes], path: Path, backend: str = "auto", *, trusted: bool = False
    ) -> None:
        self._files = files
        document = _parse(files[FILE], path)
        names = {key: _special_name(files, key, document) for key in _COMMON}
        _mark_special(document, {name for name in names.values() if name})
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(json.dumps(document))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path} is not a tokenizer that `tokenizers` can read: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # "</s>" in a document is four characters, not an end
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(vocabulary.values()) + 1  # ids may have holes
        self.bos_id: int | None = vocabulary.get(names["bos_token"] or "")
        self.eos_id: int | None = vocabulary.get(names["eos_token"] or "")
        content = json.dumps({key: document.get(key) for key in _DETERMINES_IDS}, sort_keys=True)
        self.fingerprint: str = fingerprint(content.encode(), f"{self.bos_id} {self.eos_id}".encode())
        specials = [(t["content"], t["id"]) for t in document.get("added_tokens", []) if t["special"]]
        self._document = {**document, **dict.fromkeys(_ADDS_IDS)}
        self._choice = backends.Choice(backends.REFERENCE, self._encode_reference)
        self._characters: int | None = None
        refuse_control_text(self, specials, path)
        if backend == "auto":
            self._characters = 0  # encoded so far; None where there is nothing to choose any more
        elif trusted:
            self._choice = backends.trust(backend, self._encode_reference, self._document)
        else:
            self._choice = backends.require(backend, self._encode_reference, self._document)

    @classmethod
    def from_path(cls, path: Path, backend: str = "auto", *, trusted: bool = False) -> HuggingFaceTokenizer:
        """Read a `tokenizer.json`, or a directory with one, and the files beside it that name bos and eos.

        A backend that is `trusted` was chosen before for the same files: it is not checked again.
        """
        file = path / FILE if path.is_dir() else path
        try:
            files = {FILE: file.read_bytes()}
        except OSError as error:
            raise UserError(f"tokenizer.path={path} cannot be read: {file}: {error.strerror}") from error
        for name in _SIDE_FILES:
            if (file.parent / name).is_file():
                files[name] = (file.parent / name).read_bytes()
        return cls(files, file, backend, trusted=trusted)

    def encode_batch(self, texts: Sequence[str]) -> list[Ids]:
        """See Tokenizer."""
        if self._characters is not None:
            self._characters += sum(map(len, texts))
            if self._characters >= CHOOSE_AFTER:
                self.choose_backend(texts)
        return self._choice.encode(texts)

    def check(self, texts: Sequence[str], ids: Sequence[Ids]) -> None:
        """OtherIdsError unless `tokenizers` gives these texts these ids; it encodes itself from then on."""
        name = self._choice.name
        if name == backends.REFERENCE:
            return
        try:
            backends.check(texts, ids, self._encode_reference(texts))
        except backends.OtherIdsError as error:
            self._choice = backends.Choice(backends.REFERENCE, self._encode_reference)
            raise backends.OtherIdsError(f"{name} does not suit this tokenizer.json: {error}") from error

    @property
    def backend_name(self) -> str:
        """The library that encodes now."""
        return self._choice.name

    def choose_backend(self, documents: Sequence[str] = ()) -> str:
        """Choose now what `auto` would choose later, with some documents of the data at hand; its name.

        Other processes take it over by `load_tokenizer(directory, backend=name)`.
        """
        if self._characters is not None:
            self._characters = None
            self._choice = backends.choose(self._encode_reference, self._document, documents)
        return self._choice.name

    def _encode_reference(self, texts: Sequence[str]) -> list[Ids]:
        encoded = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(one.ids, np.int32) for one in encoded]

    def decode(self, ids: Sequence[int]) -> str:
        """See Tokenizer."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def save(self, directory: Path) -> None:
        """See Tokenizer."""
        directory.mkdir(parents=True, exist_ok=True)
        for name, content in self._files.items():
            (directory / name).write_bytes(content)


class HuggingFaceConfig(TokenizerConfig):
    """A Hugging Face tokenizer from disk."""

    kind: Literal["huggingface"]
    path: Path
    """A `tokenizer.json`, or a directory that holds one."""
    backend: backends.Backend = "auto"
    """The library that encodes; auto: the fastest of those installed whose ids are those of `tokenizers`."""

    def load(self) -> HuggingFaceTokenizer:
        """The tokenizer, ready for use."""
        return HuggingFaceTokenizer.from_path(self.path.expanduser(), self.backend)


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise UserError(f"{path} holds a {type(parsed).__name__}, not an object")
    return parsed


def _special_name(files: dict[str, bytes], key: str, document: dict[str, Any]) -> str | None:
    """Text of the bos or eos token: as a side file says, else a common name among the added tokens."""
    for name in _SIDE_FILES:
        side = _parse(files[name], Path(name)) if name in files else {}
        if key in side:
            value = side[key]
            return value["content"] if isinstance(value, dict) else value
    added = {token["content"] for token in document.get("added_tokens", [])}
    return next((common for common in _COMMON[key] if common in added), None)


def _mark_special(document: dict[str, Any], names: set[str]) -> None:
    """Mark bos and eos as special, whatever the file says: only special tokens can be switched off."""
    for token in document.get("added_tokens", []):
        if token["content"] in names:
            token["special"] = True
