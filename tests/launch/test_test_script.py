"""launch/test.sh: arguments go to pytest, its code comes back, and dead ranks' shared memory is freed."""

from __future__ import annotations

import mmap
import os
import subprocess
from pathlib import Path

import pytest

from tests.launch.conftest import LAUNCH

SHARED_MEMORY = Path("/dev/shm")


# A buffer that a rank of another test has made a moment ago may not be mapped yet.
pytestmark = pytest.mark.quiet


@pytest.mark.skipif(not SHARED_MEMORY.is_dir(), reason="no /dev/shm")
def test_buffers_that_no_process_maps_are_removed(environment):
    prefix = f"deepspeed_allreduce_buffer_{os.getuid()}_test-{os.getpid()}"
    dead, mapped = SHARED_MEMORY / f"{prefix}_dead", SHARED_MEMORY / f"{prefix}_mapped"
    others = SHARED_MEMORY / f"deepspeed_allreduce_buffer_{os.getuid() + 1}_test-{os.getpid()}"
    for path in (dead, mapped, others):
        path.write_bytes(bytes(4096))
    try:
        with mapped.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
            command = ["bash", LAUNCH / "test.sh", "--version"]
            result = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert result.stdout.startswith("pytest ")
        assert [path.exists() for path in (dead, mapped, others)] == [False, True, True]
    finally:
        for path in (dead, mapped, others):
            path.unlink(missing_ok=True)


def test_pytests_exit_code_comes_back(environment):
    command = ["bash", LAUNCH / "test.sh", "no/such/test.py"]
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 4
