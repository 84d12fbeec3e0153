"""What a person sees of a run under way: a live display on a terminal, plain lines anywhere else.

Both show what the lines of metrics.jsonl have; a step computes and reads nothing for them.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from typing import IO, TYPE_CHECKING, Any

from llmtrain.training.words import duration, percent, short

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

SECONDS_BETWEEN_LINES = 2.0
"""A log file that nobody watches needs no line every 10 ms."""

DRAWN_A_SECOND = 2.0
"""How often the display is drawn, which takes two milliseconds, whether or not there is something new."""

MOST_SOURCES = 8
"""Sources that the display shows, those with the largest shares; of more it says how many."""

MOST_NAME = 24
"""Cells of a source's name."""

COLORS = ("cyan", "yellow", "green", "magenta", "red", "blue")
"""Of the sources, in the order of the config, again and again."""

SHARE = "data/share/"

WORDS: Mapping[str, Callable[[float], str]] = {
    "train/loss": "loss {:.4f}".format,
    "train/lr": "lr {:.1e}".format,
    "train/grad_norm": "grad {:.2f}".format,
    "train/tokens": lambda count: f"{short(count)} tokens",
    "perf/tokens_per_second": lambda speed: f"{short(speed)} tok/s",
    "perf/mfu": lambda share: f"{percent(share)} MFU",
}
"""Keys of a step's line, and how people read them."""

PLAIN = ("train/loss", "train/lr", "perf/tokens_per_second", "perf/mfu")
"""Those of a plain line."""


def is_lively(stream: IO[str]) -> bool:
    """Whether a stream is a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")


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
        with suppress(OSError):  # a reader that left, a full disk: metrics.jsonl has the line
            stream.write(text + "\n")
            stream.flush()


class ProgressBar:
    """The display of a terminal: a bar, and below it the newest step and the sources' shares of the tokens.

    Log records, evaluations and what others print stay above it as lines.
    """

    def __init__(self, max_steps: int, step: int = 0, stream: IO[str] | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self._pace = _Pace(max_steps)
        self._line: Mapping[str, Any] = {"step": step}
        self._left = "first step"
        # soft_wrap: what is printed above goes to the terminal as it is, so that no path is broken.
        self._console = Console(file=stream, stderr=stream is None, soft_wrap=True)
        self._live = Live(
            get_renderable=self._draw,
            console=self._console,
            refresh_per_second=DRAWN_A_SECOND,
            redirect_stdout=sys.stdout.isatty(),
        )
        self._live.start(refresh=True)
        self._console.show_cursor(True)  # a process that is killed could not give it back
        self._handlers = _follow_stderr()

    def log(self, line: Mapping[str, Any]) -> None:
        self._left = f"{duration(self._pace.seconds_left(line))} left"
        self._line = line
        if evaluation := describe_evaluation(line):
            with suppress(OSError):
                self._console.print(evaluation, markup=False, highlight=False)

    def close(self) -> None:
        with suppress(OSError):  # a terminal that is gone
            self._live.stop()
        for handler, stream in self._handlers:
            handler.setStream(stream)

    def _draw(self) -> RenderableType:
        from rich.columns import Columns
        from rich.console import Group
        from rich.progress_bar import ProgressBar as Bar
        from rich.table import Table
        from rich.text import Text

        line, most = self._line, self._pace.max_steps
        top = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None):
            top.add_column(ratio=ratio, no_wrap=True)
        bar = Bar(most, min(line["step"], most))
        top.add_row(Text(f"step {line['step']:,}/{most:,}", "bold"), bar, Text(self._left, "cyan"))
        rows = (list(_figures(line)), list(_shares(line)))
        return Group(top, *(Columns(row, padding=(0, 2)) for row in rows if row))


def _figures(line: Mapping[str, Any]) -> Iterator[Text]:
    """The numbers of a step, each with its name."""
    from rich.text import Text

    for text in figures(line, WORDS):
        name, _, rest = text.partition(" ")
        named = name in ("loss", "lr", "grad")
        yield Text.assemble((f"{name} ", "dim" if named else "bold"), (rest, "bold" if named else "dim"))


def _shares(line: Mapping[str, Any]) -> Iterator[Text]:
    """The largest sources, each in its colour with its share of all tokens so far."""
    from rich.text import Text

    names = [key.removeprefix(SHARE) for key in line if key.startswith(SHARE)]
    largest = sorted(names, key=lambda name: -(line[SHARE + name] or 0.0))[:MOST_SOURCES]
    for number, name in enumerate(names):
        if name in largest:
            called = Text(name)
            called.truncate(MOST_NAME, overflow="ellipsis")
            share = (percent(line[SHARE + name] or 0.0), "bold")
            yield Text.assemble(("\N{BLACK CIRCLE} ", COLORS[number % len(COLORS)]), called, " ", share)
    if len(names) > MOST_SOURCES:
        yield Text(f"and {len(names) - MOST_SOURCES} more", "dim")


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
    """`loss 2.3456  lr 3.0e-04  12.3k tok/s  41.2 % MFU` of a step's line, as far as it has them."""
    return "  ".join(figures(line, PLAIN))


def figures(line: Mapping[str, Any], keys: Iterable[str]) -> Iterator[str]:
    """The numbers of a step in words; a loss that is not finite is said so."""
    for key in keys:
        value = line.get(key)
        if value is not None and value == value:
            yield WORDS[key](value)
        elif key == "train/loss" and key in line:
            yield "loss not finite"


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


def _follow_stderr() -> list[tuple[logging.StreamHandler[Any], Any]]:
    """Let log records go through the stderr that the display has put up, above it instead of into it.

    Returns each changed handler with the stream it had.
    """
    consoles = (sys.__stderr__, sys.__stdout__)
    handlers = [h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler)]
    return [(h, h.setStream(sys.stderr)) for h in handlers if h.stream in consoles]
