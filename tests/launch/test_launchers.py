"""The real launchers start the real door: with as many ranks each of them writes the same metrics.jsonl."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.launch.conftest import LAUNCH
from tests.ranks import free_port
from tests.soak.lives import metrics
from tests.tiny import tiny_run

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


@pytest.fixture(scope="module")
def expected(ranks, corpus, tmp_path_factory) -> Callable[[int], list[dict[str, Any]]]:
    """metrics.jsonl of three steps of so many ranks."""

    @cache
    def trained(world: int) -> list[dict[str, Any]]:
        place = tmp_path_factory.mktemp("expected")
        words = tiny_run(corpus, tmp_path_factory.getbasetemp() / "cache", place / "run")
        ranks.run([*words, "max_steps=3"], world, place)
        return metrics(place / "run")

    return trained


@pytest.mark.parametrize(
    ("launcher", "world"),
    [
        ("deepspeed", 2),
        ("torchrun", 2),
        ("python", 1),
        pytest.param("deepspeed", 1, marks=pytest.mark.slow),
        pytest.param("torchrun", 1, marks=pytest.mark.slow),
        pytest.param("llmtrain", 1, marks=pytest.mark.slow),
    ],
)
def test_a_launcher_starts_the_door(expected, tiny, tmp_path, environment, launcher, world):
    """So many ranks write the same metrics.jsonl, whoever starts them; test_slurm.py has srun."""
    started = [*command(launcher, world), *tiny, "max_steps=3"]
    done = subprocess.run(started, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert metrics(tmp_path / "run") == expected(world)
    assert [row["step"] for row in expected(world)] == [1, 2, 3]
    assert (tmp_path / "run" / "DONE").exists()
    event = json.loads((tmp_path / "run" / "events.jsonl").read_text().splitlines()[0])
    assert event["ranks"] == world


@pytest.mark.slow
def test_the_environment_of_srun(expected, tiny, tmp_path, environment):
    """test_slurm.py has srun itself, and test_distributed.py what is made of each variable."""
    words = [*tiny, "max_steps=3"]
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
    assert metrics(tmp_path / "run") == expected(2)


@pytest.mark.quiet
def test_nothing_is_left_in_shared_memory():
    assert list(Path("/dev/shm").glob(f"deepspeed_allreduce_buffer_{os.getuid()}_*")) == []


@pytest.fixture
def sweep(tiny, tmp_path, environment) -> Callable[..., None]:
    """Run `local.sh --multirun` over two numbers of steps, with two ranks a job."""

    def run(**variables: str) -> None:
        words = ["bash", str(LAUNCH / "local.sh"), "--multirun", *tiny, "max_steps=1,2"]
        scripts = {"LLMTRAIN_SKIP_SETUP": "1", "LLMTRAIN_RANKS": "2", "PYTHONPATH": str(LAUNCH.parent)}
        whole = environment | scripts | variables
        done = subprocess.run(words, cwd=tmp_path, env=whole, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    return run


NOTES = """#!/bin/bash
echo "$*" >>"$NOTED"
echo '{"run": null, "done": true}' >"$LLMTRAIN_SUPERVISOR"
"""
"""deepspeed: notes its words, and that its check is done."""


def test_a_sweep_queues_jobs_of_several_ranks(sweep, environment, tmp_path):
    """By the real script and door, each job in a directory of its own; here nothing trains."""
    launcher = tmp_path / "bin" / "deepspeed"
    launcher.parent.mkdir()
    launcher.write_text(NOTES)
    launcher.chmod(0o755)
    sweep(PATH=f"{launcher.parent}:{environment['PATH']}", NOTED=str(tmp_path / "noted"))
    lines = (tmp_path / "noted").read_text().splitlines()
    assert all(" --num_gpus 2 --module llmtrain.train " in line for line in lines)
    jobs = [dict(word.split("=", 1) for word in shlex.split(line) if "=" in word) for line in lines]
    assert [(job["max_steps"], job["output_dir"]) for job in jobs] == [
        (str(number + 1), f"{tmp_path}/run-{number}") for number in (0, 1)
    ]


@pytest.mark.slow
def test_a_sweep_trains_one_job_after_another(sweep, tmp_path):
    sweep()
    for number in (0, 1):
        run = tmp_path / f"run-{number}"
        assert len(metrics(run)) == number + 1
        assert json.loads((run / "events.jsonl").read_text().splitlines()[0])["ranks"] == 2
