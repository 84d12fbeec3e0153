"""What a user says about data: the sources, their shares, and how documents are laid out."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, model_validator

from llmtrain.config import Config

Format = Literal["auto", "jsonl", "parquet", "text", "huggingface", "embedded", "shards"]
Boundary = Literal["bos_eos", "eos", "bos", "none"]

EMBEDDED = ("code", "docstrings", "prose")
_MEANINGFUL_FOR: dict[str, tuple[str, ...]] = {
    "text_key": ("jsonl", "parquet", "huggingface"),
    "split": ("huggingface",),
    "subset": ("huggingface",),
    "revision": ("huggingface",),
}


class SourceConfig(Config):
    """One source of text and its share of the training stream."""

    path: str
    """A file, a glob, a directory, a Hugging Face dataset, or (embedded) one of code, docstrings, prose."""
    format: Format = "auto"
    """`auto` tells by the file's suffix; a directory that `llmtrain prepare` wrote is `shards`."""
    weight: Annotated[float, Field(gt=0)] | None = None
    """Share of the tokens of the final stream, relative to the other sources' weights."""
    epochs: Annotated[float, Field(gt=0)] | None = None
    """Passes over this source, instead of a weight: the weights then follow from the sources' sizes."""
    text_key: str = "text"
    """Field or column that holds the text (jsonl, parquet, huggingface)."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    revision: str | None = None
    """Git revision of a dataset on the Hugging Face Hub."""

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if (self.weight is None) == (self.epochs is None):
            raise ValueError("give weight (share of the final stream) or epochs (passes over the source)")
        if self.format == "embedded" and self.path not in EMBEDDED:
            raise ValueError(f"path is {self.path!r}; an embedded source is one of {', '.join(EMBEDDED)}")
        if self.format != "auto" and (unused := self.keys_without_meaning(self.format)):
            raise ValueError(f"{unused[0]} means nothing for format={self.format}; leave it out")
        return self

    def keys_without_meaning(self, format_: str) -> list[str]:
        """Keys that were set and that a source of this format would not look at."""
        fields = type(self).model_fields
        return [
            key
            for key, formats in _MEANINGFUL_FOR.items()
            if format_ not in formats and getattr(self, key) != fields[key].default
        ]


class DataConfig(Config):
    """The sources, how they are mixed, and how their documents become windows."""

    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    """Sources by name; the name is the key under which each is reported."""
    documents: Literal["separate", "attend"]
    """separate: attention, positions and targets stay within a document; attend: a window is one text."""
    boundary: Boundary
    """Control ids around each document."""
    shuffle_span: Annotated[int, Field(ge=1)]
    """Windows within which the order of a source is permuted; 1 keeps the order of the files."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)]
    """Part of the documents held out of training, chosen by the hash of their text."""

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for name in self.sources:
            if not re.fullmatch(r"[\w.-]+", name):
                raise ValueError(f"sources.{name}: a name is made of letters, digits and _ . -")
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            other = next(name for name in self.sources if name not in weighted)
            raise ValueError(f"sources.{weighted[0]} has weight, sources.{other} epochs: use one for all")
        return self
