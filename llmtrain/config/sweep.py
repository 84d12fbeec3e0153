"""The jobs of a sweep, one after another."""

from __future__ import annotations

import ctypes
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from llmtrain.config.errors import ExitCode

logger = logging.getLogger(__name__)

JOB = "LLMTRAIN_JOB"
"""Environment: the words, quoted for a shell, that start one job of several processes; a script's own."""

INTERRUPTED = 128 + signal.SIGINT
POLL_SECONDS = 0.2
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
PASSED_ON = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,
}


def run_each(module: str, jobs: Sequence[Sequence[str]]) -> int:
    """Start each job when the one before is over; the exit code of the first that failed, or 0.

    A job is what LLMTRAIN_JOB says, else one process of `module`. One that fails leaves the others to run. A
    signal goes to the job at work, once, and ends the sweep with that job's code, as does one that leaves
    with 85: the same command goes on with it, and finds those before it done.
    """
    start = shlex.split(os.environ.get(JOB, "")) or [sys.executable, "-m", module]
    failed: list[int] = []
    with _listening() as received:
        for number, words in enumerate(jobs):
            logger.info("job %d of %d: %s", number, len(jobs), shlex.join(words))
            code = _run([*start, *words], received)
            if code:
                logger.warning("job %d ended with exit code %d", number, code)
                failed.append(code)
            left = len(jobs) - number - 1
            if code == ExitCode.PREEMPTED or (received and (left or code)):
                if left:
                    logger.warning("the sweep stops: %d of %d jobs have not begun", left, len(jobs))
                return code or (INTERRUPTED if signal.SIGINT in received else ExitCode.PREEMPTED)
    if failed:
        logger.warning("%d of %d jobs failed", len(failed), len(jobs))
    return next(iter(failed), ExitCode.OK)


def _run(command: Sequence[str], received: Sequence[signal.Signals]) -> int:
    """The exit code of a command, as a shell says it.

    It has a session of its own: Ctrl-C in a terminal comes to it through us alone, for a second one kills.
    """
    process = subprocess.Popen(
        command, start_new_session=True, preexec_fn=partial(_end_with_parent, os.getpid())
    )
    sent = 0
    while True:
        for number in received[sent:]:
            process.send_signal(PASSED_ON[number])
        sent = len(received)
        try:
            code = process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            continue
        return code if code >= 0 else 128 - code


def _end_with_parent(parent: int) -> None:
    """SIGTERM for the job when the sweep, process `parent`, is gone, even by SIGKILL."""
    if sys.platform == "linux":
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the sweep's handler would take it until exec
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # gone before we asked to be told
            os.kill(os.getpid(), signal.SIGTERM)


@contextmanager
def _listening() -> Iterator[list[signal.Signals]]:
    """The list to which arriving signals are appended; one that is ignored (nohup) stays ignored."""
    received: list[signal.Signals] = []
    handlers = {number: signal.getsignal(number) for number in PASSED_ON}
    heard = [number for number, handler in handlers.items() if handler != signal.SIG_IGN]
    for number in heard:
        signal.signal(number, lambda arrived, _: received.append(signal.Signals(arrived)))
    try:
        yield received
    finally:
        for number in heard:
            signal.signal(number, handlers[number])
