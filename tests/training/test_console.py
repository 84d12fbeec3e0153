"""What a person sees of a run: a display on a real pseudo-terminal, plain lines anywhere else."""

from __future__ import annotations

import codecs
import errno
import fcntl
import io
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from typing import Any

import pytest

from llmtrain.training.console import ProgressBar, ProgressLines, describe
from llmtrain.training.words import duration, percent, short


def line(step: int, **more: Any) -> dict[str, Any]:
    fixed = {
        "train/loss": 5.0 / step,
        "train/lr": 1e-3,
        "train/grad_norm": 0.5,
        "train/tokens": 1000 * step,
        "perf/tokens_per_second": 12345.6,
        "perf/step_seconds": 2.0,
        "perf/mfu": None,
    }
    return {"step": step, **fixed, **more}


class Clock:
    """A clock that the test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def test_lines_are_throttled_but_the_first_the_last_and_evaluations_are_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    progress = ProgressLines(100, stream)
    for step in range(1, 101):
        clock.now += 0.5
        progress.log(line(step, **({"eval/loss": 4.0, "eval/bits_per_byte": 1.5} if step == 7 else {})))
        if step == 99:
            clock.now -= 0.5  # the last line comes too soon after one that was shown, and is shown at once
    shown = [int(found) for found in re.findall(r"^step (\d+)/100", stream.getvalue(), re.MULTILINE)]
    assert shown == [1, 5, 7, *range(11, 100, 4), 100]
    assert "held out after step 7: loss 4.0000, 1.5000 bits per byte\n" in stream.getvalue()


def test_a_run_that_stops_early_shows_its_last_line(monkeypatch: pytest.MonkeyPatch) -> None:
    Clock(monkeypatch)
    stream = io.StringIO()
    progress = ProgressLines(100, stream)
    for step in (1, 2, 3):
        progress.log(line(step))
    progress.close()
    progress.close()
    assert re.findall(r"^step (\d+)/", stream.getvalue(), re.MULTILINE) == ["1", "3"]


def test_time_left_is_the_mean_pace_since_the_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stream = Clock(monkeypatch), io.StringIO()
    progress = ProgressLines(1000, stream)
    for step, seconds in ((501, 60.0), (511, 30.0), (521, 50.0)):  # resumed after 500; the start was slow
        clock.now += seconds
        progress.log(line(step))
    lefts = re.findall(r"  (\S+) left", stream.getvalue())
    # 499 steps at the step's own 2 s; 489 at 30 s for 10 steps; 479 at 80 s for 20.
    assert (
        lefts
        == [duration(499 * 2.0), duration(489 * 3.0), duration(479 * 4.0)]
        == ["16:38", "24:27", "31:56"]
    )


@pytest.mark.parametrize("loss", [None, float("nan")])
def test_a_loss_that_is_not_finite_is_said_so(loss: float | None) -> None:
    assert describe(line(1, **{"train/loss": loss})) == "loss not finite  lr 1.0e-03  12.3k tok/s"


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0"), (7, "7"), (0.123, "0.12"), (950, "950"), (999.6, "1.00k"), (1000, "1.00k"), (12345.6, "12.3k"),
     (99960, "100k"), (123456, "123k"), (4_560_000, "4.56M"), (1.5e9, "1.50B"), (3e12, "3.00T")],
)  # fmt: skip
def test_short_numbers(number: float, text: str) -> None:
    assert short(number) == text


def test_percents() -> None:
    assert [percent(share) for share in (0, 0.4123, 1)] == ["0.0 %", "41.2 %", "100.0 %"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (59.6, "1:00"), (65, "1:05"), (3661, "1:01:01"), (2 * 86400 + 3661, "2d 01:01:01")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_mfu_is_told_where_it_is_known() -> None:
    assert describe(line(2, **{"perf/mfu": 0.4123})) == "loss 2.5000  lr 1.0e-03  12.3k tok/s  41.2 % MFU"


@pytest.mark.parametrize(
    ("kind", "number"),
    [(ProgressLines, errno.EPIPE), (ProgressLines, errno.ENOSPC), (ProgressBar, errno.EIO)],
)
def test_a_console_that_is_gone_ends_nothing(kind: type[ProgressLines | ProgressBar], number: int) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            if self.closes:
                raise OSError(number, os.strerror(number))
            return len(text)

        closes = False

    stream = Gone()
    progress = kind(3, stream=stream)
    stream.closes = True
    for step in (1, 2, 3):
        progress.log(line(step, **{"eval/loss": 2.5, "eval/bits_per_byte": 1.25}))
    progress.close()


# On a terminal

TRAINING = """
import logging, sys, tempfile, time
from types import SimpleNamespace
logging.basicConfig(level=logging.INFO, format="%(message)s")
from llmtrain.training.loggers import LoggerConfig
from llmtrain.training.run_directory import RunDirectory
wandb = {"mode": "disabled", "project": "p"}
values = {"progress": sys.argv[1], "wandb": wandb, "tensorboard": False, "extra": {}}
config = LoggerConfig.model_validate(values)
steps, sources = int(sys.argv[2]), int(sys.argv[3])
found = config.build(RunDirectory(tempfile.mkdtemp()), SimpleNamespace(max_steps=steps))
print([type(found.display).__name__], flush=True)
shares = {f"data/share/source{number}": 1 / (number + 1) for number in range(sources)}
if sources > 10:
    shares["data/share/" + 200 * "x"] = 0.9
