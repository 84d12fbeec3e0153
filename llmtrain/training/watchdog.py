"""Every rank watches itself: a heartbeat in a file, and an end where the job hangs or this rank fails.

    heartbeats/rank_00000.json   host, pid, phase, step, seconds since the last beat, time; rank 0: goodput
    heartbeats/hang.json         who found that the job hangs; every rank that sees it ends
    stacks/rank_00000.txt        the stacks of all threads of a rank when the job hung
    crash-rank0.json             what a rank failed of (crashes.py)

Until the run begins, its text prepared and everything built, .starting/ stands for heartbeats/. The last rank
to leave it removes it: a mistake in text or config leaves the run directory as it was.

A watchdog is a thread: it lives as long as its process does, whatever the training thread waits for.
"""

from __future__ import annotations

import faulthandler
import json
import logging
import os
import re
import shutil
import socket
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NoReturn

from llmtrain import distributed
from llmtrain.config import ExitCode, UserError
from llmtrain.distributed import World
from llmtrain.training.crashes import TOLD, AnotherRankError, Crashes
from llmtrain.training.goodput import Account, account_before
from llmtrain.training.hang import Vital, verdict
from llmtrain.training.heartbeat import Heart
from llmtrain.training.launcher import tell_code
from llmtrain.training.report import write_last_report
from llmtrain.training.run_directory import RunDirectory, write_atomically

logger = logging.getLogger(__name__)

TICKS, SLOWEST_TICK = 10, 5.0
"""Heartbeats within `hang_timeout`, and the longest time between two, in seconds."""

ANSWER_SHARE, ANSWER_SECONDS = 0.1, 3.0
"""Of `hang_timeout`, and more: how long ranks may take to answer (NFS shows a file half a minute late)."""

SHARED = ("prepare", "verify", "save")
"""Phases in which ranks have unlike parts of a work, maybe none, and wait for those of others."""

COLLECTIVE = re.compile(r"gloo|nccl|processgroup|connection (closed|reset|refused)", re.IGNORECASE)
COMMUNICATION = re.compile(r"/(torch/distributed|deepspeed/comm)/")
"""Files whose functions talk to other ranks."""

TIMED_OUT = re.compile(r"timed? ?out", re.IGNORECASE)
"""In what torch says where ranks talk to each other."""


def longest_wait(hang_timeout: float | None) -> float | None:
    """Seconds after which ranks get an error that wait for others: the watchdog has the first word."""
    return None if hang_timeout is None else 2 * hang_timeout + 60


@contextmanager
def watched(
    directory: RunDirectory, world: World, heart: Heart, hang_timeout: float | None, *, goes_on: bool
) -> Iterator[Callable[[], None]]:
    """Watch this rank until its work is done; collective. What it fails of is kept in the run directory.

    `goes_on`: what earlier processes spent there counts as this run's. A rank that fails because another one
    did says so in one line, and leaves the word to that one. Calling what is given, which is collective, says
    that the run begins and may write.
    """
    if world.is_main:
        if goes_on:
            heart.goodput.go_on(spent_before(directory), heart.started)
        shutil.rmtree(directory.starting, ignore_errors=True)  # of a job that was killed
    job = distributed.broadcast_object(uuid.uuid4().hex)
    watchdog = Watchdog(directory, world, heart, hang_timeout, job)
    watchdog.start()
    try:
        yield watchdog.begin
    except Exception as error:
        watchdog.end_if_hung(error)
        if isinstance(error, UserError) and error.exit_code in (ExitCode.PREEMPTED, ExitCode.REWIND):
            raise
        secondary = isinstance(error, AnotherRankError) or _is_collective(error)
        crashes = Crashes(directory, world, job)
        crashes.keep(error, heart.last, secondary=secondary, begun=watchdog.has_begun)
        if isinstance(error, UserError) or not secondary:
            raise
        raise UserError(f"another rank failed: {crashes.first(error)}", exit_code=1) from error
    finally:
        watchdog.stop()


def spent_before(directory: RunDirectory) -> Account | None:
    """What earlier processes spent, one that was killed as it started too; None where there were none."""
    heartbeat = _read(directory.starting / _name(0)) or _read(directory.heartbeats / _name(0)) or {}
    return account_before(directory.read_metrics(), directory.read_events(), heartbeat)


