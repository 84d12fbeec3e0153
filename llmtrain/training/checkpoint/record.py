"""checkpoint.json: what it has to hold, so that nothing that reads it meets a value of another kind."""

from __future__ import annotations

import json
from math import prod
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

BYTES = 4
"""Of an element of a parameter, whose fp32 weights are always saved."""

LONGEST = 60
"""Characters of a wrong value that a message repeats."""

Count = Annotated[int, Field(ge=0)]
Shape = Annotated[list[Count], Field(max_length=8)]


class _Part(BaseModel):
    """A part of the record; keys that are not named here may have any value."""

    model_config = ConfigDict(strict=True, frozen=True)


class Settings(_Part):
    """The run's config, as far as it is looked into and not compared only."""

    model: dict[str, Any]
    tokenizer: dict[str, Any]


class Source(_Part):
    """The content of a source as far as it was known."""

    manifest_hash: str | None
    tokens: Count | None
    fingerprint: str
    held: tuple[Count, Count, Count] | None = None


class Order(_Part):
    """The state of the data."""

    windows: Count
    stages: Annotated[list[tuple[Count, dict[str, Count]]], Field(min_length=1)]
    skip: list[tuple[Count, Count]]
    sources: dict[str, Source]


class Stepped(_Part):
    """What the optimizer keeps of the parameters of one role."""

    keys: list[str]
    step: Count | None


class Counters(_Part):
    """What DeepSpeed counts."""

    global_steps: Count
    global_samples: Count
    skipped_steps: Count


class Scalars(_Part):
    """See EngineState."""

    optimizer: dict[str, Stepped]
    counters: Counters


class Record(_Part):
    """The file as a whole."""

    step: Count
    world_size: Annotated[int, Field(ge=1)]
    stage: Annotated[int, Field(ge=0, le=3)]
    precision: str
    tokenizer: str
    config: Settings
    data: Order
    spikes: list[tuple[Count, float, float]] = []
    left_out: Count = 0
    rewinds: Count = 0
    scores: list[tuple[Count, float | None]] = []
    parameters: dict[str, Shape]
    scalars: Scalars


def parse_record(raw: bytes, *, step: int, ranks: int, size: int) -> dict[str, Any]:
    """The record as plain values; ValueError with key and value where it is not one.

    It has to be that of `step`, saved by so many `ranks` in a checkpoint of `size` bytes.
    """
    try:
        record = Record.model_validate_json(raw)
    except ValidationError as error:
        raise ValueError(_first(error)) from None
    if record.step != step:
        raise ValueError(f"step={record.step}: the manifest is that of step {step}")
    if record.world_size != ranks:
        raise ValueError(f"world_size={record.world_size}: there are files of {ranks} rank(s)")
    for name, shape in record.parameters.items():
        if prod(shape) * BYTES > size:
            raise ValueError(_cut(f"parameters.{name}={shape}") + ": larger than the whole checkpoint")
    value: dict[str, Any] = json.loads(raw)
    return value


def _first(error: ValidationError) -> str:
    """The first thing that is wrong, as `key=value: what it must be`."""
    found = error.errors(include_url=False)[0]
    key, value = ".".join(map(str, found["loc"])), found["input"]
    shown = "" if isinstance(value, dict | list | bytes) else f"={value!r}"
    says = found["msg"].replace("Input should", "must")
    return f"{_cut(key + shown)}: {says}" if key else says


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
