"""Where a step's line goes besides metrics.jsonl: the console, wandb, TensorBoard. None can end a run."""

from __future__ import annotations

import logging
import queue
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Literal, Protocol

from llmtrain.config import Config, UserError, choice
from llmtrain.training.console import ProgressBar, ProgressLines, is_lively
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.tensorboard_record import TensorboardRecord
from llmtrain.training.wandb_record import WandbConfig, WandbRecord
from llmtrain.training.words import one_line

if TYPE_CHECKING:
    from llmtrain.training.config import TrainConfig

logger = logging.getLogger(__name__)

FINISH_SECONDS = 15.0
"""Time that the end of a run waits for a record at most."""

LEAVE_SECONDS = 2.0
"""Time that a library's own processes have to end, once the record is finished."""


class Logger(Protocol):
    """A place for the lines of logged steps."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Take one step's line (the keys of metrics.jsonl)."""
        ...

    def close(self) -> None:
        """Write what is still held back; afterwards the logger is of no use."""
        ...


class CustomLoggerConfig(Config):
    """What `logger.extra` may hold: a subclass, chosen by its `_target_`, that builds a logger."""

    def build(self, directory: RunDirectory, config: TrainConfig, step: int) -> Logger:
        """The logger of the main rank, for a run that goes on after `step`."""
        raise NotImplementedError


class Record(Protocol):
    """A record of the run by another library, whose calls may be slow and may fail."""

    name: str

    def start(self) -> None:
        """Begin the record, or go on with it."""
        ...

    def log(self, line: Mapping[str, Any]) -> None:
        """Take one step's line."""
        ...

    def finish(self) -> None:
        """Write, or send, everything."""
        ...

    def leave(self) -> None:
        """End what the library runs beside."""
        ...


class LoggerConfig(Config):
    """What is shown on the console and recorded elsewhere; metrics.jsonl is always written."""

    progress: Literal["auto", "lines", "none"]
    wandb: WandbConfig
    tensorboard: bool
    extra: dict[str, choice(CustomLoggerConfig)]  # type: ignore[valid-type]
    """Those of other packages, by a name of one's own."""

    def check(self) -> None:
        """UserError where a library is asked for that is not installed."""
        if self.tensorboard and find_spec("tensorboard") is None:
            raise UserError(
                "logger.tensorboard=true: tensorboard is not installed; pip install 'llmtrain[tensorboard]', "
                "or logger.tensorboard=false"
            )

    def build(self, directory: RunDirectory, config: TrainConfig, step: int = 0) -> list[Logger]:
        """The loggers of the main rank, for a run that goes on after `step`."""
        loggers: list[Logger] = []
        if self.progress == "auto" and is_lively(sys.stderr):
            loggers.append(ProgressBar(config.max_steps, step))
        elif self.progress != "none":
            loggers.append(ProgressLines(config.max_steps))
        loggers += map(Recorder, self._records(directory, config, step))
        for name, extra in self.extra.items():
            loggers.append(Observer(f"logger.extra.{name}", extra.build(directory, config, step)))
        return loggers

    def _records(self, directory: RunDirectory, config: TrainConfig, step: int) -> Iterator[Record]:
        if self.wandb.mode != "disabled":
            yield WandbRecord(directory, self.wandb, config.name, config.model_dump(mode="json"))
        if self.tensorboard:
            yield TensorboardRecord(directory, config.model_dump(mode="json"), step)

    def silent(self) -> LoggerConfig:
        """The same with nothing shown and nothing recorded."""
        wandb = self.wandb.model_copy(update={"mode": "disabled"})
        return self.model_copy(update={"progress": "none", "wandb": wandb, "tensorboard": False, "extra": {}})


class Observer:
    """Somebody's logger that cannot end a run: what it raises is one warning, and it is asked no more."""

    def __init__(self, name: str, logger: Logger) -> None:
        self._name, self._logger = name, logger
        self._failed = False

    def log(self, line: Mapping[str, Any]) -> None:
        self._try(lambda: self._logger.log(line))

    def close(self) -> None:
        self._try(self._logger.close)

    def _try(self, act: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            act()
        except Exception as error:
            self._failed = True
            logger.warning("%s is off, metrics.jsonl has every line: %s", self._name, one_line(error))


class Recorder:
    """Brings lines into a record from a thread of its own that no step waits for.

    Lines queue until the record has started. What it raises is one warning, and metrics.jsonl alone has the
    lines from there on.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        # A daemon, because a thread that waits for a dead network must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=record.name, daemon=True)
        self._done = threading.Event()
        self._thread.start()

    def log(self, line: Mapping[str, Any]) -> None:
        if not self._done.is_set():  # else it has failed, and nobody reads them
            self._lines.put(dict(line))

    def close(self) -> None:
        self._lines.put(None)
        if self._done.wait(FINISH_SECONDS):
            self._thread.join(LEAVE_SECONDS)
        else:
            message = "%s did not finish within %g s; metrics.jsonl has every line"
            logger.warning(message, self._record.name, FINISH_SECONDS)

    def _work(self) -> None:
        try:
            self._record.start()
            while (line := self._lines.get()) is not None:
                self._record.log(line)
            self._record.finish()
            self._done.set()
            self._record.leave()
        except Exception as error:  # watching a run must not break it
            logger.warning("%s is off, metrics.jsonl has every line: %s", self._record.name, one_line(error))
        finally:
            self._done.set()
