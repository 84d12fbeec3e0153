"""The keys under `checkpoint`."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from llmtrain.config import Config


class CheckpointConfig(Config):
    """When to save, how, and how many to keep."""

    every: Annotated[int, Field(gt=0)]
    keep: Annotated[int, Field(ge=2)]
    keep_every: Annotated[int, Field(gt=0)] | None
    asynchronous: bool
