"""launch/slurm.sbatch when a signal comes as its ranks end; no Slurm takes part."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.launch.conftest import LAUNCH, stand_ins, wait_for

SRUN = """#!/bin/bash
while [[ $1 == --* ]]; do shift; done
exec "$@"
"""
SCONTROL = """#!/bin/bash
echo "$@" >>"$STAND_IN/scontrol"
[[ ! ${LATE-} ]] || kill -USR1 $PPID
[[ $1 != show || ! ${EARLY-} ]] || { read -r _ _ _ script _ <"/proc/$PPID/stat"; kill -USR1 "$script"; }
[[ $1 != show || ! ${BROKEN-} ]] || { echo "slurm_load_jobs error: Socket timed out" >&2; exit 1; }
for kind in ${SHOWN-}; do echo "     Nodes=n CPU_IDs=0-7 Mem=0 GRES=${kind#-}"; done
"""


@pytest.fixture
def job(start: Callable, environment: dict[str, str], stand_in: Path) -> Callable:
    """Run the script as a job of one task; `srun` runs its command here, and `scontrol` is noted."""
    programs = stand_in / "bin"
    programs.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    slurm = {
        "PATH": f"{programs}:{environment['PATH']}",
        "SLURM_SUBMIT_DIR": str(LAUNCH.parent),
        "SLURM_JOB_ID": f"test-{os.getpid()}",
        "SLURM_TASKS_PER_NODE": "1",
    }
    return lambda *words, **variables: start("bash", LAUNCH / "slurm.sbatch", *words, **(slurm | variables))


@pytest.mark.parametrize(("sent", "queued"), [("USR1", True), ("TERM", False)])
def test_a_signal_while_it_sets_up_ends_it_in_order(job, stand_in, sent, queued):
    repository = stand_in / "repository"
    (repository / "launch").mkdir(parents=True)
    for name in ("usage.sh", "questions.sh"):
        (repository / "launch" / name).touch()
    (repository / "launch" / "supervise.py").write_text("raise SystemExit('started all the same')")
    (repository / "launch" / "setup.sh").write_text(f"kill -{sent} $$; sleep 0.1\n")
    script = job(SLURM_SUBMIT_DIR=str(repository))
    errors = script.communicate(timeout=120)[1]
    assert script.returncode == 85, errors
    assert "started" not in errors
    assert (stand_in / "scontrol").exists() == queued


def test_a_signal_after_the_ranks_have_ended_changes_nothing(job, stand_in):
    script = job(CODE="85", LATE="1")
    errors = script.communicate(timeout=120)[1]
    assert script.returncode == 85, errors
    assert (stand_in / "scontrol").read_text().startswith("requeue test-")


def test_a_signal_as_the_ranks_end_leaves_their_code(job, stand_in):
    """Both reach the script at the same instant: it is held while they happen."""
    script = job(MODE="orderly")
    wait_for(stand_in / "started-alone")
    held = psutil.Process(script.pid)
    (supervisor,) = held.children()
    held.suspend()
    supervisor.send_signal(signal.SIGUSR1)
    deadline = time.monotonic() + 120
    while supervisor.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    script.send_signal(signal.SIGUSR1)
    held.resume()
    errors = script.communicate(timeout=120)[1]
    assert script.returncode == 85, errors
    assert "stopped and saved: queueing again" in errors
    assert stand_ins(stand_in) == []


def test_what_one_process_answers_is_asked_of_one_and_a_sweep_is_refused(job, stand_in):
    script = job("seed=1", "--cfg", "job", UNDONE="1")
    errors = script.communicate(timeout=120)[1]
    assert script.returncode == 0, errors
    assert json.loads((stand_in / "started-alone").read_text())["argv"] == ["seed=1", "--cfg", "job"]
    script = job("seed=1,2", "-m")
    errors = script.communicate(timeout=120)[1]
    assert (script.returncode, errors.count("\n")) == (78, 1) and "-m: a sweep" in errors, errors
    assert not (stand_in / "scontrol").exists()


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        ("gpu:a100:1(IDX:0) gpu:h100:1(S:0-1) gpu:1", ""),
        ("nvme:1(CNT:1),gpu:a100:1(IDX:3),shard:0(IDX:N/A)", ""),
        ("gpu:a100:1(IDX:0) -", "gpu:0 and gpu:1 a node"),
        ("gpu:1(IDX:0) gpu:a100:2(IDX:0,2),gpu:h100:1(IDX:1)", "gpu:1 and gpu:3 a node"),
        ("nvme:1(CNT:1),gpu:1(IDX:0) nvme:1(CNT:1),gpu:2(IDX:0-1)", "gpu:1 and gpu:2 a node"),
    ],
)
def test_gpus_are_counted_whatever_their_kind(job, kinds, says):
    """As Slurm's record of a job has them, a line for nodes that are alike."""
    script = job("--cfg", "job", UNDONE="1", SLURM_GPUS_ON_NODE="1", SHOWN=kinds)
    errors = script.communicate(timeout=120)[1]
    assert script.returncode == (78 if says else 0), errors
    assert errors.startswith(f"slurm: {says}" if says else ""), errors


def test_a_slurm_that_does_not_answer_ends_no_job_and_an_array_is_asked_for_its_task(job, stand_in):
    array = {"SLURM_ARRAY_JOB_ID": "7", "SLURM_ARRAY_TASK_ID": "3"}
    script = job("--cfg", "job", UNDONE="1", SLURM_GPUS_ON_NODE="1", BROKEN="1", **array)
    errors = script.communicate(timeout=120)[1]
    assert script.returncode == 0, errors
    assert "the GPUs of other nodes are not compared" in errors
    assert (stand_in / "scontrol").read_text() == "show job -d 7_3\n"


def test_a_signal_while_slurm_is_asked_queues_the_job_again(job, stand_in):
    """Then the parent of scontrol is a subshell of the script."""
    script = job(SLURM_GPUS_ON_NODE="1", EARLY="1")
    errors = script.communicate(timeout=120)[1]
    assert script.returncode == 85, errors
    asked = (stand_in / "scontrol").read_text().splitlines()
    assert [line.split()[0] for line in asked] == ["show", "requeue"]
