"""What a user says about data: the sources, their shares, and how documents become windows."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from llmtrain.config import Config, choice
from llmtrain.config.errors import did_you_mean

Format = Literal[
    "auto", "jsonl", "json", "parquet", "text", "huggingface", "embedded", "shards", "megatron", "nanogpt"
]
Boundary = Literal["bos_eos", "eos", "bos", "none"]
Documents = Literal["separate", "attend"]
Packing = Literal["cut", "best_fit"]
BadRecords = Literal["quarantine", "skip", "raise"]

LONGEST_NAME = 200
"""Bytes of a source's name: file systems allow 255."""
MAX_PADDING = 0.01
"""As it comes in conf/."""
EMBEDDED = ("code", "docstrings", "prose")
_WITH_FIELDS = ("jsonl", "json", "parquet", "huggingface")
_MEANINGFUL_FOR: dict[str, tuple[str, ...]] = {
    "text_key": _WITH_FIELDS,
    "template": _WITH_FIELDS,
    "split": ("huggingface",),
    "subset": ("huggingface",),
    "revision": ("huggingface",),
}
_FIELD = re.compile(r"\{([^{}]*)\}")
_BRACES = re.compile(r"\{\{|\}\}")

Count = Annotated[int, Field(ge=1)]
Weight = Annotated[float, Field(gt=0)]


class SourceConfig(Config):
    """One source of text and its share of the training stream."""

    path: str | None = None
    """A file, a glob, a directory or an fsspec URL of these, a Hugging Face dataset, or (embedded) one of
    code, docstrings, prose. None where only `tokens` is known: such a source can be planned with."""
    format: Format = "auto"
    """`auto` tells by the file's suffix; a directory that `llmtrain prepare` wrote is `shards`."""
    weight: Annotated[float, Field(ge=0)] | None = None
    """Share of the tokens of the final stream, relative to the other sources' weights."""
    epochs: Weight | None = None
    """Passes over this source, instead of a weight: the weights then follow from the sources' sizes."""
    text_key: str = "text"
    """Field or column that holds the text (jsonl, json, parquet, huggingface)."""
    template: str | None = None
    """A text of several fields, "{title}\\n{content}", instead of `text_key`; braces of text are doubled."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    subset: str | None = None
    """Configuration name of a Hugging Face dataset."""
    revision: str | None = None
    """Git revision of a dataset on the Hugging Face Hub."""
    tokens: Count | None = None
    """The source's size where `path` is None: `llmtrain plan` counts with it, nothing else can."""

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        if (self.weight is None) == (self.epochs is None):
            raise ValueError("give weight (share of the final stream) or epochs (passes over the source)")
        if (self.path is None) == (self.tokens is None):
            raise ValueError("give path (where the text is), or tokens alone (a size to plan with)")
        if self.format == "embedded" and self.path not in EMBEDDED:
            raise ValueError(f"path is {self.path!r}; an embedded source is one of {', '.join(EMBEDDED)}")
        if self.format != "auto" and (unused := self.keys_without_meaning(self.format)):
            raise ValueError(f"{unused[0]} means nothing for format={self.format}; leave it out")
        if self.template is not None:
            _check_template(self.template)
            if self.text_key != type(self).model_fields["text_key"].default:
                raise ValueError("give text_key (one field) or template (a text made of several), not both")
        return self

    def keys_without_meaning(self, format_: str) -> list[str]:
        """Keys that were set and that a source of this format would not look at."""
        fields = type(self).model_fields
        return [
            key
            for key, formats in _MEANINGFUL_FOR.items()
            if format_ not in formats and getattr(self, key) != fields[key].default
        ]

    @property
    def location(self) -> str:
        """`path`, where a source of text or tokens is expected."""
        assert self.path is not None
        return self.path

    @property
    def text_fields(self) -> list[str]:
        """The fields that a record must have."""
        return [self.text_key] if self.template is None else template_fields(self.template)


class CustomSourceConfig(SourceConfig):
    """Base of another package's source, chosen by its `_target_`: it gives the documents itself.

    `path` says where they are, as the subclass understands it. It is used in many processes, which must all
    find the same parts, with the same documents in the same order.
    """

    def parts(self) -> Mapping[str, int]:
        """The names of its parts in their order, and about how many bytes of text each has.

        UserError where they are not there. A part is read by one process at a time, best 16 to 512 MB.
        """
        raise NotImplementedError

    def documents(self, part: str) -> Iterator[str]:
        """The texts of a part, in their order."""
        raise NotImplementedError

    def version(self) -> str:
        """What changes when a text may have: a time, a size, a hash. Shards are then made anew."""
        raise NotImplementedError


def template_fields(template: str) -> list[str]:
    """The names in braces, each once, in their order."""
    return list(dict.fromkeys(_FIELD.findall(_BRACES.sub("", template))))


def _check_template(template: str) -> None:
    bare = _BRACES.sub("", template)
    if not template_fields(template) or "" in template_fields(template):
        raise ValueError(f"template is {template!r}: name a field in braces, such as {{title}}")
    if set(_FIELD.sub("", bare)) & set("{}"):
        raise ValueError(f"template is {template!r}: a brace that is text is written twice")


