"""A disk that is full for one rank or for all fails a save, not the run: real small disks, real limits."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config import UserError
from llmtrain.training.checkpoint import check_space, saving
from llmtrain.training.checkpoint.manifest import verify
from tests.ranks import PATCH, Job
from tests.training.checkpoint.small import Told, config, names, record, saver, state
from tests.training.faults import PHASE, STEP

SMALL = 3 << 20


def disk(place: Path, size: int) -> Iterator[Path]:
    """A file system of its own of so many bytes."""
    place.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True
    )
    if mounted.returncode:
        pytest.skip(f"may not mount: {mounted.stderr.decode().strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    yield from disk(tmp_path / "disk", SMALL)


@pytest.fixture
def run_disk(tmp_path) -> Iterator[Path]:
    yield from disk(tmp_path / "disk", 40 << 20)


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    file = run / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == kind]


def until(job: Job, found: Any) -> None:
    deadline = time.monotonic() + 240
    while not found():
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.02)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_fills_up_while_it_is_written(small_disk, monkeypatch, asynchronous):
    """The kernel says it, in the midst of a file; what was saved before stands, and room is given back."""
    told = Told([], [])
    one = saver(small_disk, told=told, asynchronous=asynchronous)
    one.save(state(1), record(1))
    one.join()
    monkeypatch.setattr(saving, "free_bytes", lambda _: 1 << 40)  # room, as far as anybody knows
    one.save(state(2, 700_000), record(2))
    assert not one.join()
    assert "No space left on device" in told.failed[0].reason
    assert names(small_disk) == ["step_00000001"]
    one.save(state(3), record(3))
    assert one.join()
    assert names(small_disk) == ["step_00000001", "step_00000003"]
    for name in names(small_disk):
        verify(small_disk / name)


def test_what_is_known_not_to_fit_is_not_begun(small_disk):
    told = Told([], [])
    one = saver(small_disk, told=told)
    one.save(state(1, 700_000), record(1))
    assert told.failed[0].needed > SMALL >= told.failed[0].free
    assert names(small_disk) == []
    with pytest.raises(UserError, match=r"3 checkpoints of 1,100,000 bytes need 3,300,000 bytes"):
        check_space(small_disk / "run" / "checkpoints", 1_100_000, config(), evaluated=False)
    check_space(small_disk, 1_000_000, config(), evaluated=False)
    with pytest.raises(UserError, match="4 checkpoints"):
        check_space(small_disk, 1_000_000, config(), evaluated=True)  # the best stays, too
    one.save(state(2), record(2))
    check_space(small_disk, 1_100_000, config(), evaluated=False)  # what stands goes when newer ones come


def test_a_run_whose_disk_is_full_for_a_while(ranks, tiny, tmp_path, run_disk):
    """For all ranks, and for every line: the run goes on, and so do its checkpoints and metrics."""
    run, ballast = run_disk / "run", run_disk / "ballast"
    job = ranks.start([*tiny, f"output_dir={run}", "max_steps=9000", "checkpoint.every=30"], 2, tmp_path)
    until(job, lambda: len(events(run, "save")) >= 2)
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(b"x" * (1 << 16)):
                pass
        except OSError:
            pass
    until(job, lambda: "could not be written" in job.output())
    ballast.unlink()
    until(job, lambda: events(run, "save_failed"))
    failed = events(run, "save_failed")[0]["step"]
    until(job, lambda: events(run, "save")[-1]["step"] > failed)
    os.kill(job.pids[0], 15)
    assert job.wait() == [85, 85], job.output()
    lines = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, len(lines) + 1))
    for path in (run / "checkpoints").iterdir():
        verify(path)


def test_a_disk_that_is_full_for_one_rank_ends_the_run_after_three_saves(ranks, tiny, tmp_path):
    """Rank 1 may write no file as large as its part; every rank hears of it, and none waits."""
    run = tmp_path / "run"
    job = ranks.start([*tiny, "max_steps=3000", "checkpoint.every=5"], 2, tmp_path)
    until(job, lambda: events(run, "save"))
    resource.prlimit(job.pids[1], resource.RLIMIT_FSIZE, (100_000, 100_000))
    assert job.wait() == [1, 1], job.output()
    first, *_, last = events(run, "save_failed")
    assert "rank 1: " in first["reason"]
    assert "File too large" in first["reason"]
    assert last["step"] - first["step"] == 10  # the run went on between them
    assert "3 saves in a row failed" in job.output()
    assert f"{last['needed']:,} bytes needed" in job.output()
    assert str(run / "checkpoints") in job.output()
    assert not (run / "DONE").exists()
    stand = names(run / "checkpoints")
    assert stand == [f"step_{first['step'] - back:08d}" for back in (10, 5) if first["step"] > back]
    for name in stand:
        verify(run / "checkpoints" / name)


def test_a_last_step_that_is_not_saved_is_not_done(ranks, tiny, tmp_path):
    run = tmp_path / "run"
    words = [*tiny, "max_steps=9", "checkpoint.every=7"]
    environment = {PATCH: "tests.training.faults:fill_the_disk", PHASE: "data", STEP: "8"}
    job = ranks.start(words, 2, tmp_path, environment)
    assert job.wait() == [1, 1], job.output()
    assert "ended after step 9, which is not saved" in job.output()
    assert "goes on from step 7" in job.output()
    assert not (run / "DONE").exists()
    assert events(run, "end") == [] and len(events(run, "save_failed")) == 1
    page = (run / "report.html").read_text()
    assert "not finished" in page and "save_failed" in page

    job = ranks.start(words, 2, tmp_path, {PATCH: "tests.training.faults:refuse_done"})
    assert job.wait() == [1, 1], job.output()
    (line,) = [line for line in job.output().splitlines() if "DONE" in line]
    assert line.startswith(f"{run}/DONE: File too large; every step is saved: make room, and the same ")
    assert "Traceback" not in job.output() and not (run / "DONE").exists()
    ranks.run(words, 2, tmp_path)
    assert (run / "DONE").exists()
