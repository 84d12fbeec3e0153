"""Run a launcher and its ranks as one: a signal reaches every rank, and no process outlives the job.

    python launch/supervise.py deepspeed --num_gpus 2 --module llmtrain.train ...

`deepspeed` does neither. A signal to it ends it at once and leaves the ranks training; one to its per-node
child loses the ranks' exit code; and it answers 0 when that child is killed (all tried with 0.19.8). So the
job gets a session of its own, signals go to the ranks alone, and the launcher reports what they return.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import NoReturn

import psutil

RANK = "llmtrain.train"  # the module that a rank runs
POLL_SECONDS = 0.2
STRAGGLER_SECONDS = 5.0  # for a logger's helper to send its last lines
TO_RANKS = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGHUP: signal.SIGTERM,  # the terminal is gone: stop in an orderly way
}


class Job:
    """A command in its own session, and every process that it starts there."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(command, start_new_session=True, stdin=subprocess.DEVNULL)
        self._had_ranks = False

    def is_alive(self) -> bool:
        """Whether the command or something that it started still runs; takes up to POLL_SECONDS to see."""
        try:
            self.process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            return True
        return bool(self.members())

    def members(self) -> list[psutil.Process]:
        """The session's living processes, launchers included."""
        return [process for process in psutil.process_iter() if self._holds(process)]

    def _holds(self, process: psutil.Process) -> bool:
        try:
            return os.getsid(process.pid) == self.process.pid and process.status() != psutil.STATUS_ZOMBIE
        except (psutil.Error, OSError):
            return False  # it ended while we looked

    def ranks(self) -> list[psutil.Process]:
        """The processes that train, without the workers that they forked."""
        training = {process.pid: process for process in self.members() if is_rank(process)}
        return [process for process in training.values() if parent(process) not in training]

    def tell(self, number: int, told: set[int]) -> None:
        """Signal every rank that is not in `told` yet; before the first one has started, the launchers.

        Later the launchers are left alone: they wait for the ranks and pass their exit code on.
        """
        ranks = self.ranks()
        self._had_ranks = self._had_ranks or bool(ranks)
        for process in ranks if self._had_ranks else self.members():
            if process.pid not in told:
                told.add(process.pid)
                send(process, number)

    def stop(self, grace: float) -> None:
        """Ask the ranks to stop and end whatever is left after `grace` seconds."""
        deadline, told = time.monotonic() + grace, set[int]()
        while self.members():
            self.tell(signal.SIGTERM, told)
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        """End whatever is left."""
        for process in self.members():
            send(process, signal.SIGKILL)


def is_rank(process: psutil.Process) -> bool:
    """Whether its command line is `python [-u] -m llmtrain.train ...`."""
    try:
        return RANK in process.cmdline()[2:4]
    except psutil.Error:
        return False


def parent(process: psutil.Process) -> int:
    """Its parent's id, 0 if it ended by now."""
    try:
        return process.ppid()
    except psutil.Error:
        return 0


def send(process: psutil.Process, number: int) -> None:
    """Signal it unless it ended by itself."""
    with contextlib.suppress(psutil.Error):
        process.send_signal(number)


def shell_code(code: int) -> int:
    """The exit code as a shell says it: 128 + n for a death by signal n.

    Popen says -n; launch.py hands a rank's -n to sys.exit, which makes it 256 - n.
    """
    if code < 0:
        return 128 - code
    return 128 + 256 - code if code > 256 - 32 else code


def say(text: str) -> None:
    """A line for the user, beside the ranks' own."""
    sys.stderr.write(f"launch: {text}\n")
    sys.stderr.flush()


def listen() -> list[signal.Signals]:
    """The list to which arriving signals are appended; one that is ignored (nohup) stays ignored."""
    received: list[signal.Signals] = []
    for number in TO_RANKS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda arrived, _: received.append(signal.Signals(arrived)))
    return received


@contextlib.contextmanager
def guarded(job: Job, grace: float) -> Iterator[None]:
    """Keep a process beside this one that stops the job when this one is gone, even by SIGKILL."""
    reading, writing = os.pipe()
    guard = os.fork()
    if guard == 0:
        os.close(writing)
        _guard(job, grace, reading)
    os.close(reading)
    yield  # `writing` is open here alone, for as long as we live
    os.close(writing)
    os.waitpid(guard, 0)


def _guard(job: Job, grace: float, reading: int) -> NoReturn:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # else whoever reads our output would wait for the guard, too
        os.dup2(nothing, descriptor)
    for number in TO_RANKS:
        signal.signal(number, signal.SIG_IGN)
    os.read(reading, 1)  # returns when the other end is closed
    job.stop(grace)
    os._exit(0)


def supervise(command: list[str], grace: float) -> int:
    """Run `command` to its end and return its exit code, as a shell says it.

    After the first signal the ranks have `grace` seconds to stop; a second Ctrl-C ends them at once. A
    launcher that ends before its ranks has failed, whatever it returns.
    """
    received = listen()
    job = Job(command)
    with guarded(job, grace):
        return _follow(job, received, grace)


def _follow(job: Job, received: list[signal.Signals], grace: float) -> int:
    told: dict[signal.Signals, set[int]] = {}
    deadline = math.inf
    lost_ranks = None
    while job.is_alive():
        if job.process.returncode is not None and lost_ranks is None:
            lost_ranks = bool(job.ranks())
            deadline = min(deadline, time.monotonic() + (grace if lost_ranks else STRAGGLER_SECONDS))
            if lost_ranks:
                say("the launcher is gone: stopping the ranks that it left")
                told[signal.SIGTERM] = set()
        for number in [number for number in received if number not in told]:
            say(f"{number.name}: stopping (Ctrl-C again to kill)")
            told[number] = set()
            deadline = min(deadline, time.monotonic() + grace)
        for number, pids in told.items():
            job.tell(TO_RANKS[number], pids)  # again in every round: a rank may have started since
        if received.count(signal.SIGINT) > 1 or time.monotonic() > deadline:
            job.kill()
    return shell_code(job.process.returncode) or int(bool(lost_ranks))


def main() -> int:
    """Supervise the command in argv."""
    code = supervise(sys.argv[1:], float(os.environ.get("LLMTRAIN_GRACE", "120")))
    if code and sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # a progress bar that was killed leaves the cursor hidden
    return code


if __name__ == "__main__":
    sys.exit(main())
