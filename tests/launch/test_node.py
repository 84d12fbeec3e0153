"""launch/node.py under a shell that plays sshd's end of a connection."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.launch.conftest import LAUNCH

NODE = f"exec {sys.executable} {LAUNCH}/node.py"


@pytest.fixture
def folder(tmp_path) -> Path:
    """Where hostfile.py has put a job that ends with 78."""
    made = tmp_path / "job"
    made.mkdir()
    command = ["sh", "-c", f"touch {tmp_path}/began; exit 78"]
    job = {"command": command, "environment": {}, "directory": str(tmp_path)}
    (made / "job.json").write_text(json.dumps(job))
    return made


def test_a_node_runs_its_job_and_cleans_up(folder, tmp_path):
    done = subprocess.run(["sh", "-c", f"{NODE} {folder} $PPID"], timeout=60)
    assert done.returncode == 78
    assert (tmp_path / "began").exists() and not folder.exists()


def test_nothing_begins_on_a_connection_that_is_gone_while_python_starts(folder, tmp_path):
    """No signal tells of a parent that died before it was asked for."""
    os.mkfifo(tmp_path / "go")
    shell = f"sh -c 'read go <{tmp_path}/go; {NODE} {folder} $PPID' & wait"
    connection = subprocess.Popen(["sh", "-c", shell])
    with (tmp_path / "go").open("w") as go:  # opens when the shell of the node is there
        connection.kill()
        connection.wait()
        go.write("go\n")
    deadline = time.monotonic() + 60
    while folder.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (tmp_path / "began").exists()
