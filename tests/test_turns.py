"""tests/turns.py: loud turns run side by side, a quiet one alone, and it is not kept waiting by new ones."""

from __future__ import annotations

import fcntl
import subprocess
import sys
import time
from pathlib import Path

SCRIPT = """
import sys
from pathlib import Path
from tests.turns import turn

directory, name = Path(sys.argv[1]), sys.argv[2]
with turn(directory, quiet=name == "quiet"):
    print(name, "begins", flush=True, file=(directory / "log").open("a"))
    sys.stdin.read()
    print(name, "ends", flush=True, file=(directory / "log").open("a"))
"""


def wait_for(directory: Path, condition) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, (directory / "log").read_text()
        time.sleep(0.01)


def is_queued(directory: Path) -> bool:
    with (directory / "queue").open("w") as queue:
        try:
            fcntl.lockf(queue, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def test_quiet_turns_are_alone_and_come_in_order(tmp_path):
    def start(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), name]
        return subprocess.Popen(command, stdin=subprocess.PIPE, cwd=Path(__file__).parents[1])

    def told(line: str) -> bool:
        return (tmp_path / "log").exists() and line in (tmp_path / "log").read_text().splitlines()

    processes = [start("first"), start("second")]
    wait_for(tmp_path, lambda: told("first begins") and told("second begins"))
    processes.append(start("quiet"))
    wait_for(tmp_path, lambda: is_queued(tmp_path))
    processes.append(start("late"))
    for process in processes:
        process.communicate(timeout=60)
    lines = (tmp_path / "log").read_text().splitlines()
    assert sorted(lines[2:4]) == ["first ends", "second ends"]
    assert lines[4:] == ["quiet begins", "quiet ends", "late begins", "late ends"]
