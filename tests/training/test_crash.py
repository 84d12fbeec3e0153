"""A rank that fails leaves a file that says what of; the ranks that fail for it leave the word to it."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

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


def test_a_job_that_finds_the_directory_locked_touches_nothing(ranks, tiny, tmp_path):
    from llmtrain.training.run_directory import RunDirectory

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
    (line,) = [line for line in job.outputs[0].read_text().splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: output_dir={tmp_path}/run: cannot be locked: ")
