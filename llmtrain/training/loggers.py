"""Where a step's line goes besides metrics.jsonl: the console and wandb. Neither can end a run."""

from __future__ import annotations

import logging
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from llmtrain.config import Config, choice
from llmtrain.config.secrets import redact
from llmtrain.training.console import ProgressBar, ProgressLines, is_lively
from llmtrain.training.run_directory import RunDirectory, write_atomically

if TYPE_CHECKING:
    from llmtrain.training.config import TrainConfig

logger = logging.getLogger(__name__)

CONNECT_SECONDS = 10.0
"""Time that wandb has to reach its server before the run is recorded offline."""

FINISH_SECONDS = 15.0
"""Time that the end of a run waits for wandb at most."""

SEND_SECONDS = 10.0
"""Of these, the time to send what is still to be sent."""

LEAVE_SECONDS = 2.0
"""Time that wandb's own process has to end, once it has everything."""


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


class WandbConfig(Config):
    """Whether and where wandb records the run."""

    mode: Literal["disabled", "offline", "online"]
    project: str = Field(min_length=1)


class LoggerConfig(Config):
    """What is shown on the console and sent elsewhere; metrics.jsonl is always written."""

    progress: Literal["auto", "lines", "none"]
    wandb: WandbConfig
    extra: dict[str, choice(CustomLoggerConfig)]  # type: ignore[valid-type]
    """Those of other packages, by a name of one's own."""

    def build(self, directory: RunDirectory, config: TrainConfig, step: int = 0) -> list[Logger]:
        """The loggers of the main rank, for a run that goes on after `step`."""
        loggers: list[Logger] = []
        if self.progress == "auto" and is_lively(sys.stderr):
            loggers.append(ProgressBar(config.max_steps, step))
        elif self.progress != "none":
            loggers.append(ProgressLines(config.max_steps))
        if self.wandb.mode != "disabled":
            loggers.append(WandbLogger(directory, self.wandb, config.name, config.model_dump(mode="json")))
        for name, extra in self.extra.items():
            loggers.append(Observer(f"logger.extra.{name}", extra.build(directory, config, step)))
        return loggers


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
            logger.warning("%s is off, metrics.jsonl has every line: %s", self._name, _one_line(error))


class WandbLogger:
    """The same lines for wandb, from a thread of its own that no step waits for.

    Lines queue until wandb is up. If its server cannot be reached or refuses, there is one warning and the
    run is recorded offline below the run directory (`wandb sync` sends it later); if that fails too, another
    warning, and metrics.jsonl alone has the lines. The run's id is kept in the run directory, so that a
    resumed run continues the same wandb run.
    """

    def __init__(
        self, directory: RunDirectory, config: WandbConfig, name: str, run_config: Mapping[str, Any]
    ) -> None:
        self._directory, self._config, self._name = directory, config, name
        self._run_config = redact(dict(run_config))
        self._lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        # A daemon, because a thread that waits for a dead network must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._done = threading.Event()
        self._thread.start()

    def log(self, line: Mapping[str, Any]) -> None:
        self._lines.put(dict(line))

    def close(self) -> None:
        self._lines.put(None)
        if self._done.wait(FINISH_SECONDS):
            self._thread.join(LEAVE_SECONDS)
        else:
            logger.warning("wandb did not finish within %g s; metrics.jsonl has every line", FINISH_SECONDS)

    # Whatever wandb raises, here in its own thread, is a warning: observing a run must not break it.

    def _work(self) -> None:
        try:
            run = self._start()
            import wandb

            while (line := self._lines.get()) is not None:
                run.log(line, step=line["step"])
            run.finish()
            self._done.set()
            wandb.teardown()  # here, because at the end of Python everything would wait for it
        except Exception as error:
            logger.warning("wandb is off, metrics.jsonl has every line: %s", _one_line(error))
        finally:
            self._done.set()

    def _start(self) -> Any:
        """A running wandb run, online if asked for and possible, else offline."""
        # What wandb reports about itself it sends at the end of Python, and waits 20 s for a dead server.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb

        # Silent also means that wandb never asks for a key on the terminal: a thread could not be answered.
        wandb.setup(wandb.Settings(silent=True))
        if self._config.mode == "online":
            try:
                run = self._init("online")
            except Exception as error:
                logger.warning(
                    "wandb records offline (`wandb sync %s/wandb/offline-run-*` sends it later): %s",
                    self._directory.path,
                    _one_line(error),
                )
                wandb.teardown()  # the failed attempt still owns the run's id
                wandb.setup(wandb.Settings(silent=True))
            else:
                logger.info("wandb: %s", run.url)
                return run
        return self._init("offline")

    def _init(self, mode: Literal["offline", "online"]) -> Any:
        import wandb

        return wandb.init(
            project=self._config.project,
            name=self._name,
            id=self._run_id(),
            resume="allow",
            mode=mode,
            dir=self._directory.path,
            config=self._run_config,
            settings=wandb.Settings(
                init_timeout=CONNECT_SECONDS,
                finish_timeout=SEND_SECONDS,
                silent=True,
                console="off",
                disable_code=True,
                disable_git=True,
                x_disable_meta=True,  # it would record the command line, with any secret in an override
            ),
        )

    def _run_id(self) -> str:
        file = self._directory.path / "wandb" / "id"
        if not file.exists():
            write_atomically(file, secrets.token_hex(4) + "\n")
        return file.read_text(encoding="ascii").strip()


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
