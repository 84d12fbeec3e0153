"""A Hugging Face directory as the beginning of a run: its shape, and its weights one parameter at a time."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.config import UserError
from llmtrain.model.decoder import Decoder, DecoderConfig
from llmtrain.model.huggingface.families import Family, family_of
from llmtrain.model.huggingface.keys import READABLE, shape_of, window_of
from llmtrain.model.huggingface.rows import ungrouped
from llmtrain.model.init import VOCABULARY, Gather

SAFETENSORS, PICKLED = "model.safetensors", "pytorch_model.bin"
MAX_UNUSED_ROWS = 0.01
"""Rows of the vocabulary without an id, as a share: tables are often padded to a round size."""
NO_WEIGHTS = (".inv_freq", ".masked_bias", ".attn.bias")
"""Tables that older versions of transformers stored beside the weights."""


@dataclass(frozen=True)
class Pretrained:
    """A directory with a config.json and weights. Opening it reads the config only."""

    path: Path
    shape: Mapping[str, Any]
    """The keys of a DecoderConfig, all but `attention`."""
    vocab_size: int
    """Rows of the vocabulary's tables there."""
    window: int | None
    """How far back a token sees; None where it sees everything."""

    @classmethod
    def open(cls, path: Path) -> Pretrained:
        """UserError where `path` holds no config.json, or one that this decoder cannot be."""
        keys = _read_json(path / "config.json")
        if keys.get("model_type") not in READABLE:
            raise UserError(
                f"{path}/config.json: model_type={keys.get('model_type')}: none of {', '.join(READABLE)}"
            )
        from transformers import AutoConfig

        try:
            theirs = AutoConfig.from_pretrained(path, local_files_only=True)
            return cls(path, shape_of(theirs), theirs.vocab_size, window_of(theirs))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}/config.json: {error}") from error

    def check(self, vocab_size: int) -> None:
        """UserError where a tokenizer of `vocab_size` ids is not this model's."""
        missing, unused = vocab_size - self.vocab_size, self.vocab_size - vocab_size
        if missing > 0 or unused > MAX_UNUSED_ROWS * self.vocab_size:
            raise UserError(
                f"{self.path}: its vocabulary has vocab_size={self.vocab_size}, the tokenizer {vocab_size} "
                f"ids: take the model's own, tokenizer=huggingface tokenizer.path={self.path}"
            )

    @torch.no_grad()
    def initialize(self, decoder: Decoder, gather: Gather) -> None:
        """Write every parameter of `decoder`, each read when it is its turn.

        `gather(parameter)` is entered around each write, see `initialize_parameters`. Rows of the vocabulary
        beyond the decoder's are left out, those of padding are 0.
        """
        self.check(decoder.vocab_size)
        weights = Weights(self.path, decoder.config)
        weights.check([name for name, _ in decoder.named_parameters()])
        for name, parameter in decoder.named_parameters():
            value = weights[name]
            with gather(parameter):
                if name in VOCABULARY:
                    parameter.zero_()
                    parameter[: decoder.vocab_size].copy_(value[: decoder.vocab_size])
                elif parameter.shape == value.shape:
                    parameter.copy_(value)
                else:
                    raise UserError(
                        f"{self.path}: {name} has the shape {list(value.shape)}, "
                        f"its config.json says {list(parameter.shape)}"
                    )


class Weights:
    """The weights of a directory by our names, in the dtype they have there, read at each access."""

    def __init__(self, path: Path, config: DecoderConfig) -> None:
        self.path, self.config, self.family = path, config, family_of(config)
        self.files = _with_prefix(_files(path), self.family)
        """{their name: (file, the name in it)}"""
        self._pickled: tuple[Path, dict[str, Tensor]] | None = None

    def check(self, names: Iterable[str]) -> None:
        """UserError unless the directory holds these parameters and no other weights."""
        needed = {theirs for name in names for theirs in self.family.theirs(name)}
        if missing := needed - self.files.keys():
            raise UserError(f"{self.path}: the weights hold no {_some(missing)}")
        more = {name for name in self.files.keys() - needed if not name.endswith(NO_WEIGHTS)}
        more -= {"lm_head.weight"} if self.config.tie_embeddings else set()
        if more:
            raise UserError(
                f"{self.path}: the weights hold {_some(more)}, "
                f"which a {self.family.name} with its config.json does not have"
            )

    def __getitem__(self, name: str) -> Tensor:
        parts = [self._read(*self.files[theirs]) for theirs in self.family.theirs(name)]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.family.grouped_qkv and ".attention.qkv." in name:
            return ungrouped(value, self.config.n_heads, self.config.n_kv_heads)
        return value

    def _read(self, file: Path, name: str) -> Tensor:
        if file.suffix == ".bin":
            if self._pickled is None or self._pickled[0] != file:
                self._pickled = file, _load_pickled(file)
            return self._pickled[1][name]
        from safetensors import safe_open

        with safe_open(file, framework="pt") as tensors:
            return tensors.get_tensor(name)


def _files(path: Path) -> dict[str, Path]:
    """{name: file}: an index first, then a single file; safetensors before pickled weights."""
    for name in (SAFETENSORS, PICKLED):
        index = path / f"{name}.index.json"
        if index.is_file():
            files = {key: path / file for key, file in _read_json(index)["weight_map"].items()}
            if gone := {file.name for file in {*files.values()} if not file.is_file()}:
                raise UserError(f"{index} names {_some(gone)}, not there: the download is not complete")
            return files
        if (path / name).is_file():
            return dict.fromkeys(_names(path / name), path / name)
    raise UserError(f"{path}: no weights: neither {SAFETENSORS} nor {PICKLED}, nor an index of many files")


def _with_prefix(files: Mapping[str, Path], family: Family) -> dict[str, tuple[Path, str]]:
    """The same by full names: BLOOM's are stored without the prefix of the model around the blocks."""
    prefix = family.names["embedding"].partition(".")[0] + "."
    whole = (prefix, family.names["head"])
    return {name if name.startswith(whole) else prefix + name: (file, name) for name, file in files.items()}


def _names(file: Path) -> Iterator[str]:
    if file.suffix == ".bin":
        yield from _load_pickled(file)
        return
    from safetensors import safe_open

    with safe_open(file, framework="pt") as tensors:
        yield from tensors.keys()


def _load_pickled(file: Path) -> dict[str, Tensor]:
    """Read as data only; mapped, where the file's format allows it."""
    return torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text())
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror}; a directory as Hugging Face writes it is needed"
        ) from error
    except ValueError as error:
        raise UserError(f"{file}: not JSON: {error}") from error


def _some(names: set[str]) -> str:
    first = sorted(names)[:3]
    return ", ".join(first) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
