"""The real launchers start the real door: two ranks by each of them train the same losses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import LAUNCH
from tests.ranks import free_port

BIN = Path(sys.executable).parent


def commands(port: int) -> dict[str, list[str]]:
    return {
        "deepspeed": [
            *(str(BIN / "deepspeed"), "--hostfile", "/dev/null", "--num_gpus", "2"),
            *("--master_port", str(port), "--module", "llmtrain.train"),
        ],
        "torchrun": [
            *(str(BIN / "torchrun"), "--nproc-per-node", "2", "--master-port", str(port)),
            *("-m", "llmtrain.train"),
        ],
        "python": [sys.executable, "-m", "llmtrain.train"],
        "llmtrain": [str(BIN / "llmtrain"), "train"],
    }


def losses(run: Path) -> list[float]:
    return [json.loads(line)["train/loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.fixture
def expected(ranks, tiny, tmp_path) -> list[float]:
    ranks.run([*tiny, "max_steps=3", f"output_dir={tmp_path}/expected"], 2, tmp_path)
    return losses(tmp_path / "expected")


@pytest.mark.parametrize("launcher", ["deepspeed", "torchrun", "python", "llmtrain"])
def test_a_launcher_starts_the_door(tiny, tmp_path, environment, expected, launcher):
    command = [*commands(free_port())[launcher], *tiny, "max_steps=3"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-6)
    assert (tmp_path / "run" / "DONE").exists()
    event = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    assert event["ranks"] == (2 if launcher in ("deepspeed", "torchrun") else 1)


def test_the_environment_of_srun(tiny, tmp_path, environment, expected):
    port = str(free_port())
    processes = []
    for task in range(2):
        slurm = {
            "SLURM_PROCID": str(task),
            "SLURM_LOCALID": str(task),
            "SLURM_NTASKS": "2",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_ID": "0",
            "SLURM_NODEID": "0",
            "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_LAUNCH_NODE_IPADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        command = [sys.executable, "-m", "llmtrain.train", *tiny, "max_steps=3"]
        processes.append(subprocess.Popen(command, cwd=tmp_path, env={**environment, **slurm}))
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    assert losses(tmp_path / "run") == pytest.approx(expected, abs=1e-6)


@pytest.mark.quiet
def test_nothing_is_left_in_shared_memory():
    assert list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")) == []


def test_a_sweep_queues_jobs_of_several_ranks(tiny, tmp_path, environment):
    """Each in a directory of its own."""
    command = ["bash", str(LAUNCH / "local.sh"), "--multirun", *tiny, "max_steps=1,2"]
    scripts = {"LLMTRAIN_SKIP_SETUP": "1", "LLMTRAIN_RANKS": "2", "PYTHONPATH": str(LAUNCH.parent)}
    done = subprocess.run(command, cwd=tmp_path, env=environment | scripts, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number in (0, 1):
        run = tmp_path / f"run-{number}"
        assert len(losses(run)) == number + 1
        assert json.loads((run / "events.jsonl").read_text().splitlines()[0])["ranks"] == 2
