"""Ranks that pause at a chosen place, until the test says go; see tests.ranks.PATCH."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLACE = "LLMTRAIN_TEST_PAUSE"
"""The directory where a rank writes `at-<rank>` when it has come to the place, and looks for `go`."""


def _pausing(function: Callable[..., Any], ranks: str = "01", call: int = 1) -> Callable[..., Any]:
    """`function`, which some ranks come into but once the test says so, at the `call`-th call."""
    calls = 0

    def paused(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == call and os.environ["RANK"] in ranks:
            place = Path(os.environ[PLACE])
            (place / f"at-{os.environ['RANK']}").touch()
            while not (place / "go").exists():
                time.sleep(0.02)
        return function(*arguments, **options)

    return paused


def before_prepare() -> None:
    """Both ranks, with the text still to prepare."""
    from llmtrain.data import prepare

    prepare.prepare = _pausing(prepare.prepare)


def in_prepare() -> None:
    """Rank 1 prepares text for ever."""
    from llmtrain.data import prepare

    prepare.prepare = _pausing(prepare.prepare, ranks="1")


def in_build() -> None:
    """Rank 1 does not come to the engine; rank 0 waits for it in DeepSpeed's first collective."""
    from llmtrain.training import build

    build.build_model_engine = _pausing(build.build_model_engine, ranks="1")


def in_evaluation() -> None:
    """Before the second batch of an evaluation."""
    from llmtrain.data.heldout import HeldOut

    HeldOut.batch = _pausing(HeldOut.batch, call=2)  # type: ignore[method-assign]


def in_save() -> None:
    """Amid the first save."""
    from llmtrain.training.checkpoint.attempt import Attempt

    Attempt.run = _pausing(Attempt.run)  # type: ignore[method-assign]


def in_step() -> None:
    """Before rank 1's third step; rank 0 waits for it in that step's collective."""
    from llmtrain.training.engine.engine import Engine

    Engine.train_step = _pausing(Engine.train_step, ranks="1", call=3)  # type: ignore[method-assign]


def time_of_saves() -> None:
    """Each rank writes down what it was told that saves take."""
    from llmtrain.training.signals import StopRequest

    def told(_: StopRequest, seconds: float) -> None:
        with (Path(os.environ[PLACE]) / f"took-{os.environ['RANK']}").open("a") as file:
            file.write(f"{seconds}\n")

    StopRequest.save_took = told  # type: ignore[method-assign]
