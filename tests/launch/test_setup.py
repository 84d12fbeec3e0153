"""launch/setup.sh with the real pip and venv, offline: a tiny project and tiny wheels named torch."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from tests.launch.conftest import LAUNCH

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]
"""
# The smallest build backend: an editable install of a project without files.
BACKEND = """
import zipfile
METADATA = "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\nProvides-Extra: dev\\nRequires-Dist: torch\\n"
def build_editable(directory, settings=None, metadata=None):
    name = "tiny-1-py3-none-any.whl"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as wheel:
        wheel.writestr("tiny-1.dist-info/METADATA", METADATA)
        wheel.writestr("tiny-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nTag: py3-none-any\\n")
        wheel.writestr("tiny-1.dist-info/RECORD", "")
    return name
"""
CUDA = """
class cuda:
    is_available = staticmethod(lambda: {gpu})
"""


def wheel(folder: Path, version: str) -> None:
    """A package torch of this version that says it sees a GPU unless it is a CPU build."""
    folder.mkdir(exist_ok=True)
    info = f"torch-{version}.dist-info"
    with zipfile.ZipFile(folder / f"torch-{version}-py3-none-any.whl", "w") as archive:
        archive.writestr(
            "torch/__init__.py", f"__version__ = {version!r}\n" + CUDA.format(gpu="cpu" not in version)
        )
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


