"""The scripts run for real; what they start is a stand-in for llmtrain.train, first on PYTHONPATH."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

LAUNCH = Path(__file__).resolve().parents[2] / "launch"

TRAIN = """
import json, os, signal, sys, time
from pathlib import Path

folder = Path(os.environ["STAND_IN"])
rank = os.environ.get("RANK") or os.environ.get("SLURM_PROCID", "alone")
mode = os.environ.get("MODE", "return")

def tell(done):
    run = folder / "run"
    run.mkdir(exist_ok=True)
    if done:
        (run / "DONE").touch()
    facts = {"run": str(run), "grace_seconds": float(os.environ.get("GRACE", 60)), "done": done}
    note("told", facts)
    file = Path(os.environ.get("LLMTRAIN_SUPERVISOR", "/nowhere/run.json"))
    if file.parent.is_dir():  # not on other nodes
        Path(f"{file}.of-{rank}").write_text(json.dumps(facts))
        Path(f"{file}.of-{rank}").rename(file)

def note(kind, content):
    path = folder / f"{kind}-{rank}"
    path.with_name(path.name + ".new").write_text(json.dumps(content))
    path.with_name(path.name + ".new").rename(path)

received = []
def stop(number, frame):
    received.append(number)
    note("signals", received)
    if mode == "orderly":
        time.sleep(0.3)
        os._exit(int(os.environ.get("STOPPED", "85")))

if mode != "early":
    tell(done=False)
if mode in ("orderly", "stubborn"):
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, stop)
note("started", {"argv": sys.argv[1:], "tty": sys.stdout.isatty(), "pid": os.getpid(),
                 "environment": dict(os.environ)})
if mode == "rewind":
    starts = folder / "starts"
    count = len(starts.read_text()) if starts.exists() else 0
    starts.write_text("." * (count + 1))
    if count < int(os.environ.get("PROGRESS", "0")):
        (folder / "run" / "checkpoints" / f"step_{count:08d}").mkdir(parents=True)
    if count < int(os.environ["REWINDS"]):
        sys.exit(89)
    mode = "return"
if mode == "leave":
    if rank == "1":
        Path(os.environ["LLMTRAIN_SUPERVISOR"] + ".preempted").touch()
    sys.exit(85 if rank == "1" else 1)
if mode == "return":
    tell(done=os.environ.get("CODE", "0") == "0" and "UNDONE" not in os.environ)
    sys.exit(int(os.environ.get("CODE", "0")) if rank in ("0", "alone") else 0)
while True:
    time.sleep(0.05)
"""

RANKS = """
import os, sys
from pathlib import Path
if "typo" in sys.argv[1:]:
    sys.stderr.write("typo: no such key\\n")
    sys.exit(78)
print(os.environ.get("ANSWER", "1"))
"""


@pytest.fixture
def stand_in(tmp_path) -> Path:
    """A package llmtrain whose `train` notes how it was called, and the folder that it notes it in."""
    package = tmp_path / "stand_in" / "llmtrain"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "train.py").write_text(TRAIN)
    (package / "ranks.py").write_text(RANKS)
    return package.parent


@pytest.fixture
def environment(stand_in) -> dict[str, str]:
    """The stand-in's environment: this Python's, no setup."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("CUDA_", "LLMTRAIN_"))}
    for key in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT", "DS_ACCELERATOR"):
        kept.pop(key, None)
    kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
    return kept | {"LLMTRAIN_SKIP_SETUP": "1", "PYTHONPATH": str(stand_in), "STAND_IN": str(stand_in)}


@pytest.fixture
def start(environment, tmp_path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start a command, or a script of launch/ with arguments; whatever is left of it ends with the test."""
    started: list[subprocess.Popen[str]] = []

    def run(*command: str | Path, **variables: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [str(word) for word in command],
            env=environment | variables,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        return process

    yield run
    for process in started:
        for member in [*_descendants(process.pid), *stand_ins(environment["STAND_IN"])]:
            member.kill()
        if process.poll() is None:
            process.kill()
        process.communicate()


def _descendants(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def stand_ins(folder: str | Path) -> list[psutil.Process]:
    """Every living process that has this stand-in's environment, launchers included."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("STAND_IN") == str(folder) and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(*paths: Path, seconds: float = 240.0) -> None:
    """Until all of these exist."""
    deadline = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, (
            f"waited {seconds} s for {[p.name for p in paths if not p.exists()]}"
        )
        time.sleep(0.05)


@pytest.fixture
def port() -> int:
    """A free port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
