"""One life of a run: two ranks from their start until they are killed or done, and what they left behind."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import psutil

from tests.ranks import RECORD, RankServer

RANKS = 2
LOCAL = Path(__file__).parents[2] / "launch" / "local.sh"
MARK = "LLMTRAIN_SOAK"
"""In the environment of a launcher's job: its processes are known by it."""
PATIENCE = 240.0
"""Seconds after which what was waited for is taken for lost."""
GRACE = 30
"""Seconds that ranks have to stop in when their launcher was killed."""

Victim = Literal["all", "rank", "supervise", "deepspeed", "launch"]
When = Literal["start", "step", "save"]


@dataclass(frozen=True)
class Kill:
    """Who gets SIGKILL, when, and whether the ranks have the real launcher above them or are forked.

    start: while the ranks build or load; step: at any instant from their first step on; save: once the files
    of a save have begun to appear. supervise, deepspeed and launch are the launcher's three processes.
    """

    victim: Victim
    when: When
    launcher: bool


@dataclass(frozen=True)
class Death:
    """How a life ended: whether in a save, the exit codes, seconds until all was over, processes left."""

    mid_save: bool
    codes: Sequence[int]
    seconds: float
    orphans: int


class Life:
    """Two ranks of the train door: forked from warm processes, or under launch/local.sh.

    lines: of metrics.jsonl, before it began. save_seconds: kills aimed at a save come at most so long
    after it has begun.
    """

    def __init__(
        self,
        server: RankServer,
        arguments: Sequence[str],
        run: Path,
        place: Path,
        launcher: bool,
        patch: dict[str, str] | None = None,
        save_seconds: float = 0.05,
    ) -> None:
        self.run, self.place, self._save_seconds = run, place, save_seconds
        place.mkdir(parents=True)
        self.lines = _count_lines(run / "metrics.jsonl")
        environment = {RECORD: str(place), MARK: str(place), **(patch or {})}
        self._job = None if launcher else server.start(arguments, RANKS, place, environment)
        self._process = _launch(arguments, place, environment) if launcher else None

    def wait(self) -> list[int]:
        """Exit codes, of each forked rank or of the launcher."""
        if self._job is not None:
            return self._job.wait(PATIENCE)
        assert self._process is not None
        return [self._process.wait(PATIENCE)]

    def ended(self) -> bool:
        """Whether every process that was started has ended."""
        return not self.processes()

    def kill(self, kill: Kill, rng: random.Random) -> Death | None:
        """Kill as asked; None where the run ended by itself before."""
        if not self._await(kill.when, rng):
            return None
        saving, began = [self.saving()], time.monotonic()
        for process in self._victims(kill.victim, rng):
            process.send_signal(signal.SIGKILL)
        saving.append(self.saving())
        codes = self.wait()
        while (left := self.processes()) and time.monotonic() < began + GRACE + 15:
            time.sleep(0.05)
        seconds = time.monotonic() - began
        for process in left:
            process.kill()
        if kill.victim == "all":
            saving = [self.saving()]  # nobody was left to publish it
        return Death(all(saving), codes, seconds, len(left))

    def saving(self) -> bool:
        """Whether files of a save stand that is not published."""
        return any((self.run / "checkpoints").glob(".tmp-*"))

    def stepped(self) -> bool:
        """Whether a step of this life has been logged."""
        return _count_lines(self.run / "metrics.jsonl") > self.lines

    def processes(self) -> list[psutil.Process]:
        """The living processes of this life."""
        if self._job is not None:
            codes = self._job.server.poll(self._job.pids)
            return [psutil.Process(p) for p, code in zip(self._job.pids, codes, strict=True) if code is None]
        return [process for process in psutil.process_iter() if _is_marked(process, str(self.place))]

    def output(self) -> str:
        """What it printed."""
        return "\n".join(path.read_text(errors="replace") for path in sorted(self.place.glob("output*.txt")))

    def batches(self) -> list[list[str]]:
        """Of each rank, the hashes of the micro-batches it trained on; a torn last one is left out."""
        return [hashes(self.place / f"rank{rank}.npy") for rank in range(RANKS)]

    def _await(self, when: When, rng: random.Random) -> bool:
        """Wait for the instant to kill at; False where the run ended by itself before."""
        if when == "start":
            return self.until(lambda: False, rng.uniform(0.5, 3))
        if not self.until(self.stepped):
            return False
        if when == "step":
            return self.until(lambda: False, rng.uniform(0, 1.5))
        time.sleep(rng.uniform(0, 0.5))
        return self.until(self.saving) and self.until(lambda: False, rng.uniform(0, self._save_seconds))

    def until(self, condition: Callable[[], bool], seconds: float | None = None) -> bool:
        """Wait for the condition, or the seconds; False where the run ended by itself."""
        deadline = time.monotonic() + (PATIENCE if seconds is None else seconds)
        looked = 0.0
        while not condition():
            now = time.monotonic()
            if now > deadline:
                assert seconds is not None, f"waited {PATIENCE} s\n{self.output()}"
                return not self.ended()
            if now - looked > 0.5:  # looking at processes is slow
                looked = now
                if self.ended():
                    return False
            time.sleep(0.002)
        return True

    def _victims(self, victim: Victim, rng: random.Random) -> list[psutil.Process]:
        if self._job is not None:
            ranks = self.processes()
        else:
            named = {name: _having(self.processes(), word) for name, word in COMMANDS.items()}
            if victim in named:
                return named[victim]
            ranks = _having(self.processes(), "llmtrain.train", at=slice(2, 4))
        return ranks if victim == "all" else [rng.choice(ranks)] if ranks else []


