"""A rank that fails leaves a file that says what of; the ranks that fail for it leave the word to it."""

from __future__ import annotations

import json
import re
import socket
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from llmtrain.config import UserError
from llmtrain.distributed import World
from llmtrain.training.crashes import AnotherRankError, Crashes
from llmtrain.training.heartbeat import Heart
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.watchdog import Watchdog
from tests.ranks import PATCH
from tests.training import faults


def crash(run: Path, rank: int) -> dict:
    return json.loads((run / f"crash-rank{rank}.json").read_text())


def failed(ranks, tiny, tmp_path, fault: str, phase: str = "backward", step: int = 3):
    hook = {PATCH: f"tests.training.faults:{fault}", faults.PHASE: phase, faults.STEP: str(step)}
    job = ranks.start([*tiny, "checkpoint.every=2"], 2, tmp_path, hook)
    return job, job.wait(), tmp_path / "run"


def test_the_first_error_has_the_word_and_no_key_is_told(ranks, tiny, tmp_path):
    job, codes, run = failed(ranks, tiny, tmp_path, "fail")
    assert codes == [1, 1], job.output()
    first, second = crash(run, 1), crash(run, 0)
    assert (first["rank"], first["step"], first["phase"]) == (1, 3, "backward")
    assert first["host"] == socket.gethostname()
    assert (first["type"], first["secondary"]) == ("LookupError", False)
    assert first["message"].startswith("no such thing as <left out>")
    assert first["traceback"][0].startswith("Traceback") and "fault" in "".join(first["traceback"])
    assert faults.KEY not in (run / "crash-rank1.json").read_text()
    assert second["secondary"] is True and second["traceback"]
    line = f"error: another rank failed: rank 1 on host {socket.gethostname()}: LookupError: no such thing as"
    assert job.outputs[0].read_text().count(line) == 1
    assert "Traceback" not in job.outputs[0].read_text()
    (event,) = [event for event in RunDirectory(run).read_events() if event["event"] == "crash"]
    assert (event["rank"], event["step"], event["type"]) == (1, 3, "LookupError")
    assert event["message"] == first["message"] and event["file"] == "crash-rank1.json"
    assert '<span class="chip warn">crash</span>' in (run / "report.html").read_text()

    ranks.run([*tiny, "max_steps=4"], 2, tmp_path)
    assert not list(run.glob("crash-*")) and (run / "DONE").exists()
    assert {file.name for file in (run / "crashes").iterdir()} == {"crash-rank0.json", "crash-rank1.json"}
    assert "no such thing as" in (run / "report.html").read_text()


@pytest.mark.slow
def test_a_mistake_of_the_user_is_kept_too(ranks, tiny, tmp_path):
    job, codes, run = failed(ranks, tiny, tmp_path, "fail_as_a_user_may", "data")
    assert codes == [1, 78], job.output()
    assert (crash(run, 1)["type"], crash(run, 1)["phase"]) == ("UserError", "data")
    assert "another rank failed: rank 1" in job.outputs[0].read_text()


@pytest.mark.slow
def test_a_rank_that_was_killed_is_gone_without_a_word(ranks, tiny, tmp_path):
    job, codes, run = failed(ranks, tiny, tmp_path, "end_at_once", "reduce")
    assert codes == [1, -9], job.output()
    assert crash(run, 0)["secondary"] is True
    assert "another rank failed: it is gone without a word" in job.outputs[0].read_text()
    assert not (run / "crash-rank1.json").exists()
    (event,) = [event for event in RunDirectory(run).read_events() if event["event"] == "crash"]
    assert event["rank"] is None and event["message"].startswith("it is gone without a word")
    assert '<span class="chip warn">crash</span>' in (run / "report.html").read_text()


def test_the_earliest_crash_of_this_job_is_the_first_whatever_its_rank(tmp_path):
    directory = RunDirectory(tmp_path)

    def write(rank: int, time: str, **changed: object) -> None:
        of_job = {"job": "job", "host": "a", "rank": rank, "step": 3, "time": time, "secondary": False}
        directory.write_json(f"crash-rank{rank}.json", {**of_job, "type": "E", "message": "m\nn", **changed})

    crashes = Crashes(directory, World(0, 5), "job")
    assert "gone without a word" in crashes.first(ValueError("closed"))
    write(1, "2026-01-01T00:00:05.000+00:00")
    write(2, "2026-01-01T00:00:04.000+00:00")
    write(3, "2026-01-01T00:00:01.000+00:00", secondary=True)
    write(4, "2026-01-01T00:00:02.000+00:00", job="an earlier one")
    assert crashes.first(ValueError("closed")) == f"rank 2 on host a: E: m; see {tmp_path}/crash-rank2.json"


@pytest.mark.parametrize(
    ("error", "rank", "told"),
    [
        (LookupError("no such thing"), 1, [1]),
        (RuntimeError("gloo: closed by peer"), None, [None]),  # of rank 0: it is gone, others have noticed
        (AnotherRankError("another rank cannot read its text"), None, []),  # which says so itself
    ],
)
def test_of_all_ranks_that_fail_one_tells_the_event(tmp_path, error, rank, told):
    directory, last = RunDirectory(tmp_path), Heart().last
    directory.heartbeats.mkdir()
    for number in (1, 2):
        Crashes(directory, World(number, 3), "job").keep(error, last, secondary=rank is None, begun=True)
    assert [event["rank"] for event in directory.read_events()] == told
    watchdog = Watchdog(directory, World(), Heart(), None, "the next job")
    watchdog.begin()
    assert [file.name for file in directory.heartbeats.iterdir()] == ["rank_00000.json"]


def test_a_mistake_before_the_run_begins_is_told_to_the_others_and_leaves_nothing(tmp_path):
    directory, heart = RunDirectory(tmp_path), Heart()
    watchdogs = [Watchdog(directory, World(rank, 2), heart, None, "job") for rank in range(2)]
    for watchdog in watchdogs:
        watchdog.start()
    crashes = [Crashes(directory, World(rank, 2), "job") for rank in range(2)]
    crashes[1].keep(UserError("no such file"), heart.last, secondary=False, begun=False)
    watchdogs[1].stop()
    crashes[0].keep(RuntimeError("closed by peer"), heart.last, secondary=True, begun=False)
    assert re.fullmatch(
        "rank 1 on host .*: UserError: no such file", crashes[0].first(RuntimeError("closed"))
    )
    watchdogs[0].stop()
    assert list(tmp_path.iterdir()) == []


def test_ranks_may_leave_the_start_at_the_same_time(tmp_path):
    watchdogs = [Watchdog(RunDirectory(tmp_path), World(rank, 2), Heart(), None, "job") for rank in range(2)]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(300):
            for watchdog in watchdogs:
                watchdog._write()
            list(pool.map(Watchdog._leave_start, watchdogs))
            assert list(tmp_path.iterdir()) == []


def test_a_job_that_finds_the_directory_locked_touches_nothing(ranks, tiny, tmp_path):
    directory = RunDirectory(tmp_path / "run")
    directory.lock()
    job = ranks.start(tiny, 1, tmp_path)
    assert job.wait() == [73], job.output()
    assert [path.name for path in directory.path.iterdir()] == [".lock"]
    directory.unlock()


def test_a_directory_that_cannot_be_locked_is_told_in_one_line(ranks, tiny, tmp_path):
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    job = ranks.start(tiny, 2, tmp_path)
    assert job.wait() == [78, 78], job.output()
    (line,) = [line for line in job.output().splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: output_dir={tmp_path}/run: cannot be locked: ")