class StageConfig(Config):
    """Other weights from a step on."""

    from_step: Annotated[int, Field(ge=2)]
    """The first step of the order with these weights; the sources' own weights hold until then. Steps that
    `skip` leaves out count too."""
    weights: Annotated[dict[str, Annotated[float, Field(ge=0)]], Field(min_length=1)]
    """The weight of each source; one that is not named has none."""


class CurriculumConfig(Config):
    """Documents are cut into shorter segments first; the order of the data stays (SkyLadder, 2025)."""

    from_length: Count
    """Tokens a segment at step 1; they grow linearly to seq_len."""
    until_step: Annotated[int, Field(ge=2)]
    """The first step with whole documents."""


class DataConfig(Config):
    """The sources, how they are mixed, and how their documents become windows."""

    sources: Annotated[
        dict[str, choice(CustomSourceConfig, SourceConfig)],  # type: ignore[valid-type]
        Field(min_length=1),
    ]
    """Sources by name; the name is the key under which each is reported."""
    stages: list[StageConfig]
    """Changes of the mixture on the way, ascending."""
    skip: list[tuple[Count, Count]]
    """Stretches [first, last] of the order, in steps, that are left out."""
    documents: Documents
    """separate: attention and positions stay within a document; attend: a window is one text."""
    boundary_targets: bool | None
    """Whether the first token of a document is a target; None: where documents attend to each other."""
    boundary: Boundary
    """Control ids around each document."""
    packing: Packing
    """cut: the stream is cut every seq_len tokens; best_fit: documents are kept whole where they fit."""
    max_padding: Annotated[float, Field(ge=0, lt=1)]
    """best_fit: part of a window that may stay empty before a document is split to fill it."""
    curriculum: CurriculumConfig | None
    """Segments that grow; None: whole documents from the first step on."""
    shuffle_span: Count
    """Windows within which the order of a source is permuted; 1 keeps the order of the files."""
    validation_fraction: Annotated[float, Field(ge=0, lt=1)]
    """Part of the documents held out of training, chosen by the hash of their text."""
    bad_records: BadRecords
    """What becomes of a record without usable text: kept aside, left out, or the end of the run."""
    max_bad_fraction: Annotated[float, Field(ge=0, le=1)]
    """Part of a file's records that may be bad; above it the run stops."""
    max_document_bytes: Count
    """A longer document is a bad record."""
    preparation: Literal["background", "ahead"]
    """Raw text is tokenised while training runs, or before it starts."""
    workers: Count | None
    """Processes that tokenise; None: as many as there are free cores."""
    remote_cache_gb: Weight
    """Disk that shards fetched from URLs may take, on each machine."""

    @field_validator("skip", mode="before")
    @classmethod
    def _is_a_list_of_pairs(cls, value: Any) -> Any:
        if isinstance(value, list) and value and not all(isinstance(pair, list | tuple) for pair in value):
            raise ValueError(f"is {value}: give a list of stretches [first, last], such as [[101, 110]]")
        return value

    @property
    def prepares_in_background(self) -> bool:
        """Whether training may begin before all text is tokens; `epochs` need the sizes first."""
        counted = all(source.epochs is None for source in self.sources.values())
        return self.preparation == "background" and counted

    @property
    def remote_cache_bytes(self) -> int:
        """`remote_cache_gb` in bytes."""
        return int(self.remote_cache_gb * 10**9)

    @property
    def trains_boundaries(self) -> bool:
        """`boundary_targets`, decided."""
        return self.documents == "attend" if self.boundary_targets is None else self.boundary_targets

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        for name in self.sources:
            if not re.fullmatch(r"[\w-][\w.-]*", name) or len(name.encode()) > LONGEST_NAME:
                raise ValueError(
                    f"sources has {name[:LONGEST_NAME]!r}: a name is made of letters, digits and _ - . (not"
                    f" first), at most {LONGEST_NAME} bytes; directories are called after it"
                )
        weighted = [name for name, source in self.sources.items() if source.weight is not None]
        if weighted and len(weighted) < len(self.sources):
            other = next(name for name in self.sources if name not in weighted)
            raise ValueError(f"sources.{weighted[0]} has weight, sources.{other} epochs: use one for all")
        if self.packing == "cut" and self.max_padding != MAX_PADDING:
            raise ValueError(f"max_padding={self.max_padding:g} means nothing with packing=cut; leave it out")
        _check_stages(self.stages, self.sources)
        _check_skip(self.skip)
        return self


def _check_stages(stages: list[StageConfig], sources: dict[str, SourceConfig]) -> None:
    steps = [stage.from_step for stage in stages]
    if steps != sorted(set(steps)):
        raise ValueError(f"stages begin at steps {steps}: each must be after the one before it")
    for number, stage in enumerate(stages):
        for name in stage.weights:
            if name not in sources:
                raise ValueError(
                    f"stages.{number}.weights.{name}: no such source; there are {', '.join(sources)}"
                    f"{did_you_mean(name, sources)}"
                )
        if not any(stage.weights.values()):
            raise ValueError(f"stages.{number}.weights: no weight is above 0")


def _check_skip(skip: list[tuple[int, int]]) -> None:
    before = 0
    for first, last in skip:
        if not before < first <= last:
            raise ValueError(
                f"skip has [{first}, {last}] after step {before}: each is [first, last], ascending, apart"
            )
        before = last
