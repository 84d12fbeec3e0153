"""Runs that are killed again and again, held against one that never was.

What must come out: the same loss, gradient norm, learning rate and tokens at every step, bit for bit; each
life goes on from the newest checkpoint that the one before it published; no process is left.
"""

from __future__ import annotations

import math
import os
import random
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.ranks import PATCH, RankServer
from tests.soak.lives import RANKS, Death, Kill, Life, Row, beginnings, curve, newest

Tokens = dict[tuple[int, int, int], str]
"""The hash of a micro-batch by step, rank and place in the step."""


@dataclass
class Tally:
    """What was counted, and every difference in words."""

    kills: Counter[str] = field(default_factory=Counter)
    mid_save: int = 0
    orphans: int = 0
    lost_steps: int = 0
    replayed_steps: int = 0
    steps: int = 0
    batches: int = 0
    differences: list[str] = field(default_factory=list)
    deaths: list[dict[str, Any]] = field(default_factory=list)

    def add(self, kill: Kill, death: Death) -> None:
        """Count a kill."""
        self.kills[f"{kill.victim}{' under the launcher' if kill.launcher else ''}"] += 1
        self.mid_save += death.mid_save
        self.orphans += death.orphans
        self.deaths.append({**vars(kill), **vars(death)})
        if death.codes and all(code == 0 for code in death.codes):
            self.differences.append(f"{kill}: exit codes {death.codes}")

    def as_dict(self) -> dict[str, Any]:
        """For a JSON file."""
        return {**vars(self), "kills": dict(self.kills)}


class Soak:
    """One run that is killed, beside the same run that is not."""

    def __init__(
        self,
        server: RankServer,
        directory: Path,
        arguments: Sequence[str],
        rng: random.Random,
        patch: str | None = None,
    ) -> None:
        self._server, self._directory, self._rng = server, directory, rng
        self._patch = {} if patch is None else {PATCH: patch}
        self._arguments = list(arguments)
        self._lives = 0
        self.tally = Tally()
        self._whole = directory / "whole"
        whole = self._live(self._whole, "checkpoint.every=1000000")
        assert whole.wait() == [0] * RANKS, whole.output()
        self._curve = curve(self._whole)
        self._per_step = len(whole.batches()[0]) // len(self._curve)
        self._tokens = _by_step(whole, 0, self._per_step)

    def survive(self, kills: Sequence[Kill], *arguments: str, seconds: float = math.inf) -> Tally:
        """Start, kill and start again until every kill was made, or the time is over; then let it end."""
        left, deadline = list(kills), time.monotonic() + seconds
        for number in range(2 * len(kills)):
            if not left or time.monotonic() > deadline:
                break
            left = self._one_run(self._directory / f"run{number}", left, arguments, deadline)
        assert not left or time.monotonic() > deadline, f"{len(left)} kills hit no run; raise max_steps"
        return self.tally

    def _one_run(
        self, run: Path, kills: Sequence[Kill], arguments: Sequence[str], deadline: float
    ) -> list[Kill]:
        """Kill a run until it is done; returns the kills that it did not need."""
        left, begins = list(kills), 0
        while not (run / "DONE").exists():
            kill = left[0] if left and time.monotonic() < deadline else None
            commit = newest(run)
            last = ["checkpoint.every=1000000"] if kill is None else []
            life = self._live(run, *arguments, *last, launcher=kill is not None and kill.launcher)
            if kill is None:
                codes = life.wait()
                assert codes == [0] * RANKS, f"exit codes {codes}\n{life.output()}"
            elif (death := life.kill(kill, self._rng)) is not None:
                left.pop(0)
                self.tally.add(kill, death)
            else:
                assert (run / "DONE").exists(), f"it ended by itself\n{life.output()}"
            begins = self._compare_life(life, run, commit, begins)
        self._compare_curve(run)
        shutil.rmtree(run)
        return left

    def _live(self, run: Path, *arguments: str, launcher: bool = False) -> Life:
        self._lives += 1
        words = [*self._arguments, f"output_dir={run}", *arguments]
        return Life(self._server, words, run, self._directory / f"life{self._lives}", launcher, self._patch)

    def _compare_life(self, life: Life, run: Path, commit: int, begins: int) -> int:
        """Hold what a life trained on against the whole run; returns how many lives have begun so far."""
        found = beginnings(run)
        if len(found) == begins:
            return begins  # killed before it had loaded anything
        self.tally.lost_steps += commit - found[-1]
        for place, digest in _by_step(life, found[-1], self._per_step).items():
            self.tally.batches += 1
            if self._tokens.get(place) != digest:
                self.tally.differences.append(f"{run.name}: other tokens at step, rank, micro-batch {place}")
        shutil.rmtree(life.place)
        return len(found)

    def _compare_curve(self, run: Path) -> None:
        rows: dict[int, list[Row]] = curve(run)
        if sorted(rows) != sorted(self._curve):
            self.tally.differences.append(f"{run.name}: steps {sorted(rows)}")
        for step, lines in rows.items():
            self.tally.steps += len(lines)
            self.tally.replayed_steps += len(lines) - 1
            if lines != self._curve[step] * len(lines):
                self.tally.differences.append(f"{run.name}: step {step}: {lines}, {self._curve[step]}")


def _by_step(life: Life, begin: int, per_step: int) -> dict[tuple[int, int, int], str]:
    """The micro-batches of a life that went on from step `begin`."""
    return {
        (begin + 1 + number // per_step, rank, number % per_step): digest
        for rank, digests in enumerate(life.batches())
        for number, digest in enumerate(digests)
    }


def plan(count: int, launchers: int, rng: random.Random) -> list[Kill]:
    """`count` kills, the last `launchers` of them under the real launcher; half of all aim at a save."""
    forked = [
        Kill(victim="all" if number % 2 == 0 else "rank", when=_when(number), launcher=False)
        for number in range(count - launchers)
    ]
    victims = ("supervise", "all", "launch", "rank", "deepspeed")
    launched = [
        Kill(victim=victims[number % len(victims)], when=_when(number), launcher=True)
        for number in range(launchers)
    ]
    rng.shuffle(forked)
    return [*forked, *launched]


def slow_disk() -> None:
    """In a rank: a disk that takes its time, so that few kills show what happens in a save."""
    fsync = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(0.1)
        fsync(descriptor)

    os.fsync = slow


def _when(number: int) -> Any:
    return ("save", "save", "step", "save", "step", "save", "step", "save", "start", "step")[number % 10]


MIDDLE = [
    *("model.d_model=256", "model.n_heads=4", "model.n_kv_heads=1", "model.d_ff=1280"),
    *("seq_len=32", "global_batch_size=4", "micro_batch_size=1"),
]
"""2.5 M parameters: about 30 MB a checkpoint, a fifth of a second a step."""
