"""A Hugging Face directory as the beginning of a run: its shape, and its weights one parameter at a time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llmtrain.config import UserError
from llmtrain.importing import quiet_libraries
from llmtrain.model.decoder import Decoder, DecoderConfig
from llmtrain.model.huggingface.families import Family, family_of
from llmtrain.model.huggingface.keys import READABLE, shape_of, window_of
from llmtrain.model.huggingface.rows import rows_of_parts, ungrouped
from llmtrain.model.huggingface.stored import DTYPES, Reader, Stored, read_json, some, stored_in
from llmtrain.model.init import VOCABULARY, Gather

MAX_UNUSED_ROWS = 0.01
"""Rows of the vocabulary without an id, as a share: tables are often padded to a round size."""
HEAD = "lm_head.weight"
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
        keys = read_json(path / "config.json")
        if keys.get("model_type") not in READABLE:
            raise UserError(
                f"{path}/config.json: model_type={keys.get('model_type')}: none of {', '.join(READABLE)}"
            )
        if keys.get("quantization_config") is not None:
            raise UserError(
                f"{path}/config.json: quantization_config: the weights are quantized; take the model they "
                "were made of"
            )
        theirs = _read_config(path)
        try:
            return cls(path, shape_of(theirs), theirs.vocab_size, window_of(theirs))
        except (ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            raise _mistake(path, error) from error

    def check(self, vocab_size: int) -> None:
        """UserError where a tokenizer of `vocab_size` ids is not this model's."""
        missing, unused = vocab_size - self.vocab_size, self.vocab_size - vocab_size
        if missing > 0 or unused > MAX_UNUSED_ROWS * self.vocab_size:
            raise UserError(
                f"{self.path}: its vocabulary has vocab_size={self.vocab_size}, the tokenizer {vocab_size} "
                f"ids: take the model's own, tokenizer=huggingface tokenizer.path={self.path}"
            )

    def check_weights(self, config: DecoderConfig) -> None:
        """UserError unless the files hold the weights of such a decoder, and no others.

        Names, shapes and dtypes are read, and no values, but for a head beside an embedding that is tied.
        """
        self._weights(config)

    @torch.no_grad()
    def initialize(self, decoder: Decoder, gather: Gather) -> None:
        """Write every parameter of `decoder`, each read when it is its turn.

        `gather(parameter)` is entered around each write, see `initialize_parameters`. Rows of the vocabulary
        beyond the decoder's are left out, those of padding are 0.
        """
        self.check(decoder.vocab_size)
        weights = self._weights(decoder.config)
        for name, parameter in decoder.named_parameters():
            value = weights[name]
            with gather(parameter):
                if name in VOCABULARY:
                    parameter.zero_()
                    parameter[: decoder.vocab_size].copy_(value[: decoder.vocab_size])
                else:
                    parameter.copy_(value)

    def _weights(self, config: DecoderConfig) -> Weights:
        weights = Weights(self.path, config, self.vocab_size)
        weights.check()
        return weights


class Weights:
    """The weights of a directory by our names, in the dtype they have there, read at each access."""

    def __init__(self, path: Path, config: DecoderConfig, vocab_size: int) -> None:
        self.path, self.config, self.family = path, config, family_of(config)
        self.shapes = _shapes(self.family, config, vocab_size)
        """{their name: the shape that config.json says}"""
        self.stored = _with_prefix(stored_in(path), self.family)
        """By their names."""
        self._reader = Reader()

    def check(self) -> None:
        """UserError unless the directory holds the weights of its config.json and no others."""
        if missing := self.shapes.keys() - self.stored.keys():
            raise UserError(f"{self.path}: the weights hold no {some(missing)}")
        more = {name for name in self.stored.keys() - self.shapes.keys() if not name.endswith(NO_WEIGHTS)}
        if self.config.tie_embeddings:
            more -= {HEAD}
        if more:
            raise UserError(
                f"{self.path}: the weights hold {some(more)}, "
                f"which a {self.family.name} with its config.json does not have"
            )
        for name, shape in self.shapes.items():
            self._check_stored(name, shape)
        if self.config.tie_embeddings:
            self._check_tied()

    def __getitem__(self, name: str) -> Tensor:
        parts = [self._read(theirs) for theirs in self.family.theirs(name)]
        value = parts[0] if len(parts) == 1 else torch.cat(parts)
        if self.family.grouped_qkv and ".attention.qkv." in name:
            return ungrouped(value, self.config.n_heads, self.config.n_kv_heads)
        return value

    def _read(self, theirs: str) -> Tensor:
        return self._reader.read(self.stored[theirs])

    def _check_stored(self, name: str, shape: tuple[int, ...]) -> None:
        found = self.stored[name]
        if found.shape != shape:
            raise UserError(
                f"{self.path}: {name} has the shape {[*found.shape]}, its config.json says {[*shape]}"
            )
        if found.dtype not in DTYPES.values():
            raise UserError(
                f"{self.path}: {name} is stored as {found.dtype}, which is quantized; take the model it "
                f"was made of, whose weights are {', '.join(DTYPES.values())}"
            )

    def _check_tied(self) -> None:
        """A head may be stored beside the embedding that it is, as some tools do."""
        [embedding] = self.family.theirs("embedding.weight")
        if HEAD not in self.stored:
            return
        alike = self.stored[HEAD].dtype == self.stored[embedding].dtype
        if not (alike and torch.equal(self._read(HEAD), self._read(embedding))):
            raise UserError(
                f"{self.path}: {HEAD} is not {embedding}, although config.json says "
                "tie_word_embeddings=true; set it to false there if the head is the model's own"
            )


def _read_config(path: Path) -> Any:
    from transformers import AutoConfig

    try:
        with quiet_libraries():
            return AutoConfig.from_pretrained(path, local_files_only=True)
    except Exception as error:  # its checks raise what each library behind them has for it
        raise _mistake(path, error) from error


def _mistake(path: Path, error: Exception) -> UserError:
    reason = "a size in it is 0" if isinstance(error, ZeroDivisionError) else error
    return UserError(f"{path}/config.json: {reason}")


def _shapes(family: Family, config: DecoderConfig, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """{their name: shape} of all that such a model has."""
    with torch.device("meta"):
        decoder = config.assemble(vocab_size=vocab_size, seq_len=1)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in decoder.named_parameters():
        rows, *width = parameter.shape
        theirs = family.theirs(name)
        parts = rows_of_parts(name, config) if len(theirs) > 1 else [rows]
        if name in VOCABULARY:
            parts = [vocab_size]
        shapes |= {key: (part, *width) for key, part in zip(theirs, parts, strict=True)}
    return shapes


def _with_prefix(stored: Mapping[str, Stored], family: Family) -> dict[str, Stored]:
    """The same by full names: BLOOM's are stored without the prefix of the model around the blocks."""
    prefix = family.names["embedding"].partition(".")[0] + "."
    whole = (prefix, family.names["head"])
    return {name if name.startswith(whole) else prefix + name: value for name, value in stored.items()}
