"""SIGKILL at every moment of a save: what is visible is whole, and what was whole stays."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.training.checkpoint import checkpoints
from llmtrain.training.checkpoint.manifest import verify

LARGE = 3_000_000
"""Elements of a state of 18 MB."""


class Victim:
    """Lives of tests/training/checkpoint/victim.py in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.training.checkpoint.victim"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(__file__).parents[3],
        )

    def start(self, **changed: Any) -> int:
        """Begin a life; returns its process id."""
        assert self._process.stdin is not None
        life = {"saves": 1, "elements": 60, "at": 0, "after": False, "asynchronous": False, **changed}
        self._process.stdin.write(json.dumps({"directory": str(self.directory), **life}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def end(self) -> int:
        """How the life ended: 0, or minus the signal."""
        return self._answer()

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)

    def _answer(self) -> int:
        assert self._process.stdout is not None
        return int(self._process.stdout.readline())


@pytest.fixture
def victim(tmp_path) -> Iterator[Victim]:
    one = Victim(tmp_path / "checkpoints")
    yield one
    one.close()


def whole(directory: Path) -> list[int]:
    """The steps of the visible checkpoints, each of which is read to the last byte."""
    for _, path in checkpoints(directory):
        verify(path)
    return [step for step, _ in checkpoints(directory)]


@pytest.mark.parametrize("background", [False, True])
def test_a_kill_at_every_call_of_a_save(victim, background):
    """The third save of a life, which also removes the first checkpoint."""
    victim.start(saves=3)
    assert victim.end() == 0
    ended, call, killed = None, 0, 0
    while ended != 0:
        call += 1
        for after in (False, True):
            before = whole(victim.directory)
            victim.start(at=call, after=after, asynchronous=background)
            ended = victim.end()
            assert ended in (0, -signal.SIGKILL)
            killed += ended != 0
            found = whole(victim.directory)
            assert found[-1] - before[-1] in (0, 1)
            assert found == [*before, before[-1] + 1][before.index(found[0]) :][: len(found)]
            assert len(found) >= 2
    assert killed >= 20  # two at each: directory, file, record, manifest, directory, rename, parent, removals


def test_kills_at_random_moments(victim):
    """Most of them while bytes are written; half of the lives write in the background."""
    moments, inside = random.Random(7), 0
    began = time.monotonic()
    victim.start(saves=2, elements=LARGE)
    assert victim.end() == 0
    two_saves = time.monotonic() - began
    for number in range(60):
        if number >= 12 and inside >= 4:
            break
        before = whole(victim.directory)
        pid = victim.start(saves=1000, elements=LARGE, asynchronous=number % 2 == 0)
        deadline = time.monotonic() + 120
        while not list(victim.directory.glob(".tmp-*/*")):
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(moments.uniform(0, two_saves))
        os.kill(pid, signal.SIGKILL)
        assert victim.end() == -signal.SIGKILL
        inside += bool(list(victim.directory.glob(".tmp-*")))
        found = whole(victim.directory)
        assert found[-1] >= before[-1]
        assert len(found) >= 2
    assert inside >= 4
