"""A sweep: its jobs run one after another, and it ends as they do."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from llmtrain.config import sweep as sweeps

ROOT = Path(__file__).resolve().parents[2]

JOB = """
import json, os, signal, sys, time
words = {key: value.strip("'") for key, value in (word.split("=", 1) for word in sys.argv[1:])}
received = []
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
    signal.signal(number, lambda arrived, _: received.append(arrived))
def note():
    with open(f"job-{words['max_steps']}.new", "w") as file:
        json.dump({"words": words, "received": received, "pid": os.getpid()}, file)
    os.rename(file.name, f"job-{words['max_steps']}")
note()
end = time.monotonic() + 60
while words["name"] == "wait-0" and not received and time.monotonic() < end:
    time.sleep(0.02)
time.sleep(0.5 * bool(received))
note()
code = {2: 130, 15: 85, 10: 85}[received[0]] if received else 0
sys.exit({"2": 78, "3": 85}.get(words["max_steps"], code))
"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a sweep of the small door, whose jobs note how they were called in tmp_path."""
    (tmp_path / "job.py").write_text(JOB)
    started: list[subprocess.Popen[str]] = []

    def run(*words: str) -> subprocess.Popen[str]:
        started.append(
            subprocess.Popen(
                [sys.executable, "-m", "tests.config.small", "--multirun", *words],
                env={
                    "PYTHONPATH": str(ROOT),
                    "PATH": "/usr/bin:/bin",
                    "LLMTRAIN_JOB": f"{sys.executable} job.py",
                },
                cwd=tmp_path,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
        return started[-1]

    yield run
    for process in started:
        process.kill()
        process.communicate()


def job(folder: Path, max_steps: int, heard: bool = False) -> dict:
    """What a job noted, once it has begun, or has heard a signal."""
    file, deadline = folder / f"job-{max_steps}", time.monotonic() + 60
    while not file.exists() or (heard and not json.loads(file.read_text())["received"]):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return json.loads(file.read_text())


def test_a_job_that_fails_leaves_the_others_to_run(start, tmp_path):
    sweep = start("max_steps=1,2,4", "name=${max_steps}-steps")
    _, errors = sweep.communicate(timeout=120)
    assert sweep.returncode == 78, errors
    assert [job(tmp_path, n)["words"]["name"] for n in (1, 2, 4)] == ["1-steps-0", "2-steps-1", "4-steps-2"]
    assert len({job(tmp_path, n)["words"]["output_dir"] for n in (1, 2, 4)}) == 3
    assert errors.splitlines()[-1] == "1 of 3 jobs failed"


def test_a_job_that_was_preempted_ends_the_sweep(start, tmp_path):
    sweep = start("max_steps=3,4")
    _, errors = sweep.communicate(timeout=120)
    assert sweep.returncode == 85
    assert errors.splitlines()[-1] == "the sweep stops: 1 of 2 jobs have not begun"
    assert not (tmp_path / "job-4").exists()


def test_so_does_the_last_job_whatever_failed_before_it(start):
    sweep = start("max_steps=2,3")
    _, errors = sweep.communicate(timeout=120)
    assert sweep.returncode == 85
    assert errors.splitlines()[-1] == "job 1 ended with exit code 85"


def test_a_mistake_in_any_job_is_told_before_the_first(start, tmp_path):
    sweep = start("max_steps=1,none")
    _, errors = sweep.communicate(timeout=120)
    assert sweep.returncode == 78
    assert errors.startswith("error: max_steps=none: must be a valid integer")
    assert not list(tmp_path.glob("job-*"))


@pytest.mark.parametrize(
    ("number", "heard", "code"),
    [
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGTERM, 85),
        (signal.SIGUSR1, signal.SIGUSR1, 85),
        (signal.SIGHUP, signal.SIGTERM, 85),
        (signal.SIGKILL, signal.SIGTERM, -9),
    ],
)
def test_a_signal_reaches_the_job_at_work_once_and_ends_the_sweep(start, tmp_path, number, heard, code):
    sweep = start("name=wait", "max_steps=1,4")
    pid = job(tmp_path, 1)["pid"]
    sweep.send_signal(number)
    assert sweep.wait(timeout=120) == code
    assert job(tmp_path, 1, heard=True)["received"] == [heard]
    assert not (tmp_path / "job-4").exists()
    with suppress(psutil.NoSuchProcess):
        psutil.Process(pid).wait(timeout=120)
    assert not psutil.pid_exists(pid)


def test_a_job_whose_sweep_is_gone_before_it_begins_ends():
    """Though the sweep's own handlers are still there: until exec they would take the signal."""
    orphan = partial(sweeps._end_with_parent, -1)
    with sweeps._listening() as received:
        process = subprocess.Popen(["sleep", "60"], start_new_session=True, preexec_fn=orphan)
        assert process.wait(timeout=120) == -signal.SIGTERM
    assert not received
