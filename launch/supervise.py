"""Run a launcher and its ranks as one: a signal reaches every rank, and no process outlives the job.

    python launch/supervise.py deepspeed --num_gpus 2 --module llmtrain.train ...

`deepspeed` does neither. A signal to it ends it at once and leaves the ranks training; one to its per-node
child loses the ranks' exit code; and it answers 0 when that child is killed (all tried with 0.19.8). So the
job gets a session of its own, signals go to the ranks alone, and the launcher reports what they return.

The exit code is the ranks': 85 after SIGTERM and SIGUSR1, 128 + n for a death by signal n, and 0 only if the
run wrote DONE. 89 is never seen: a run that wants to go back before a spike is started again at once.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import psutil

SUPERVISOR = "LLMTRAIN_SUPERVISOR"  # the variable by which the job's processes know where to tell of it
RANK = "llmtrain.train"  # the module that a rank runs
POLL_SECONDS = 0.2
STRAGGLER_SECONDS = 5.0  # for a logger's helper to send its last lines
SPARE_SECONDS = 10.0  # a rank ends itself when its grace is over; this much later we do
PREEMPTED, REWIND = 85, 89  # of llmtrain.config.ExitCode
FAILURES = 73, 78, 86, 87, 88, REWIND, 130  # torchrun makes 1 of them
ANEW, GO_ON = "resume=never", "resume=auto"
MOST_REWINDS = 5  # in a row without a newer checkpoint
TO_RANKS = {
    signal.SIGINT: signal.SIGINT,
    signal.SIGTERM: signal.SIGTERM,
    signal.SIGUSR1: signal.SIGUSR1,
    signal.SIGHUP: signal.SIGTERM,  # the terminal is gone: stop in an orderly way
}
REQUEUES = {signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP}


class Told:
    """What the ranks say of their run, in a file that LLMTRAIN_SUPERVISOR names to them."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="llmtrain-launch-"))

    @property
    def file(self) -> Path:
        return self.folder / "run.json"

    def read(self) -> dict[str, Any]:
        """{run, grace_seconds, done}, run None for a check; empty before a rank has read its config."""
        try:
            return json.loads(self.file.read_text())
        except FileNotFoundError:
            return {}

    @property
    def grace(self) -> float:
        """Seconds that ranks take to stop at most; those that have told nothing yet stop at once."""
        return float(self.read().get("grace_seconds", 0.0)) + SPARE_SECONDS

    @property
    def done(self) -> bool:
        """Whether the ranks say that they are done, and a run's marker stands."""
        told = self.read()
        return bool(told.get("done")) and (told["run"] is None or Path(told["run"], "DONE").exists())

    @property
    def preempted(self) -> bool:
        """Whether a rank left because somebody asked, and nothing is lost."""
        return self.file.with_name(f"{self.file.name}.preempted").exists()

    def code(self, launchers: int) -> int:
        """The exit code of a rank that said it, where a launcher says no more than that one failed."""
        said = [code for code in FAILURES if self.file.with_name(f"{self.file.name}.{code}").exists()]
        return said[0] if launchers == 1 and said else launchers

    @property
    def newest(self) -> str:
        """The name of the newest checkpoint; names are in the order of steps."""
        run = self.read().get("run")
        names = (path.name for path in Path(run, "checkpoints").glob("step_*")) if run else ()
        return max(names, default="")

    def forget(self) -> None:
        """A new start tells anew."""
        for file in self.folder.iterdir():
            file.unlink()

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


