"""Where a step's line goes besides metrics.jsonl: the console and wandb. Neither can end a run."""

from __future__ import annotations

import logging
import os
import queue
import secrets
import sys
import threading
import time
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field

from llmtrain.config import Config
from llmtrain.config.secrets import redact
from llmtrain.training.run_directory import RunDirectory, write_atomically

if TYPE_CHECKING:
    from rich.progress import Progress

    from llmtrain.training.config import TrainConfig

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LINES = 2.0
"""A log file that nobody watches needs no line every 10 ms."""

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


class WandbConfig(Config):
    """Whether and where wandb records the run."""

    mode: Literal["disabled", "offline", "online"]
    project: str = Field(min_length=1)


class LoggerConfig(Config):
    """What is shown on the console and sent elsewhere; metrics.jsonl is always written."""

    progress: Literal["auto", "lines", "none"]
    wandb: WandbConfig

    def build(self, directory: RunDirectory, config: TrainConfig, step: int = 0) -> list[Logger]:
        """The loggers of the main rank, for a run that goes on after `step`."""
        loggers: list[Logger] = []
        if self.progress == "auto" and sys.stderr.isatty():
            loggers.append(ProgressBar(config.max_steps, step))
        elif self.progress != "none":
            loggers.append(ProgressLines(config.max_steps))
        if self.wandb.mode != "disabled":
            loggers.append(WandbLogger(directory, self.wandb, config.name, config.model_dump(mode="json")))
        return loggers


class ProgressLines:
    """One plain line a logged step, at most one every two seconds, the first and the last in any case."""

    def __init__(self, max_steps: int, stream: IO[str] | None = None) -> None:
        self._stream = stream
        self._pace = _Pace(max_steps)
        self._shown_at = float("-inf")
        self._held_back: str | None = None

    def log(self, line: Mapping[str, Any]) -> None:
        left = self._pace.seconds_left(line)
        text = f"step {line['step']}/{self._pace.max_steps}  {describe(line)}  {duration(left)} left"
        now = time.monotonic()
        last = line["step"] >= self._pace.max_steps
        if last or "eval/loss" in line or now - self._shown_at >= SECONDS_BETWEEN_LINES:
            self._write(text)
            self._shown_at = now
            self._held_back = None
            if evaluation := describe_evaluation(line):
                self._write(evaluation)
        else:
            self._held_back = text

    def close(self) -> None:
        if self._held_back is not None:
            self._write(self._held_back)
            self._held_back = None

    def _write(self, text: str) -> None:
        stream = self._stream or sys.stderr
        stream.write(text + "\n")
        stream.flush()


class ProgressBar:
    """A bar for a terminal: step, loss, tokens/s and time left; evaluations stay above it as lines."""

    def __init__(self, max_steps: int, step: int = 0, stream: IO[str] | None = None) -> None:
        self._pace = _Pace(max_steps)
        self._bar = _rich_bar(stream)
        self._task = self._bar.add_task(
            "training", total=max_steps, completed=step, text="first step", left=""
        )
        self._bar.start()
        self._handlers = _follow_stderr()

    def log(self, line: Mapping[str, Any]) -> None:
        left = duration(self._pace.seconds_left(line))
        self._bar.update(self._task, completed=line["step"], text=describe(line), left=f"{left} left")
        if evaluation := describe_evaluation(line):
            self._bar.console.print(evaluation, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)


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


class _Pace:
    """How long the rest takes, at the mean pace since the first logged step of this process."""

    def __init__(self, max_steps: int) -> None:
        self.max_steps = max_steps
        self._first: tuple[int, float] | None = None

    def seconds_left(self, line: Mapping[str, Any]) -> float:
        """Seconds until `max_steps`; at the first line, its own step's time is all there is to go by."""
        step, now = line["step"], time.monotonic()
        if self._first is None or step <= self._first[0]:
            self._first = (step, now)
            pace = line.get("perf/step_seconds") or 0.0
        else:
            pace = (now - self._first[1]) / (step - self._first[0])
        return pace * max(0, self.max_steps - step)


def describe(line: Mapping[str, Any]) -> str:
    """`loss 2.3456  lr 3.0e-04  12.3k tok/s` of a step's line; a loss that is not finite is said so."""
    loss, lr, speed = line.get("train/loss"), line.get("train/lr"), line.get("perf/tokens_per_second")
    parts = ["loss not finite" if loss is None or loss != loss else f"loss {loss:.4f}"]
    if lr is not None:
        parts.append(f"lr {lr:.1e}")
    if speed is not None:
        parts.append(f"{short(speed)} tok/s")
    return "  ".join(parts)


def describe_evaluation(line: Mapping[str, Any]) -> str:
    """One line about the held-out text, or nothing where the step has no evaluation."""
    loss, bits = line.get("eval/loss"), line.get("eval/bits_per_byte")
    if loss is None or bits is None:
        return ""
    text = f"held out after step {line['step']}: loss {loss:.4f}, {bits:.4f} bits per byte"
    if (unigram := line.get("eval/unigram_bits_per_byte")) is not None:
        text += f" (token unigram {unigram:.4f}"
        if (shuffled := line.get("eval/shuffled_bits_per_byte")) is not None:
            text += f", context shuffled {shuffled:.4f}"
        text += ")"
    return text


def duration(seconds: float) -> str:
    """`1:05` (minutes) or `3:01:05` (hours), `2d 03:01:05` above a day."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    days, hour = divmod(hours, 24)
    if days:
        return f"{days}d {hour:02}:{minute:02}:{second:02}"
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"


def short(number: float) -> str:
    """`950`, `12.3k`, `4.56M`, `1.23B`: three digits."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size * 0.9995:
            scaled = number / size
            return f"{scaled:.{0 if scaled >= 99.95 else 1 if scaled >= 9.995 else 2}f}{letter}"
    return f"{number:.0f}" if abs(number) >= 9.95 or number == int(number) else f"{number:.2g}"


def _one_line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _rich_bar(stream: IO[str] | None) -> Progress:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(file=stream, stderr=stream is None)
    text = TextColumn("{task.fields[text]}", markup=False)
    left = TextColumn("{task.fields[left]}", style="cyan")
    return Progress(
        TextColumn("step"),
        MofNCompleteColumn(),
        BarColumn(bar_width=None),
        text,
        left,
        console=console,
        expand=True,
    )


def _follow_stderr() -> list[tuple[logging.StreamHandler[Any], Any]]:
    """Let log records go through the stderr that the bar has put up, above it instead of into it.

    Returns each changed handler with the stream it had.
    """
    consoles = (sys.__stderr__, sys.__stdout__)
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
    return [(h, h.setStream(sys.stderr)) for h in handlers if h.stream in consoles]
