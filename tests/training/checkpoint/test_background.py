"""`checkpoint.asynchronous` through the train door: the same files; a rank that died is not waited for."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pytest

from llmtrain.training.checkpoint.manifest import verify
from llmtrain.training.checkpoint.reading import rank_file
from tests.ranks import PATCH
from tests.training.pauses import PLACE


def saves(run: Path) -> list[dict]:
    file = run / "events.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == "save"]


def test_the_same_checkpoints_as_at_once(ranks, tiny, tmp_path):
    common = [
        *tiny,
        "deepspeed=zero2",
        "precision=bf16",
        "max_steps=7",
        "checkpoint.every=3",
        "checkpoint.keep=3",
    ]
    for way in ("false", "true"):
        arguments = [f"checkpoint.asynchronous={way}", f"output_dir={tmp_path}/{way}"]
        ranks.run([*common, *arguments], 2, tmp_path)
    at_once, meanwhile = saves(tmp_path / "false"), saves(tmp_path / "true")
    assert [save["step"] for save in meanwhile] == [save["step"] for save in at_once] == [3, 6, 7]
    assert all(save["stall_seconds"] == save["seconds"] for save in at_once)
    assert all(save["stall_seconds"] < save["seconds"] for save in meanwhile[:2])
    for save in meanwhile:
        one, other = (tmp_path / way / "checkpoints" / save["path"] for way in ("true", "false"))
        verify(one)
        for rank in range(2):
            assert (one / rank_file(rank)).read_bytes() == (other / rank_file(rank)).read_bytes()


def test_every_rank_hears_what_a_save_takes(ranks, tiny, tmp_path):
    """Those in the background, too: a time limit has to leave room for the last one."""
    hook = {PATCH: "tests.training.pauses:time_of_saves", PLACE: str(tmp_path)}
    arguments = ["max_steps=7", "checkpoint.every=3", "checkpoint.asynchronous=true"]
    job = ranks.start([*tiny, *arguments], 2, tmp_path, hook)
    assert job.wait() == [0, 0], job.output()
    took = [float(seconds) for seconds in (tmp_path / "took-0").read_text().split()]
    assert took == [save["seconds"] for save in (saves(tmp_path / "run")[at] for at in (0, 2))]
    assert (tmp_path / "took-1").read_text() == (tmp_path / "took-0").read_text()


@pytest.mark.parametrize("asynchronous", ["false", "true"])
def test_a_rank_that_dies_in_a_save_is_not_waited_for(ranks, tiny, tmp_path, asynchronous):
    """Rank 1 stops in the midst of its part and is killed there: rank 0 hears of it at once and ends."""
    run = tmp_path / "run"
    arguments = ["max_steps=9000", "checkpoint.every=20", f"checkpoint.asynchronous={asynchronous}"]
    job = ranks.start([*tiny, *arguments], 2, tmp_path)
    deadline = time.monotonic() + 240
    while not saves(run):
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.02)
    while not list((run / "checkpoints").glob(".tmp-*/rank_00001*")):
        assert time.monotonic() < deadline, job.output()
    os.kill(job.pids[1], signal.SIGKILL)
    killed = time.monotonic()
    codes = job.wait(120)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, -signal.SIGKILL)
    assert time.monotonic() - killed < 60, "rank 0 waited for a rank that was gone"  # patience is 300 s
    for path in (run / "checkpoints").glob("step_*"):
        verify(path)
