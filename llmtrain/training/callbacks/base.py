"""What a callback is, and what it sees of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import torch

from llmtrain.config import Config
from llmtrain.data.batch import Batch
from llmtrain.data.dataset import PackedDataset
from llmtrain.data.shards import ShardedSource
from llmtrain.distributed import World
from llmtrain.tokenizer import Tokenizer
from llmtrain.training.clock import StepClock
from llmtrain.training.early_stop import EarlyStop
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.signals import StopRequest

if TYPE_CHECKING:
    from llmtrain.training.config import TrainConfig


class Engine(Protocol):
    """The model as callbacks use it; both are collective, so every rank makes the same number of calls."""

    @property
    def device(self) -> torch.device: ...

    def loss(self, batch: Batch) -> torch.Tensor:
        """The sum of each row's target losses in nats, [rows], without gradient."""
        ...

    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Ids [1, T] -> logits [1, T, vocab_size], without gradient."""
        ...


class Run(Protocol):
    """The parts of a run that a callback may look at."""

    @property
    def config(self) -> TrainConfig: ...
    @property
    def world(self) -> World: ...
    @property
    def directory(self) -> RunDirectory: ...
    @property
    def tokenizer(self) -> Tokenizer: ...
    @property
    def engine(self) -> Engine: ...
    @property
    def held_out(self) -> Mapping[str, ShardedSource]: ...
    @property
    def dataset(self) -> PackedDataset: ...
    @property
    def clock(self) -> StepClock: ...
    @property
    def stop(self) -> StopRequest: ...
    @property
    def early_stop(self) -> EarlyStop: ...
    @property
    def step(self) -> int: ...
    @property
    def finished(self) -> bool: ...

    cut_short: bool
    """Whether a stop left out what is due after the last step."""


class Callback:
    """Something optional that happens beside the training; every rank runs it. By default nothing happens."""

    def on_start(self, run: Run) -> None:
        """Before the first step of this process."""

    def is_due(self, run: Run, step: int) -> bool:
        """Whether it has something to do after a step; every rank answers alike, and every time."""
        return False

    def is_owed(self, run: Run) -> bool:
        """Whether a stop left something of it out after the step to go on from; every rank answers alike."""
        return False

    def load(self, run: Run, step: int) -> None:
        """Before a step where it is due: open the text that it reads after it.

        This alone may wait for text that is on its way. Nothing here is collective: while there is such text
        it is called in a thread, and the ranks go on together when all are done.
        """

    def after_step(self, run: Run, line: dict[str, Any]) -> None:
        """After a step where it is due; keys put into `line` go into the step's line of metrics.jsonl."""

    def on_pause(self, run: Run) -> None:
        """After a step that the device has done: callbacks' work, a save or the end comes next."""

    def on_go(self, run: Run) -> None:
        """The next step comes: the first of this process, or the first after a pause."""

    def on_end(self, run: Run) -> None:
        """After the last step of this process, also where an error ends it."""


class CallbackConfig(Config):
    """What `callbacks.extra` may hold: a subclass, chosen by its `_target_`, that builds a callback."""

    def build(self) -> Callback:
        """The callback, on every rank."""
        raise NotImplementedError
