"""Saves again and again until it is killed: python -m tests.training.checkpoint.victim.

Reads a line of JSON a life, forks, and answers how the life ended. A life sweeps and goes on from the newest
checkpoint, as a run does. It kills itself at the `at`-th of its calls into the file system, before or after
that; or somebody else kills it.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from llmtrain.distributed import World
from llmtrain.training.checkpoint import choose, sweep
from tests.training.checkpoint.small import record, saver, state

WATCHED = [
    (os, "fsync"),
    (Path, "rename"),
    (Path, "mkdir"),
    (Path, "write_bytes"),
    (Path, "replace"),
    (shutil, "rmtree"),
]


def dies_at(call: int, *, after: bool) -> None:
    """Count the calls of this process from now on, and die at one of them."""
    made = 0

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def one(*given: Any, **named: Any) -> Any:
            nonlocal made
            made += 1
            if made == call and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            answer = original(*given, **named)
            if made == call:
                os.kill(os.getpid(), signal.SIGKILL)
            return answer

        return one

    for owner, name in WATCHED:
        setattr(owner, name, watched(getattr(owner, name)))


def live(directory: Path, saves: int, elements: int, asynchronous: bool) -> None:
    """So many checkpoints more."""
    sweep(directory)
    chosen = choose("auto", directory, World())
    begun = chosen.record["step"] if chosen else 0
    one = saver(directory, verified={begun} if chosen else (), asynchronous=asynchronous)
    for step in range(begun + 1, begun + 1 + saves):
        one.save(state(step, elements), record(step))
    one.join()


def main() -> None:
    torch.set_num_threads(1)
    for line in sys.stdin:
        life = json.loads(line)
        pid = os.fork()
        if not pid:
            if life["at"]:
                dies_at(life["at"], after=life["after"])
            live(Path(life["directory"]), life["saves"], life["elements"], life["asynchronous"])
            os._exit(0)
        sys.stdout.write(f"{pid}\n")
        sys.stdout.flush()
        sys.stdout.write(f"{os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
