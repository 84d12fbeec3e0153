"""A run that is asked to stop leaves with everything saved, wherever it is and however often it is asked."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from llmtrain.config import ExitCode, UserError
from llmtrain.config.hydra import compose
from llmtrain.training.config import TrainConfig
from llmtrain.training.launcher import SUPERVISOR
from llmtrain.training.signals import SPARE_SECONDS, SPARE_SHARE, StopRequest, parse_seconds
from tests.ranks import PATCH, Job
from tests.training.pauses import PLACE
from tests.training.test_resume import records, steps


def events(run: Path, kind: str) -> list[dict]:
    lines = map(json.loads, (run / "events.jsonl").read_text().splitlines())
    return [event for event in lines if event["event"] == kind]


def wait_for(job: Job, *paths: Path, seconds: float = 240) -> None:
    deadline = time.monotonic() + seconds
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.02)


@pytest.fixture
def paused(ranks, tiny, tmp_path):
    """Start two ranks that pause in a place of tests/training/pauses.py; returns once they are there."""

    def start(place: str, at: tuple[int, ...], *overrides: str) -> Job:
        hook = {PATCH: f"tests.training.pauses:{place}", PLACE: str(tmp_path)}
        hook[SUPERVISOR] = str(tmp_path / "told")
        job = ranks.start([*tiny, *overrides], 2, tmp_path, hook)
        wait_for(job, *(tmp_path / f"at-{rank}" for rank in at))
        return job

    return start


def test_all_ranks_stop_at_one_step_and_further_signals_change_nothing(ranks, tiny, tmp_path):
    common = [*tiny, "max_steps=4000", "checkpoint.every=4000"]
    job = ranks.start(common, 2, tmp_path)
    wait_for(job, tmp_path / "run" / "metrics.jsonl")
    os.kill(job.pids[1], signal.SIGUSR1)  # as Slurm does some time before the end: one rank is enough
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM):
        job.kill(number)
    assert job.wait() == [85, 85], job.output()
    (saved,), (event,) = steps(tmp_path / "run"), events(tmp_path / "run", "signal")
    assert saved == f"step_{event['step']:08d}" == f"step_{max(records(tmp_path / 'run')):08d}"
    assert len(events(tmp_path / "run", "save")) == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
@pytest.mark.parametrize("place", ["in_prepare", "in_build"])
def test_with_nothing_to_save_a_rank_leaves_at_once(paused, tmp_path, place, number):
    """Also rank 0, which hears of it while it waits for rank 1 in a collective."""
    job = paused(place, (1,))
    job.kill(number)
    assert job.wait() == [85, 85], job.output()
    assert "nothing to save yet" in job.output()
    assert (tmp_path / "told.preempted").exists()
    told = json.loads((tmp_path / "told").read_text())
    assert told == {"run": str(tmp_path / "run"), "grace_seconds": 120, "done": False}
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_evaluation_is_cut_short_and_made_up_for(paused, ranks, tiny, tmp_path):
    """The one after the last step: the run is not done before it."""
    job = paused("in_evaluation", (0, 1), "max_steps=2", "data.validation_fraction=0.3")
    os.kill(job.pids[1], signal.SIGUSR1)
    (tmp_path / "go").touch()
    assert job.wait() == [85, 85], job.output()
    run = tmp_path / "run"
    assert not (run / "DONE").exists() and not (run / "eval" / "heldout.json").exists()
    assert steps(run) == ["step_00000002"]
    assert "eval/loss" not in (run / "metrics.jsonl").read_text()
    ranks.run([*tiny, "max_steps=2", "data.validation_fraction=0.3"], 2, tmp_path)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2 and last["eval/loss"] > 0 and last["train/loss"] > 0
    assert (run / "DONE").exists() and (run / "eval" / "heldout.json").exists()


def test_a_save_that_is_under_way_is_the_last(paused, tmp_path):
    job = paused("in_save", (0, 1), "max_steps=40", "checkpoint.every=2")
    os.kill(job.pids[0], signal.SIGTERM)
    (tmp_path / "go").touch()
    assert job.wait() == [85, 85], job.output()
    run = tmp_path / "run"
    assert steps(run) == ["step_00000002"] and sorted(records(run)) == [1, 2]
    assert len(events(run, "save")) == 1


def test_a_step_that_hangs_ends_with_the_grace(paused, tmp_path):
    """Its steps are not saved: not 85. Rank 0 is told by its own clock, or by the end of rank 1."""
    job = paused("in_step", (1,), "grace_seconds=2", "max_steps=40")
    job.kill(signal.SIGTERM)
    codes = job.wait()
    assert codes[1] == 128 + signal.SIGTERM and codes[0] in (1, codes[1]), job.output()
    assert "not done after grace_seconds=2" in job.output()


def test_a_run_stops_before_its_time_is_over(ranks, tiny, tmp_path):
    """However slow this machine is: what was trained by then is saved."""
    began = time.monotonic()
    overrides = ["max_steps=100000", "checkpoint.every=100000", "time_limit=130", "grace_seconds=120"]
    job = ranks.start([*tiny, *overrides], 2, tmp_path)
    assert job.wait() == [85, 85], job.output()
    assert time.monotonic() - began > 9
    assert "time_limit" in job.output()
    run = tmp_path / "run"
    trained = max(records(run)) if (run / "metrics.jsonl").exists() else 0
    assert not trained or steps(run) == [f"step_{trained:08d}"]


# What finishing takes


@pytest.fixture
def clock() -> list[float]:
    return [0.0]


@pytest.fixture
def stop(clock) -> StopRequest:
    """Of a process that is 100 s old and has 1000 s."""
    return StopRequest(60, time_limit=1000, age=lambda: 100.0, clock=lambda: clock[0])


def asked_at(stop: StopRequest, clock: list[float]) -> float:
    while not stop.requested:
        clock[0] += 1
        stop.look_at_clocks()
    return clock[0]


def test_until_a_save_was_measured_finishing_may_take_the_grace(stop, clock):
    stop.step_took(1)
    assert asked_at(stop, clock) == 1000 - 100 - 60
    assert stop.name == "time_limit"


def test_the_slowest_step_and_the_last_save_are_kept_free(stop, clock):
    for seconds in (500, 2, 8, 3):  # the first compiles
        stop.step_took(seconds)
    for seconds in (90, 12):
        stop.save_took(seconds)
    stop.saved = True
    assert asked_at(stop, clock) == 1000 - 100 - SPARE_SHARE * (8 + 12) - SPARE_SECONDS
    assert stop.exit_code == ExitCode.PREEMPTED


def test_the_age_is_that_of_the_job(monkeypatch):
    from llmtrain.training.signals import job_age

    assert 0 < job_age() < 1e6
    monkeypatch.setenv("LLMTRAIN_STARTED", str(time.time() - 5e6))
    assert job_age() >= 5e6


def test_85_is_said_only_where_nothing_is_lost():
    stop = StopRequest()
    assert stop.exit_code == 85
    stop.step_took(1)
    assert stop.exit_code == 143
    stop.saved = True
    assert stop.exit_code == 85


@pytest.mark.parametrize(
    ("text", "seconds"), [("01:02:03", 3723), ("100:00:00", 360000), (90, 90), ("90", "90"), ("1:2", "1:2")]
)
def test_time_limits(text, seconds):
    assert parse_seconds(text) == seconds


@pytest.mark.parametrize("value", ["-5", "1:30", "1:x:3", "soon", "0"])
def test_a_time_limit_that_is_none_is_refused(tiny, value):
    with pytest.raises(UserError, match="time_limit"):
        compose(TrainConfig, [*tiny, f"time_limit={value}"])


def test_a_time_limit_below_the_grace_is_refused(tiny):
    with pytest.raises(UserError, match="grace_seconds=120"):
        compose(TrainConfig, [*tiny, "time_limit=00:02:00"])
    assert compose(TrainConfig, [*tiny, "time_limit=01:30:00"]).time_limit == 5400
