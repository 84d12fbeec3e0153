"""Where a step's line goes besides metrics.jsonl: the console, wandb, TensorBoard. None can end a run."""

from __future__ import annotations

import logging
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
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
"""Time that the end of a run waits for all records at most."""

LEAVE_SECONDS = 2.0
"""Time that libraries' own processes have to end, once the records are finished."""


class Logger(Protocol):
    """What another package builds: a place for the lines of logged steps."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Take one step's line (the keys of metrics.jsonl)."""
        ...

    def close(self, exit_code: int) -> None:
        """Write what is still held back; the process ends with `exit_code`."""
        ...


class CustomLoggerConfig(Config):
    """What `logger.extra` may hold: a subclass, chosen by its `_target_`, that builds a logger."""

    def build(self, directory: RunDirectory, config: TrainConfig, step: int) -> Logger:
        """The logger of the main rank, for a run that goes on after `step`; called in the logger's thread."""
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

    def finish(self, exit_code: int) -> None:
        """Write, or send, everything, also after a `log` that raised; the process ends with `exit_code`."""
        ...

    def leave(self) -> None:
        """End what the library runs beside, also where the record did not start."""
        ...


class Display(Protocol):
    """What the console shows of the run."""

    def log(self, line: Mapping[str, Any]) -> None:
        """Take one step's line."""
        ...

    def close(self) -> None:
        """Show what is still held back."""
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

    def build(self, directory: RunDirectory, config: TrainConfig, step: int = 0) -> Loggers:
        """The loggers of the main rank, for a run that goes on after `step`."""
        display: Display | None = None
        if self.progress == "auto" and is_lively(sys.stderr):
            display = ProgressBar(config.max_steps, step)
        elif self.progress != "none":
            display = ProgressLines(config.max_steps)
        return Loggers(display, self._records(directory, config, step))

    def _records(self, directory: RunDirectory, config: TrainConfig, step: int) -> Iterator[Record]:
        if self.wandb.mode != "disabled":
            yield WandbRecord(directory, self.wandb, config.name, config.model_dump(mode="json"))
        if self.tensorboard:
            yield TensorboardRecord(directory, config.model_dump(mode="json"), step)
        for name, extra in self.extra.items():
            yield ExtraRecord(f"logger.extra.{name}", partial(extra.build, directory, config, step))

    def silent(self) -> LoggerConfig:
        """The same with nothing shown and nothing recorded."""
        wandb = self.wandb.model_copy(update={"mode": "disabled"})
        return self.model_copy(update={"progress": "none", "wandb": wandb, "tensorboard": False, "extra": {}})


class ExtraRecord:
    """The record of a logger of another package, which is built when the record starts."""

    def __init__(self, name: str, build: Callable[[], Logger]) -> None:
        self.name, self._build = name, build

    def start(self) -> None:
        self._logger = self._build()

    def log(self, line: Mapping[str, Any]) -> None:
        self._logger.log(line)

    def finish(self, exit_code: int) -> None:
        self._logger.close(exit_code)

    def leave(self) -> None:
        """Nothing runs beside."""


class Loggers:
    """The display and the records of a run; none by default."""

    def __init__(self, display: Display | None = None, records: Iterable[Record] = ()) -> None:
        self.display, self._recorders = display, [Recorder(record) for record in records]

    def log(self, line: Mapping[str, Any]) -> None:
        """Show and record one step's line."""
        if self.display:
            self.display.log(line)
        for recorder in self._recorders:
            recorder.log(line)

    def close(self, exit_code: int) -> None:
        """Let all write what they hold back, the records beside each other; none is left.

        The process is about to end with `exit_code`.
        """
        recorders, self._recorders = self._recorders, []
        for recorder in recorders:
            recorder.end(exit_code)
        deadline = time.monotonic() + FINISH_SECONDS
        finished = [recorder for recorder in recorders if recorder.finishes(deadline)]
        deadline = time.monotonic() + LEAVE_SECONDS
        for recorder in finished:
            recorder.join(deadline)
        if self.display:
            self.display.close()
            self.display = None


class Recorder:
    """Brings lines into a record from a thread of its own that no step waits for.

    Lines queue until the record has started. What it raises is one warning, and metrics.jsonl alone has the
    lines from there on; it is ended as others are.
    """

    def __init__(self, record: Record) -> None:
        self._record = record
        self._lines: queue.SimpleQueue[dict[str, Any] | int] = queue.SimpleQueue()
        """Lines, and the exit code after the last one."""
        self._failed = False
        # A daemon, because a thread that waits for a dead network must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=record.name, daemon=True)
        self._finished = threading.Event()
        self._thread.start()

    def log(self, line: Mapping[str, Any]) -> None:
        """Hand over one step's line."""
        if not self._failed:
            self._lines.put(dict(line))

    def end(self, exit_code: int) -> None:
        """Let the record finish; no line comes after it."""
        self._lines.put(exit_code)

    def finishes(self, deadline: float) -> bool:
        """Wait until the record is finished or time.monotonic is `deadline`, which is a warning."""
        if self._finished.wait(max(0.0, deadline - time.monotonic())):
            return True
        message = "%s did not finish within %g s; metrics.jsonl has every line"
        logger.warning(message, self._record.name, FINISH_SECONDS)
        return False

    def join(self, deadline: float) -> None:
        """Wait until nothing of the record runs any more or time.monotonic is `deadline`."""
        self._thread.join(max(0.0, deadline - time.monotonic()))

    def _work(self) -> None:
        self._try(self._record.start)
        started = not self._failed
        while isinstance(item := self._lines.get(), dict):
            if not self._failed:
                self._try(partial(self._record.log, item))
        if started:
            self._try(partial(self._record.finish, item))
        self._finished.set()
        self._try(self._record.leave)

    def _try(self, act: Callable[[], None]) -> None:
        try:
            act()
        except (Exception, SystemExit) as error:  # watching a run must not break it
            level = logging.DEBUG if self._failed else logging.WARNING  # more of the same trouble
            self._failed = True
            logger.log(
                level, "%s is off, metrics.jsonl has every line: %s", self._record.name, one_line(error)
            )