class Job:
    """A command in its own session, and every process that it starts there."""

    def __init__(self, command: list[str], told: Told, started: float, stderr: int | None = None) -> None:
        """`started`: when the first of the jobs that run this command one after another was."""
        told.forget()
        self.told = told
        self.began = time.time() - 2.0  # clocks of processes are coarse
        self.process = subprocess.Popen(
            command,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, SUPERVISOR: str(told.file), "LLMTRAIN_STARTED": repr(started)},
        )
        self.had_ranks = False

    def is_alive(self) -> bool:
        """Whether the command or something that it started still runs; takes up to POLL_SECONDS to see."""
        had_ended = self.process.returncode is not None
        try:
            self.process.wait(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            return True
        if had_ended:
            time.sleep(POLL_SECONDS)  # for what it left
        return bool(self.members())

    def members(self) -> list[psutil.Process]:
        """Its living processes, launchers included."""
        return [process for process in psutil.process_iter() if self._holds(process)]

    def _holds(self, process: psutil.Process) -> bool:
        """Those of the session; torchrun gives each rank one of its own, but it inherits the environment."""
        try:
            if process.status() == psutil.STATUS_ZOMBIE:
                return False
            if os.getsid(process.pid) == self.process.pid:
                return True
            is_new = process.create_time() >= self.began
            return is_new and process.environ().get(SUPERVISOR) == str(self.told.file)
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
        self.had_ranks = self.had_ranks or bool(ranks)
        for process in ranks if self.had_ranks else self.members():
            if process.pid not in told:
                told.add(process.pid)
                send(process, number)

    def stop(self) -> None:
        """Ask the ranks to stop, and end whatever is left after their grace."""
        began, told = time.monotonic(), set[int]()
        while self.members():
            self.tell(signal.SIGTERM, told)
            if time.monotonic() > began + self.told.grace:
                self.kill()
            time.sleep(POLL_SECONDS)

    def kill(self) -> None:
        """End whatever is left."""
        for process in self.members():
            send(process, signal.SIGKILL)


def is_rank(process: psutil.Process) -> bool:
    """Whether its command line is `python [-u] -m llmtrain.train ...`, and not `python torchrun -m ...`."""
    try:
        command = process.cmdline()
        return RANK in command[2:4] and command[1].startswith("-")
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


def died_of(code: int) -> int:
    """The signal that a process died of, 0 if it ended by itself.

    Popen says -n; launch.py hands a rank's -n to sys.exit, which makes it 256 - n.
    """
    if code < 0:
        return -code
    return 256 - code if code > 256 - 32 else 0


def shell_code(code: int) -> int:
    """The exit code as a shell says it: 128 + n for a death by signal n."""
    number = died_of(code)
    return 128 + number if number else code


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
def guarded(job: Job) -> Iterator[None]:
    """Keep a process beside this one that stops the job when this one is gone, even by SIGKILL."""
    reading, writing = os.pipe()
    guard = os.fork()
    if guard == 0:
        os.close(writing)
        _guard(job, reading)
    os.close(reading)
    yield  # `writing` is open here alone, for as long as we live
    with contextlib.suppress(BrokenPipeError):  # somebody ended the guard
        os.write(writing, b".")
    os.close(writing)
    os.waitpid(guard, 0)


def _guard(job: Job, reading: int) -> NoReturn:
    os.setsid()
    nothing = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # else whoever reads our output would wait for the guard, too
        os.dup2(nothing, descriptor)
    for number in TO_RANKS:
        signal.signal(number, signal.SIG_IGN)
    if not os.read(reading, 1):  # the other end is closed, and nobody has said that all is well
        job.stop()
        job.told.close()
    os._exit(0)


def supervise(command: list[str], received: list[signal.Signals] | None = None) -> int:
    """Run `command` to its end, again as long as it wants to rewind, and return the exit code.

    After the first signal the ranks have their grace to stop; a second Ctrl-C ends them at once. A launcher
    that ends before its ranks has failed, whatever it returns. `received`: from a `listen` of before.
    """
    received = listen() if received is None else received
    told, started = Told(), time.time()
    newest, in_vain = "", 0
    with contextlib.closing(told):
        while True:
            job = Job(command, told, started)
            with guarded(job):
                code = _follow(job, received)
            if code != REWIND:
                return code
            if received:
                return PREEMPTED if REQUEUES.intersection(received) else shell_code(-received[0])
            newest, in_vain = max(newest, told.newest), 0 if told.newest > newest else in_vain + 1
            if in_vain > MOST_REWINDS:
                say(f"{in_vain} rewinds in a row without a newer checkpoint: not starting again")
                return code
            say("the run goes back before a spike: starting it again")
            if ANEW in command and command[-1] != GO_ON:
                command = [*command, GO_ON]  # with the run that it began


def _follow(job: Job, received: list[signal.Signals]) -> int:
    sent: dict[signal.Signals, set[int]] = {}
    asked, ended, lost_ranks = math.inf, math.inf, False
    while job.is_alive():
        if job.process.returncode is not None and ended == math.inf:
            ended, lost_ranks = time.monotonic(), bool(job.ranks())
            if lost_ranks:
                say("the launcher is gone: stopping the ranks that it left")
                sent[signal.SIGTERM], asked = set(), min(asked, ended)
        for number in [number for number in dict.fromkeys(received) if number not in sent]:
            say(f"{number.name}: stopping (Ctrl-C again to kill)")
            sent[number], asked = set(), min(asked, time.monotonic())
        for number, pids in sent.items():
            job.tell(TO_RANKS[number], pids)  # again in every round: a rank may have started since
        now = time.monotonic()
        late = now > asked + job.told.grace or (not lost_ranks and now > ended + STRAGGLER_SECONDS)
        if received.count(signal.SIGINT) > 1 or late:
            job.kill()
    return _verdict(job, received, lost_ranks)


def _verdict(job: Job, received: list[signal.Signals], lost_ranks: bool) -> int:
    """What became of the job, as promised; the ranks' own word where the launcher passes it on."""
    code = shell_code(job.process.returncode)
    if code == 0 and job.told.done and not lost_ranks:
        return 0
    asked = {TO_RANKS[number] for number in REQUEUES.intersection(received)}
    began = job.had_ranks or job.told.read()
    if asked and (not began or died_of(job.process.returncode) in asked):
        return PREEMPTED  # a rank dies of such a signal only before it has anything to save
    if job.told.preempted:
        return PREEMPTED  # others may fail for it, and the launcher may be gone
    if code == 0:
        say("the launcher ended with 0, but the run did not write DONE")
    return job.told.code(code or 1)


def main() -> int:
    """Supervise the command in argv."""
    code = supervise(sys.argv[1:])
    if code and sys.stdout.isatty():
        sys.stdout.write("\x1b[?25h")  # a progress bar that was killed leaves the cursor hidden
    return code


if __name__ == "__main__":
    sys.exit(main())
