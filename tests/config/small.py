"""A small door.

Example:

    python -m tests.config.small max_steps=3
"""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from llmtrain.config import Config, UserError, choice, door
from llmtrain.config.hydra import hydra_door

CONF = Path(__file__).parent / "conf"


class PositionConfig(Config):
    pass


class RopeConfig(PositionConfig):
    kind: Literal["rope"]
    theta: Annotated[float, Field(gt=0)]


class NoPositionConfig(PositionConfig):
    kind: Literal["none"]


class InnerConfig(Config):
    depth: int


class TheirConfig(PositionConfig):
    """What somebody else's package would bring."""

    base: float
    inner: InnerConfig


class ModelConfig(Config):
    d_model: int
    n_layers: Annotated[int, Field(gt=0)]
    n_heads: int
    position: choice(PositionConfig, RopeConfig, NoPositionConfig)  # type: ignore[valid-type]

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.d_model % self.n_heads:
            raise ValueError(f"d_model={self.d_model} is not a multiple of n_heads={self.n_heads}")
        return self


class SourceConfig(Config):
    path: str
    weight: float | Literal["auto"]


class SmallConfig(Config):
    name: str
    output_dir: Path
    max_steps: int
    precision: Literal["auto", "fp32", "bf16"]
    betas: tuple[float, float]
    sources: dict[str, SourceConfig]
    model: ModelConfig


def small(config: SmallConfig) -> int | None:
    logging.getLogger("llmtrain.small").info("started")
    if config.name == "missing":
        raise UserError("no such file:\n   missing.jsonl", exit_code=73)
    if config.name == "interrupted":
        raise KeyboardInterrupt
    sys.stdout.write(json.dumps(config.model_dump(mode="json")) + "\n")
    return 7 if config.name == "seven" else None


def main(argv: list[str] | None = None) -> int:
    door.SECONDS_FOR_OTHERS = float(os.environ.get("SECONDS_FOR_OTHERS", door.SECONDS_FOR_OTHERS))
    return hydra_door(SmallConfig, small, __doc__, argv, CONF)


if __name__ == "__main__":
    raise SystemExit(main())
