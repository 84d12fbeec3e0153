"""States of plain tensors, saved by one process: what an engine gives is tested in test_resume."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from llmtrain.distributed import World
from llmtrain.training.checkpoint import CheckpointConfig, Failed, Saved, Saver
from llmtrain.training.engine.state import EngineState, Piece

SHAPE = (6, 10)


def state(value: float, elements: int = 60) -> EngineState:
    """A parameter `w` in two pieces, with a moment of another type."""
    values = torch.arange(elements, dtype=torch.float32) + value
    half = elements // 2
    pieces = [
        Piece("w", start, {"weight": part, "exp_avg": (part / 2).to(torch.bfloat16)})
        for start, part in ((0, values[:half]), (half, values[half:]))
    ]
    return EngineState(pieces, {"w": SHAPE}, scalars(int(value)))


def scalars(step: int) -> dict[str, Any]:
    """What an engine counts after so many steps."""
    counters = {"global_steps": step, "global_samples": 8 * step, "skipped_steps": 0}
    return {"optimizer": {"matrices": {"keys": ["weight"], "step": step}}, "counters": counters}


def record(step: int) -> dict[str, Any]:
    """What a run of one rank says of a step."""
    source = {"manifest_hash": "ab", "tokens": 800, "fingerprint": "cd"}
    return {
        "step": step,
        "world_size": 1,
        "stage": 1,
        "precision": "fp32",
        "tokenizer": "ef",
        "config": {"model": {}, "tokenizer": {}},
        "data": {"windows": 8 * step, "stages": [[0, {"a": 1}]], "skip": [], "sources": {"a": source}},
    }


def config(**changed: Any) -> CheckpointConfig:
    return CheckpointConfig(**({"every": 1, "keep": 2, "keep_every": None, "asynchronous": False} | changed))


@dataclass
class Told:
    """What a saver said."""

    saved: list[Saved]
    failed: list[Failed]


def saver(directory: Path, world: World | None = None, told: Told | None = None, **keys: Any) -> Saver:
    told = told or Told([], [])
    verified = keys.pop("verified", ())
    on_saved: Callable[[Saved], None] = told.saved.append
    return Saver(
        directory,
        config(**keys),
        world or World(),
        on_saved=on_saved,
        on_failed=told.failed.append,
        verified=verified,
    )


def save(directory: Path, *steps: int, **keys: Any) -> None:
    one = saver(directory, **keys)
    for step in steps:
        one.save(state(step), record(step))
    one.join()


def files(checkpoint: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(checkpoint.iterdir())}


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())
