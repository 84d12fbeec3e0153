"""`llmtrain status` on a real run: at work, hung, killed, asked to stop and done."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from llmtrain.status import main
from llmtrain.training import status as status_module
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.status import status_of
from tests.ranks import Job

PATIENCE = 8
"""Seconds; a step of these runs takes less on the slowest machine."""


def asked(run: Path, capsys: pytest.CaptureFixture[str], code: int) -> dict[str, Any]:
    """What `--json` answers, with this exit code."""
    assert main([str(run), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def wait_for(job: Job, run: Path, state: str, step: int = 0) -> None:
    deadline = time.monotonic() + 120
    while True:
        if (run / "config.yaml").exists():
            seen = status_of(run)
            if seen.state == state and seen.step >= step:
                return
            assert time.monotonic() < deadline, f"{seen}\n{job.output()}"
        time.sleep(0.05)


def files(run: Path) -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def test_a_run_through_its_lives(ranks, tiny, tmp_path, capsys):
    run = tmp_path / "run"
    endless = ["max_steps=100000", "scheduler=constant", "checkpoint.every=5", "logger.progress=auto"]
    common = [*tiny, *endless, f"hang_timeout={PATIENCE}"]
    job = ranks.start(common, 2, tmp_path)
    wait_for(job, run, "running", step=7)
    seen = asked(run, capsys, 0)
    assert (seen["state"], seen["max_steps"], seen["events"]["start"]) == ("running", 100000, 1)
    assert seen["tokens"] == seen["step"] * 512 and 0 < seen["loss"] < 7 and seen["tokens_per_second"] > 0
    assert seen["seconds_left"] > 0
    assert re.fullmatch(r"in \w+( of source \w+)? of step \d+, 2 ranks", seen["why"])
    assert (seen["owner"]["pid"], seen["owner"]["host"]) == (job.pids[0], socket.gethostname())
    assert seen["checkpoint"]["step"] >= 5 and 0 <= seen["checkpoint"]["age_seconds"] < 120
    assert sum(seen["goodput"].values()) == pytest.approx(1)
    assert main([str(run)]) == 0
    shown = capsys.readouterr().out
    assert f"process {job.pids[0]} on {socket.gethostname()}" in shown and " left\n" in shown

    for pid in job.pids:
        os.kill(pid, signal.SIGSTOP)
    wait_for(job, run, "hung")
    why = asked(run, capsys, 1)["why"]
    assert re.match(r"ranks 0 on host \S+ and 1 on host \S+ have given no sign of life for \d+ s", why), why

    job.kill()
    job.wait()
    speaker, other = (file.read_text() for file in job.outputs)
    for said in ("2 ranks on cpu, fp32, ZeRO 1 · attention sdpa (the fused one", " tok/s  "):
        assert said in speaker and said not in other, "rank 0 alone speaks"
    assert "\x1b" not in speaker
    seen = asked(run, capsys, 1)
    assert seen["state"] == "dead" and seen["owner"] is None and seen["seconds_left"] is None
    assert re.search(r"ended without a word, last heard of in \w+( of source \w+)? of step \d+", seen["why"])

    job = ranks.start(common, 1, tmp_path)
    wait_for(job, run, "running", step=seen["step"] + 1)
    job.kill(signal.SIGTERM)
    job.wait()
    stopped = asked(run, capsys, 0)
    assert (stopped["state"], stopped["owner"]) == ("stopped", None)
    assert stopped["why"] == f"by SIGTERM after step {stopped['step']}; the same command goes on"

    last = stopped["step"] + 2
    output = ranks.run([*common, f"max_steps={last}"], 1, tmp_path).output()
    before = files(run)
    seen = asked(run, capsys, 0)
    assert files(run) == before, "nothing is written"
    assert (seen["state"], seen["step"], seen["checkpoint"]["step"]) == ("finished", last, last)
    assert (seen["events"]["start"], seen["events"]["resume"], seen["events"]["end"]) == (1, 2, 1)
    assert seen["newest_events"][-1]["event"] == "end"
    assert output.count("1 rank on cpu, fp32, ZeRO 1 · attention sdpa (the fused one of a CPU;") == 1
    tokens = r"\S+ tokens in \d+ steps · loss \d\.\d{4} · .*, \d+\.\d % of it in training"
    assert re.search(tokens, output) and f"checkpoint:  {run}/checkpoints/step_{last:08d}\n" in output
    assert "\x1b" not in output


# What an ended run left behind


@pytest.fixture
def ended(tmp_path: Path) -> RunDirectory:
    directory = RunDirectory(tmp_path / "run")
    directory.path.mkdir()
    directory.config.write_text("max_steps: 10\nhang_timeout: 600\n")
    directory.append_event("start", step=0, seconds={})
    beat = {"job": "this", "rank": 0, "host": "a", "pid": 7, "phase": "forward", "step": 3, "turn": 1,
            "waits": False, "collectives": 0, "beat": 0.0, "source": "", "seconds": 1.0,
            "time": time.time(), "answers": False, "goodput": {"productive": 3.0, "idle": 1.0},
            "trained": 2}  # fmt: skip
    directory.write_json("heartbeats/rank_00000.json", beat)
    return directory


def crash(directory: RunDirectory, rank: int, time: str, *, secondary: bool) -> None:
    said = {"time": time, "host": "b", "rank": rank, "type": "OSError", "message": f"of {rank}\nmore"}
    directory.write_json(f"crash-rank{rank}.json", {**said, "secondary": secondary})


def test_an_error_is_that_of_the_rank_that_failed_first(ended: RunDirectory) -> None:
    crash(ended, 0, "2999-01-01", secondary=True)
    crash(ended, 1, "2999-01-03", secondary=False)
    crash(ended, 2, "2999-01-02", secondary=False)
    seen = status_of(ended.path)
    assert (seen.state, seen.why) == ("failed", "rank 2 on host b: OSError: of 2")
    assert seen.goodput == {"productive": 0.75, "idle": 0.25}
    for rank in (0, 1, 2):
        crash(ended, rank, "1999-01-01", secondary=False)
    assert status_of(ended.path).state == "dead", "an earlier job's"


@pytest.mark.parametrize(
    ("event", "state", "why"),
    [
        ({"kind": "hang", "verdict": "rank 1 sleeps"}, "hung", "rank 1 sleeps; the job ended itself"),
        ({"kind": "end"}, "failed", "every step is saved; DONE could not be written"),
        ({"kind": "save_failed"}, "dead", "ended without a word"),
        ({"kind": "save_failed", "step": 10}, "failed", "the last step could not be saved"),
        ({"kind": "rewind"}, "stopped", "to go back before a loss spike; the same command does"),
        ({"kind": "save"}, "dead", "ended without a word, last heard of in forward of step 3"),
    ],
)
def test_the_last_word_of_a_run(ended: RunDirectory, event: dict[str, Any], state: str, why: str) -> None:
    ended.append_event(**{"step": 9, **event})
    seen = status_of(ended.path)
    assert seen.state == state and seen.why.startswith(why)
    ended.append_event("resume", step=9, seconds={})
    assert status_of(ended.path).state == "dead", "another process began, and said nothing"


def test_a_process_that_does_not_train_yet_is_starting(ended: RunDirectory) -> None:
    ended.lock()
    assert status_of(ended.path).state == "starting", "the heartbeat is another process's"
    beat = ended.read_json("heartbeats/rank_00000.json") | {"pid": os.getpid()}
    ended.write_json(".starting/rank_00000.json", beat | {"phase": "build"})
    assert status_of(ended.path).why == "in build, 1 rank"
    written = ended.config.rename(ended.path / "aside")
    assert (status_of(ended.path).state, status_of(ended.path).max_steps) == ("starting", None)
    written.rename(ended.config)
    (ended.starting / "rank_00000.json").unlink()
    ended.write_json("heartbeats/rank_00000.json", beat | {"time": time.time()})
    assert status_of(ended.path).state == "running"
    ended.unlock()


def test_a_run_on_a_machine_whose_locks_are_not_seen_here(ended: RunDirectory) -> None:
    owner = {"host": "far", "pid": 7, "boot_id": "another", "started": "2026-01-01T00:00:00+00:00"}
    lock = ended.path / ".lock"
    lock.write_text(json.dumps(owner))
    seen = status_of(ended.path)
    assert (seen.state, seen.owner) == ("running", owner), "its owner has just touched the record"
    os.utime(lock, (time.time() - 100, time.time() - 100))
    assert status_of(ended.path).owner is None


def test_time_left_is_the_pace_of_this_process_with_what_is_between_the_steps(ended: RunDirectory) -> None:
    parts = dict.fromkeys((f"goodput/{part}_seconds" for part in status_module.PARTS), 0.0)
    lines = [{"step": 1, "perf/step_seconds": 2.0, **parts}]
    assert status_module._seconds_left(lines, 10) == 18.0, "one step is all there is to go by"
    lines.append({**lines[0], "step": 2, "goodput/idle_seconds": 500.0, "goodput/productive_seconds": 2.0})
    lines.append(
        {**lines[1], "step": 4, "goodput/productive_seconds": 6.0, "goodput/checkpoint_seconds": 1.0}
    )
    assert status_module._seconds_left(lines, 10) == 6 * (4 + 1) / 2, "not the time between two processes"
    evaluated = {"step": 0, "eval/loss": 3.0}  # of the checkpoint that the run begins from
    assert status_module._seconds_left([evaluated, *lines], 10) == 15.0
    assert status_module._seconds_left([evaluated], 10) is None


def test_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(tmp_path)]) == 78
    assert capsys.readouterr().err == (
        f"error: {tmp_path}/config.yaml: no such file; is {tmp_path} the directory of a run?\n"
    )
