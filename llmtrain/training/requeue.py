"""A job that Slurm queues again is the same job: what it began anew, it goes on with."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING

from llmtrain.training.run_directory import RunDirectory

if TYPE_CHECKING:
    from llmtrain.training.config import TrainConfig


def scheduled_job(environment: Mapping[str, str] = os.environ) -> str | None:
    """The job's name for its whole life, requeues included; None where no scheduler started it."""
    if job := environment.get("SLURM_JOB_ID"):
        return f"{environment.get('SLURM_CLUSTER_NAME', 'slurm')} {job}"
    return None


def same_job_goes_on(config: TrainConfig, environment: Mapping[str, str] = os.environ) -> TrainConfig:
    """`resume=never` as `auto` in a requeued job whose run has begun: its start event names the job.

    Before that there is only an older run in the directory, which is set aside as asked. All ranks read the
    same: they meet before rank 0 writes.
    """
    if config.resume != "never" or int(environment.get("SLURM_RESTART_COUNT") or 0) == 0:
        return config
    starts = [event for event in RunDirectory(config.output_dir).read_events() if event["event"] == "start"]
    if not any(event.get("job") == scheduled_job(environment) for event in starts):
        return config
    return config.model_copy(update={"resume": "auto"})