perf = {"perf/tokens_per_second": 950.0, "perf/step_seconds": 0.1, "perf/mfu": 0.4123}
try:
    for step in range(1, steps + 1):
        evaluation = {"eval/loss": 2.5, "eval/bits_per_byte": 1.25} if step == 3 else {}
        found.log({"step": step, "train/loss": 1.5, "train/tokens": 10**6 * step, **perf, **shares, **evaluation})
        if step <= 3:
            logging.info("a record after step %d", step)
            print("printed after step", step, flush=True)
            logging.info("a path: /%s/end", 100 * "long")
        else:
            time.sleep(0.05)
finally:
    found.close(0)
    logging.info("a record after the end")
"""  # noqa: E501

SEQUENCES = re.compile(r"\x1b\[([0-9;?]*)([a-zA-Z])")
HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


class Terminal:
    """A terminal of some width, and a process that trains in it; `seen` is all that it was sent."""

    def __init__(self, *words: str, width: int = 120, **environment: str) -> None:
        self._ours, self._theirs = pty.openpty()
        self.resize(width)
        inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAINING, *words],
            stdin=self._theirs, stdout=self._theirs, stderr=self._theirs,
            env={**inherited, "TERM": "xterm", **environment},
            start_new_session=True,
        )  # fmt: skip
        self.seen = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()  # what comes may end within a character

    def resize(self, width: int) -> None:
        fcntl.ioctl(self._theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 40, width, 0, 0))

    def read(self, until: Callable[[], bool]) -> None:
        """Take what comes until something is there, or the process has ended."""
        deadline = time.monotonic() + 120
        while not until():
            assert time.monotonic() < deadline, self.seen
            ended = self.process.poll() is not None
            if select.select([self._ours], [], [], 0.5)[0]:
                self.seen += self._decoder.decode(os.read(self._ours, 65536))
            elif ended:
                return

    def close(self) -> int:
        """Read to the end; the exit code."""
        self.read(lambda: False)
        os.close(self._theirs)
        os.close(self._ours)
        return self.process.wait()

    def text(self, start: int = 0) -> str:
        """What came after `start`, without the sequences that move and colour."""
        return SEQUENCES.sub("", self.seen[start:]).replace("\r\n", "\n")


def test_a_terminal_has_a_display_and_what_others_say_stays_whole_above_it() -> None:
    terminal = Terminal("auto", "3", "3")
    assert terminal.close() == 0
    seen = terminal.text()
    assert "['ProgressBar']" in seen
    *_, end = seen.rpartition("step 3/3 ")
    assert re.search(r"^━+ 0:00 left *\n *loss 1\.5000 .*3\.00M tokens .*950 tok/s .*41\.2 % MFU", end), seen
    assert re.search(r"● source0 100\.0 % +● source1 50\.0 % +● source2 33\.3 %", end)
    for said in ("a record", "printed"):
        for when in ("after step 1", "after step 3"):
            assert re.search(rf"(^|\r){said} {when} *$", seen, re.MULTILINE), seen
    assert re.search(r"(^|\r)a record after the end *$", seen, re.MULTILINE), seen
    assert "held out after step 3: loss 2.5000, 1.2500 bits per byte" in seen
    assert f"/{100 * 'long'}/end" in seen, "a path can be copied"


def test_a_terminal_that_gets_narrow_gets_narrow_lines() -> None:
    terminal = Terminal("auto", "80", "12", width=100)
    terminal.read(lambda: "tok/s" in terminal.seen)
    terminal.resize(60)
    resized = len(terminal.seen)
    terminal.read(lambda: terminal.seen[resized:].count("left") >= 4)
    narrow = max(terminal.seen.find("step ", resized), 0)
    narrow = terminal.seen.find("step ", narrow + 5)  # the first may have been on its way
    assert terminal.close() == 0
    lines = [line.rpartition("\r")[2].rstrip() for line in terminal.text(narrow).splitlines()]
    assert max(map(len, lines)) <= 60, lines
    end = " ".join(terminal.text(narrow).split())
    for part in ("80/80", "0:00 left", "loss 1.5000", "950 tok/s", "41.2 % MFU", "source6", "and 5 more"):
        assert part in end.rpartition("step ")[2], end
    assert f"{23 * 'x'}… 90.0 %" in end
    assert "source7" not in end, "the smallest shares are left out"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_whatever_ends_a_run_the_cursor_is_there(number: signal.Signals) -> None:
    terminal = Terminal("auto", "10000", "3")
    terminal.read(lambda: "tok/s" in terminal.seen)
    terminal.process.send_signal(number)
    assert terminal.close() in (-number, 1)
    assert terminal.seen.rfind(SHOW) > terminal.seen.rfind(HIDE) >= 0
    if number == signal.SIGINT:
        assert "a record after the end" in terminal.text().rpartition("left")[2], "below the display"


@pytest.mark.parametrize(("progress", "names"), [("lines", "['ProgressLines']"), ("none", "['NoneType']")])
def test_the_progress_key_chooses(progress: str, names: str) -> None:
    terminal = Terminal(progress, "3", "1")
    assert terminal.close() == 0
    assert names in terminal.seen and "\x1b" not in terminal.seen
    assert ("step 3/3  loss 1.5000" in terminal.seen) == (progress == "lines")


def test_a_terminal_that_cannot_move_its_cursor_has_plain_lines() -> None:
    terminal = Terminal("auto", "3", "1", TERM="dumb")
    assert terminal.close() == 0
    assert "['ProgressLines']" in terminal.seen and "\x1b" not in terminal.seen


def test_without_a_terminal_there_are_plain_lines() -> None:
    result = subprocess.run(
        [sys.executable, "-c", TRAINING, "auto", "3", "2"],
        capture_output=True, text=True, check=True, env={**os.environ, "FORCE_COLOR": "1", "TERM": "xterm"},
    )  # fmt: skip
    assert "['ProgressLines']" in result.stdout
    assert result.stderr.splitlines()[0] == "step 1/3  loss 1.5000  950 tok/s  41.2 % MFU  0:00 left"
    assert "\x1b" not in result.stderr + result.stdout


def test_the_display_of_a_stream_that_is_no_terminal_ends_with_the_last_step() -> None:
    stream = io.StringIO()
    bar = ProgressBar(3, stream=stream)
    bar.log(line(3))
    bar.close()
    assert "3/3" in stream.getvalue() and "\x1b" not in stream.getvalue()
