"""`resume=never` in a job that Slurm queues again."""

from __future__ import annotations

import json

import pytest

from llmtrain.config.hydra import compose
from llmtrain.training.config import TrainConfig
from llmtrain.training.requeue import same_job_goes_on, scheduled_job

JOB = {"SLURM_CLUSTER_NAME": "big", "SLURM_JOB_ID": "7"}
AGAIN = {**JOB, "SLURM_RESTART_COUNT": "1"}


@pytest.mark.parametrize(
    ("resume", "began_by", "environment", "expected"),
    [
        ("never", JOB, AGAIN, "auto"),
        ("never", JOB, JOB, "never"),  # by hand, in an allocation
        ("never", JOB, {**AGAIN, "SLURM_JOB_ID": "8"}, "never"),  # preempted before it began
        ("never", None, AGAIN, "never"),
        ("never", {}, AGAIN, "never"),
        ("never", {}, {}, "never"),
        ("auto", JOB, AGAIN, "auto"),
    ],
)
def test_only_a_requeue_of_the_job_that_began_the_run_goes_on(
    tiny, tmp_path, resume, began_by, environment, expected
):
    """`began_by`: the environment of the run that is there, None without one."""
    if began_by is not None:
        (tmp_path / "run").mkdir()
        event = {"event": "start", "job": scheduled_job(began_by)}
        (tmp_path / "run" / "events.jsonl").write_text(json.dumps(event) + "\n")
    config = compose(TrainConfig, [*tiny, f"resume={resume}"])
    assert same_job_goes_on(config, environment).resume == expected