class Watchdog:
    """The heartbeat of this rank, and its end by exit code 86 where no training thread moves any more.

    `job` names this start of the job: what others wrote before means nothing. Without `timeout` nothing is
    ended, and the heartbeat is written all the same.
    """

    def __init__(
        self, directory: RunDirectory, world: World, heart: Heart, timeout: float | None, job: str
    ) -> None:
        self._directory, self._world, self._heart = directory, world, heart
        self._timeout, self._job = timeout, job
        self._tick = min(SLOWEST_TICK, timeout / TICKS) if timeout else SLOWEST_TICK
        self._host = socket.gethostname()
        self._stopped, self._hung = threading.Event(), threading.Event()
        self._beats, self._writing = directory.starting, threading.Lock()
        self._complained, self._stumbled = False, False
        self._others: list[float] = []
        self._moved = 0.0
        """When one of the others moved last for which this rank waits, on the monotonic clock."""
        self._waited = False
        """Whether this rank waited for others until a library lost its patience."""
        self._thread = threading.Thread(target=self._watch, name="llmtrain-watchdog", daemon=True)

    @property
    def has_begun(self) -> bool:
        """Whether the run may write into its directory."""
        return self._beats != self._directory.starting

    def start(self) -> None:
        """Begin to watch."""
        self._safely(self._write)
        self._thread.start()

    def begin(self) -> None:
        """The run begins on every rank; rank 0 removes what earlier jobs left there."""
        distributed.barrier()
        with self._writing:
            self._leave_start()
            self._beats = self._directory.heartbeats
        self._safely(self._write)
        if self._world.is_main:
            ours = {_name(rank) for rank in self._ranks}
            for file in [*self._beats.glob("rank_*.json"), *self._beats.glob(f"{TOLD}*")]:
                if file.name not in ours:
                    file.unlink(missing_ok=True)
        distributed.barrier()

    def stop(self) -> None:
        """Watch no more; the last heartbeat says how far this rank came, if the run has begun."""
        self._stopped.set()
        self._thread.join()
        if self.has_begun:
            self._safely(self._write)
        else:
            self._leave_start()

    def _leave_start(self) -> None:
        """Every rank has had a heartbeat there: who leaves as the last one takes the directory away."""
        self._file(self._world.rank).unlink(missing_ok=True)
        with suppress(FileNotFoundError):  # one that leaves at the same time was quicker
            if not any(file.name.startswith("rank_") for file in self._beats.iterdir()):
                shutil.rmtree(self._beats, ignore_errors=True)

    def end_if_hung(self, error: Exception) -> None:
        """End by exit code 86 where `error` only follows from a hang: the watchdog has the word."""
        if self._timeout and _is_collective(error) and TIMED_OUT.search(str(error)):
            self._waited = True
            self._hung.set()
        if self._hung.is_set() or (self._timeout and self._marker() is not None):
            self._hung.set()
            self._thread.join()

    # The heartbeat

    def _watch(self) -> None:
        while not self._stopped.wait(self._tick if not self._hung.is_set() else 0):
            self._safely(self._write)
            self._safely(self._judge)

    def _safely(self, act: Callable[[], None]) -> None:
        """An error in the watchdog is told once, with its traceback, and the watchdog goes on."""
        try:
            act()
        except Exception:
            if not self._stumbled:
                logger.exception("the watchdog of rank %d failed, and goes on", self._world.rank)
            self._stumbled = True

    def _judge(self) -> None:
        if self._timeout and (self._late() > self._timeout or self._hung.is_set() or self._marker()):
            self._end()

    def _late(self) -> float:
        """Seconds in which this rank has not moved; if it waits for what others do, none of them either.

        How the others move is read from their heartbeats, late and rarely: there may be a thousand of them.
        Who stands still finds that out first: the others give it half of `hang_timeout` more.
        """
        last, now = self._heart.last, time.monotonic()
        late = now - last.at
        if (
            not self._timeout
            or late < self._timeout / 2
            or last.phase not in SHARED
            or not _is_in_collective()
        ):
            return late
        heartbeats = [self._heartbeat(rank) or {"beat": 0.0, "seconds": late} for rank in self._ranks]
        beats = [heartbeat["beat"] for heartbeat in heartbeats]
        if beats != self._others:
            self._others = beats
            others = (one["seconds"] for rank, one in enumerate(heartbeats) if rank != self._world.rank)
            self._moved = now - min(others, default=late)
        return min(late, now - self._moved - self._timeout / 2)

    def _write(self, answers: bool = False) -> None:
        last, now = self._heart.last, time.monotonic()
        said: dict[str, Any] = {
            "job": self._job,
            "rank": self._world.rank,
            "host": self._host,
            "pid": os.getpid(),
            "phase": last.phase,
            "step": last.step,
            "turn": last.turn,
            "waits": self._waited or _is_in_collective(),
            "collectives": distributed.collectives(),
            "source": self._heart.source() if last.phase == "data" else "",
            "beat": last.at,
            "seconds": now - last.at,
            "time": time.time(),
            "answers": answers,
        }
        if self._world.is_main:
            goodput = self._heart.goodput
            spent = dict(goodput.seconds)
            spent[goodput.part(last.phase, last.step)] += now - last.at
            said |= {"goodput": spent, "trained": goodput.trained}
        with self._writing:
            self._put(self._file(self._world.rank), said)

    def _file(self, rank: int) -> Path:
        return self._beats / _name(rank)

    @property
    def _ranks(self) -> range:
        return range(self._world.world_size)

    def _put(self, file: Path, value: dict[str, Any]) -> None:
        """A disk that is full for a while is no reason to end; who is silent for it will be named."""
        try:
            write_atomically(file, json.dumps(value) + "\n")
        except OSError as error:
            if not self._complained:
                logger.warning("%s: no heartbeat can be written: %s", file, error)
            self._complained = True

    # The end

    def _marker(self) -> dict[str, Any] | None:
        """What a rank of this job wrote that found it hung."""
        found = _read(self._beats / HANG)
        return found if found and found["job"] == self._job else None

    def _end(self) -> NoReturn:
        """Have the hang told, and exit, whatever comes in between."""
        self._hung.set()
        self._safely(self._conclude)
        tell_code(ExitCode.HANG)
        os._exit(ExitCode.HANG)

    def _conclude(self) -> None:
        """Leave the stacks, and have the lowest rank that answers say who hangs."""
        marker = self._beats / HANG
        if self._marker() is None:
            self._put(marker, {"job": self._job, "rank": self._world.rank})
        self._write(answers=True)
        self._dump_stacks()
        patience = ANSWER_SHARE * (self._timeout or 0.0) + ANSWER_SECONDS
        led = self._await(patience, self._is_led if self._world.rank else self._is_complete)
        if not (led and self._world.rank):
            self._speak()
            self._put(marker, {"job": self._job, "rank": self._world.rank, "said": True})
        self._await(2 * patience, lambda: "said" in (self._marker() or {}))

    def _is_led(self) -> bool:
        """Whether a lower rank answers, which then has the word."""
        return any(self._answers(rank) for rank in range(self._world.rank))

    def _is_complete(self) -> bool:
        return all(self._answers(rank) for rank in self._ranks)

    def _await(self, seconds: float, come: Callable[[], bool]) -> bool:
        deadline = time.monotonic() + seconds
        while not (has_come := come()) and time.monotonic() < deadline:
            time.sleep(self._tick / TICKS)
        return has_come

    def _heartbeat(self, rank: int) -> dict[str, Any] | None:
        """What a rank of this job wrote last."""
        found = _read(self._file(rank))
        return found if found and found["job"] == self._job else None

    def _answers(self, rank: int) -> bool:
        return (self._heartbeat(rank) or {"answers": False})["answers"]

    def _speak(self) -> None:
        beats = [self._heartbeat(rank) for rank in self._ranks]
        sentence = verdict([Vital.of(rank, beat, now=time.time()) for rank, beat in enumerate(beats)])
        stacks = self._directory.stacks
        sys.stderr.write(f"error: hang: {sentence} (hang_timeout={self._timeout:g}); stacks: {stacks}\n")
        sys.stderr.flush()
        try:
            self._directory.append_event("hang", step=self._heart.last.step, verdict=sentence)
        except OSError as error:
            logger.warning("%s: %s", self._directory.events, error)
        write_last_report(self._directory.path)

    def _dump_stacks(self) -> None:
        try:
            self._directory.stacks.mkdir(exist_ok=True)
            with (self._directory.stacks / f"rank_{self._world.rank:05d}.txt").open("w") as file:
                faulthandler.dump_traceback(file, all_threads=True)
        except OSError as error:
            logger.warning("%s: no stacks can be written: %s", self._directory.stacks, error)


HANG = "hang.json"


def _name(rank: int) -> str:
    return f"rank_{rank:05d}.json"


def _is_collective(error: BaseException) -> bool:
    """Whether torch complains of other ranks."""
    from torch.distributed import DistError

    is_torch = isinstance(error, RuntimeError) and COLLECTIVE.search(str(error)) is not None
    return isinstance(error, DistError) or is_torch


def _is_in_collective() -> bool:
    """Whether the training thread waits for other ranks, as far as its Python stack shows it."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None:
        if COMMUNICATION.search(frame.f_code.co_filename):
            return True
        frame = frame.f_back
    return False


def _read(file: Path) -> dict[str, Any] | None:
    """The JSON of a file that others replace; None where there is none."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