COMMANDS = {
    "supervise": "supervise.py",
    "deepspeed": "bin/deepspeed",
    "launch": "deepspeed.launcher.launch",
}


def _having(processes: Sequence[psutil.Process], word: str, at: slice = slice(1, 4)) -> list[psutil.Process]:
    """Those whose command has the word near its beginning."""
    found = []
    for process in processes:
        try:
            if any(part.endswith(word) for part in process.cmdline()[at]):
                found.append(process)
        except psutil.Error:
            continue
    return found


def _is_marked(process: psutil.Process, mark: str) -> bool:
    try:
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def _launch(arguments: Sequence[str], place: Path, variables: dict[str, str]) -> subprocess.Popen[bytes]:
    root = Path(__file__).parents[2]
    environment = {
        **os.environ,
        **variables,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": f"{Path(__file__).parent / 'site'}:{root}",
        "CUDA_VISIBLE_DEVICES": "",
        "LLMTRAIN_RANKS": str(RANKS),
        "LLMTRAIN_SKIP_SETUP": "1",
        "LLMTRAIN_GRACE": str(GRACE),
        "OMP_NUM_THREADS": "1",
    }
    with (place / "output.txt").open("wb") as output:
        return subprocess.Popen(
            ["bash", str(LOCAL), *arguments],
            env=environment,
            cwd=place,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def hashes(file: Path) -> list[str]:
    """Of the micro-batches that `tests.ranks.record_batches` recorded."""
    return [hashlib.sha256(batch.tobytes()).hexdigest() for batch in _arrays(file)]


def _arrays(file: Path) -> Iterator[np.ndarray]:
    content = io.BytesIO(file.read_bytes() if file.exists() else b"")
    size = len(content.getvalue())
    while content.tell() < size:
        try:
            yield np.load(content)
        except (ValueError, EOFError):  # the rank was killed as it wrote
            return


def _count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


Row = tuple[float, float, float]


def curve(run: Path) -> dict[int, list[Row]]:
    """(loss, gradient norm, learning rate) of each step in full precision, replays included."""
    rows: dict[int, list[Row]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows.setdefault(row["step"], []).append((row["train/loss"], row["train/grad_norm"], row["train/lr"]))
    return rows


def metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in full precision, without what the clock says."""
    rows = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if not k.startswith(("perf/", "goodput/"))} for row in rows]


def beginnings(run: Path) -> list[int]:
    """The step from which each life of the run went on, of those that came so far."""
    path = run / "events.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [event["step"] for event in events if event["event"] in ("start", "resume")]


def newest(run: Path) -> int:
    """The step of the newest checkpoint that is visible, 0 where there is none."""
    steps = [int(path.name.removeprefix("step_")) for path in (run / "checkpoints").glob("step_*")]
    return max(steps, default=0)
