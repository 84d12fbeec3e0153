"""The real launchers start the real door: with as many ranks each of them writes the same metrics.jsonl."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.conftest import LAUNCH
from tests.ranks import free_port
from tests.soak.lives import metrics

BIN = Path(sys.executable).parent


def command(launcher: str, ranks: int) -> list[str]:
    """Without a launcher there is one rank."""
    port = str(free_port())
    return {
        "deepspeed": [
            *(str(BIN / "deepspeed"), "--hostfile", "/dev/null", "--num_gpus", str(ranks)),
            *("--master_port", port, "--module", "llmtrain.train"),
        ],
        "torchrun": [
            *(str(BIN / "torchrun"), "--nproc-per-node", str(ranks), "--master-port", port),
            *("-m", "llmtrain.train"),
        ],
        "python": [sys.executable, "-m", "llmtrain.train"],
        "llmtrain": [str(BIN / "llmtrain"), "train"],
    }[launcher]


@pytest.fixture(scope="module")
def environment() -> dict[str, str]:
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize(
    ("launcher", "world"),
    [("deepspeed", 2), ("torchrun", 2), ("deepspeed", 1), ("torchrun", 1), ("python", 1), ("llmtrain", 1)],
)
def test_a_launcher_starts_the_door(ranks, tiny, tmp_path, environment, launcher, world):
    """So many ranks write the same metrics.jsonl, whoever starts them; test_slurm.py has srun."""
    words = [*tiny, "max_steps=3"]
    ranks.run([*words, f"output_dir={tmp_path}/expected"], world, tmp_path)
    started = [*command(launcher, world), *words]
    done = subprocess.run(started, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = metrics(tmp_path / "expected")
    assert metrics(tmp_path / "run") == expected
    assert [row["step"] for row in expected] == [1, 2, 3]
    assert (tmp_path / "run" / "DONE").exists()
    event = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    assert event["ranks"] == world


def test_the_environment_of_srun(ranks, tiny, tmp_path, environment):
    words = [*tiny, "max_steps=3"]
    ranks.run([*words, f"output_dir={tmp_path}/expected"], 2, tmp_path)
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
        task_words = [sys.executable, "-m", "llmtrain.train", *words]
        processes.append(subprocess.Popen(task_words, cwd=tmp_path, env={**environment, **slurm}))
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    assert metrics(tmp_path / "run") == metrics(tmp_path / "expected")


@pytest.mark.quiet
def test_nothing_is_left_in_shared_memory():
    assert list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")) == []


def test_a_sweep_queues_jobs_of_several_ranks(tiny, tmp_path, environment):
    """Each in a directory of its own."""
    sweep = ["bash", str(LAUNCH / "local.sh"), "--multirun", *tiny, "max_steps=1,2"]
    scripts = {"LLMTRAIN_SKIP_SETUP": "1", "LLMTRAIN_RANKS": "2", "PYTHONPATH": str(LAUNCH.parent)}
    done = subprocess.run(sweep, cwd=tmp_path, env=environment | scripts, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for number in (0, 1):
        run = tmp_path / f"run-{number}"
        assert len(metrics(run)) == number + 1
        assert json.loads((run / "events.jsonl").read_text().splitlines()[0])["ranks"] == 2