class Machine:
    """A project with launch/ in it, a folder of wheels as pip's only source, and at first no GPU."""

    def __init__(self, folder: Path) -> None:
        self.project, self.wheels, self.bin = folder / "project", folder / "wheels", folder / "bin"
        (self.project / "launch").mkdir(parents=True)
        self.bin.mkdir()
        shutil.copy(LAUNCH / "setup.sh", self.project / "launch")
        (self.project / "pyproject.toml").write_text(PYPROJECT)
        (self.project / "backend.py").write_text(BACKEND)
        self.command("nvidia-smi", "exit 9")
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "LLMTRAIN_"))}
        self.environment = kept | {
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_NO_INDEX": "1",
            "PIP_FIND_LINKS": str(self.wheels),
            "PYTHON": sys.executable,
            "PATH": f"{self.bin}:{os.environ['PATH']}",
        }

    def command(self, name: str, text: str) -> None:
        """Put a program on PATH."""
        (self.bin / name).write_text(f"#!/bin/sh\n{text}\n")
        (self.bin / name).chmod(0o755)

    def start(self, **variables: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", self.project / "launch" / "setup.sh"],
            env=self.environment | variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def setup(self, **variables: str) -> tuple[int, str]:
        """Exit code and everything printed."""
        process = self.start(**variables)
        out, errors = process.communicate(timeout=120)
        return process.returncode, out + errors

    def torch(self) -> str:
        python = self.project / ".venv" / "bin" / "python"
        command = [python, "-c", "import torch; print(torch.__version__)"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def bare_venv(tmp_path_factory) -> Path:
    """An environment with nothing but pip, for the tests to copy: making one takes seconds."""
    folder = tmp_path_factory.mktemp("bare") / ".venv"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    return folder


@pytest.fixture
def machine(tmp_path, bare_venv) -> Machine:
    machine = Machine(tmp_path)
    shutil.copytree(bare_venv, machine.project / ".venv", symlinks=True)
    for version in ("2.10.0+cpu", "2.13.0", "2.13.0+cpu", "2.15.0"):
        wheel(machine.wheels, version)
    return machine


def test_a_machine_gets_its_torch_and_is_left_alone_afterwards(machine):
    """The CPU build that pip's configuration offers, a CUDA one once there is a GPU; else nothing to do."""
    code, said = machine.setup()
    assert code == 0, said
    assert machine.torch() == "2.13.0+cpu"
    assert machine.setup() == (0, "")

    machine.command("nvidia-smi", 'echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"')
    code, said = machine.setup()
    assert code == 0, said
    assert machine.torch() == "2.15.0"
    assert machine.setup() == (0, "")
    machine.command("nvidia-smi", "exit 9")
    assert machine.setup() == (0, "")  # a login node without a GPU keeps the cluster's torch

    with (machine.project / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    code, said = machine.setup()
    assert code == 0
    assert "installing llmtrain" in said
    assert machine.torch() == "2.15.0"


def test_torch_is_the_users_to_choose(machine):
    code, said = machine.setup(LLMTRAIN_TORCH="torch==2.15.0 --no-deps")
    assert code == 0, said
    assert machine.torch() == "2.15.0"
    assert machine.setup() == (0, "")
    assert machine.setup(LLMTRAIN_TORCH="torch==2.15.0 --no-deps") == (0, "")


def test_another_torch_is_exchanged_also_where_the_one_that_is_there_would_do(machine):
    """On a login node without a GPU, for nodes with GPUs; and as the warning of an old driver says."""
    code, said = machine.setup()
    assert code == 0, said
    assert machine.torch() == "2.13.0+cpu"
    shutil.rmtree(machine.wheels)
    wheel(machine.wheels, "2.12.0")
    code, said = machine.setup(LLMTRAIN_TORCH="torch>=2.11")
    assert code == 0, said
    assert machine.torch() == "2.12.0"


def test_a_torch_that_sees_no_gpu_is_announced(machine):
    """As a wheel for a newer driver is."""
    machine.command("nvidia-smi", 'echo "GPU 0: NVIDIA H200 (UUID: GPU-1)"')
    code, said = machine.setup(LLMTRAIN_TORCH="torch==2.13.0+cpu")
    assert code == 0
    assert "WARNING: this PyTorch sees no GPU" in said
    assert machine.setup() == (0, "")  # the user asked for it


def test_two_at_once(machine):
    """The second waits for the first and finds it done."""
    both = [machine.start(), machine.start()]
    said = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    assert sorted("installing llmtrain" in text for text in said) == [False, True]
    assert sum("waiting" in text for text in said) == 1


def test_pips_failure_is_told_with_its_last_lines_and_the_log(machine):
    code, said = machine.setup(LLMTRAIN_TORCH="torch==99")
    assert code == 1
    last = said.splitlines()[-1]
    assert last.startswith("setup: pip could not install torch==99")
    assert str(machine.project / ".cache" / "setup.log") in last
    assert "No matching distribution found for torch==99" in said
    code, said = machine.setup()  # the next try goes on from there
    assert code == 0, said


def test_no_python_is_one_line(machine):
    for name in ("python3", "python3.11", "python3.12", "python3.13", "python3.14"):
        machine.command(name, 'case $1 in -V) echo "Python 3.9.2" ;; *) exit 1 ;; esac')
    shutil.rmtree(machine.project / ".venv")
    code, said = machine.setup(PYTHON="")
    assert code == 1
    assert [line for line in said.splitlines() if "Python 3.11" in line] == said.splitlines()[-1:]
    assert "Python 3.9.2" in said
    assert not (machine.project / ".venv").exists()
    code, said = machine.setup(PYTHON="/no/python")
    assert code == 1
    assert "PYTHON=/no/python" in said.splitlines()[-1]


def test_an_interrupted_setup_ends_its_pip_and_can_be_started_again(machine):
    (machine.project / "backend.py").write_text("import time\ntime.sleep(60)\n")
    process = machine.start()
    log = machine.project / ".cache" / "setup.log"
    deadline = time.monotonic() + 120
    while not log.exists() or "Obtaining" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.terminate()
    process.communicate(timeout=120)
    assert process.returncode == -signal.SIGTERM
    (machine.project / "backend.py").write_text(BACKEND)
    code, said = machine.setup()
    assert code == 0, said
    assert "waiting" not in said  # nobody holds the lock


def test_sourcing_makes_a_broken_environment_anew_and_enters_it(machine):
    python = machine.project / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nonexistent/python")
    script = f"set -euo pipefail; source {machine.project}/launch/setup.sh; command -v python"
    result = subprocess.run(["bash", "-c", script], env=machine.environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines()[-1] == str(python)
    assert machine.torch() == "2.13.0+cpu"


def test_sourcing_passes_a_failure_on(machine):
    failing = f"set -e; source {machine.project}/launch/setup.sh; echo on"
    result = subprocess.run(
        ["bash", "-c", failing],
        env=machine.environment | {"PYTHON": "/no/python", "LLMTRAIN_VENV": str(machine.project / "other")},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert "on" not in result.stdout.splitlines()
