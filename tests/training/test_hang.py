"""A job that hangs says who, where and since when, leaves its stacks and ends with 86, and goes on."""

from __future__ import annotations

import fcntl
import html
import json
import os
import re
import shutil
import signal
import socket
import threading
import time
from pathlib import Path
from typing import get_args

import pytest

from llmtrain.config import ExitCode
from llmtrain.data.prepare import SMALL
from llmtrain.distributed import World
from llmtrain.training.hang import Vital, verdict
from llmtrain.training.heartbeat import Beat, Heart, Phase
from llmtrain.training.run_directory import RunDirectory
from llmtrain.training.watchdog import Watchdog
from tests.ranks import PATCH, Job
from tests.training import faults
from tests.training.test_resume import records

TIMEOUT = 8
"""Seconds; a step of these runs takes less on the slowest machine."""

HOST = re.escape(socket.gethostname())


def events(run: Path, kind: str) -> list[dict]:
    lines = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [line for line in lines if line["event"] == kind]


def wait_for_step(job: Job, run: Path, step: int) -> None:
    deadline = time.monotonic() + 120
    while max((line["step"] for line in RunDirectory(run).read_metrics()), default=0) < step:
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.05)


def wait_for_heartbeat(job: Job, run: Path, rank: int, step: int) -> None:
    """Until the rank's own file says that it is at the step: it is written every tenth of `hang_timeout`."""
    file, deadline = run / "heartbeats" / f"rank_{rank:05d}.json", time.monotonic() + 120
    while not (file.exists() and json.loads(file.read_text())["step"] >= step):
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.05)


def the_verdict(run: Path, job: Job, ranks: list[int]) -> str:
    """What was said, once and alike in events and on standard error; the stacks of `ranks` are there."""
    (event,) = events(run, "hang")
    assert job.output().count(f"error: hang: {event['verdict']} (hang_timeout={TIMEOUT}") == 1, job.output()
    for rank in ranks:
        stacks = (run / "stacks" / f"rank_{rank:05d}.txt").read_text()
        assert "Thread" in stacks and "train.py" in stacks, stacks
    assert not (run / "DONE").exists()
    assert html.escape(event["verdict"]) in (run / "report.html").read_text()
    return event["verdict"]


def test_a_rank_that_is_stopped_is_named(ranks, tiny, tmp_path):
    common = [*tiny, "checkpoint.every=100000", "scheduler=constant", f"hang_timeout={TIMEOUT}"]
    ranks.run([*common, "max_steps=5"], 2, tmp_path)  # its save is the only one: no step waits in another
    job, run = ranks.start([*common, "max_steps=100000"], 2, tmp_path), tmp_path / "run"
    wait_for_step(job, run, 7)
    wait_for_heartbeat(job, run, 1, 7)
    os.kill(job.pids[1], signal.SIGSTOP)
    stopped = time.monotonic()
    while job.codes()[0] is None:
        assert time.monotonic() < stopped + 120, job.output()
        time.sleep(0.05)
    assert job.codes()[0] == ExitCode.HANG, job.output()
    os.kill(job.pids[1], signal.SIGCONT)  # it wakes up, finds itself late, and leaves in the same way
    assert job.wait() == [ExitCode.HANG] * 2, job.output()
    pattern = (
        rf"rank 1 on host {HOST} has given no sign of life for \d+ s, "
        r"last in \w+( of source \w+)? of step \d+; "
        r"rank 0 waits in (forward|backward|reduce|read|data) of step \d+"
    )
    assert re.fullmatch(pattern, the_verdict(run, job, [0])), job.output()

    before = max(records(run))
    ranks.run([*common, f"max_steps={before + 3}"], 2, tmp_path)
    assert all(len(set(seen)) == 1 for seen in records(run).values()), "replayed steps are bit-equal"
    assert max(records(run)) == before + 3
    goodput = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert goodput["goodput/lost_seconds"] > 0


@pytest.mark.parametrize(
    ("phase", "step"),
    [
        ("prepare", 0),
        ("backward", 3),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in [
                ("build", 0),
                ("data", 3),
                ("forward", 3),
                ("reduce", 3),
                ("read", 4),
                ("eval", 4),
                ("save", 5),
            ]
        ),
    ],
)
def test_a_rank_that_stands_still_is_named_with_its_phase(ranks, tiny, tmp_path, phase, step):
    common = [*tiny, "checkpoint.every=5", "callbacks.evaluation.every=4", f"hang_timeout={TIMEOUT}"]
    hook = {PATCH: "tests.training.faults:stand_still", faults.PHASE: phase, faults.STEP: str(step)}
    job = ranks.start(common, 2, tmp_path, hook)
    assert job.wait() == [ExitCode.HANG] * 2, job.output()
    where = f"{phase} of step {step}" if step else phase
    expected = rf"rank 1 on host {HOST} has been in {where} for \d+ s; rank 0 waits in \w+( of step {step})?"
    assert re.fullmatch(expected, the_verdict(tmp_path / "run", job, [0, 1])), job.output()


def test_text_that_does_not_come_is_named_by_its_source(ranks, tiny, tmp_path):
    common = [*tiny, f"cache_dir={tmp_path}/cache", f"hang_timeout={TIMEOUT}"]
    ranks.run([*common, "max_steps=1", f"output_dir={tmp_path}/first"], 1, tmp_path)
    prepared = json.loads((tmp_path / "first" / "data" / "prepared.json").read_text())
    for tokens in Path(prepared["prose"]["train"]).glob("shard-*/tokens.bin"):
        tokens.unlink()
        os.mkfifo(tokens)  # who opens it waits for one who writes: a file system that does not answer
    job = ranks.start(common, 2, tmp_path)
    assert job.wait() == [ExitCode.HANG] * 2, job.output()
    said = the_verdict(tmp_path / "run", job, [0, 1])
    assert re.match(r"ranks? [01].* ha(s|ve) been in data of source prose of step 1 for \d+ s", said), said


def test_another_job_s_preparation_is_no_hang_until_it_stands_still(ranks, tiny, tmp_path):
    common = [*tiny, f"cache_dir={tmp_path}/cache", f"hang_timeout={TIMEOUT}"]
    ranks.run([*common, "max_steps=1", f"output_dir={tmp_path}/first"], 1, tmp_path)
    prepared = json.loads((tmp_path / "first" / "data" / "prepared.json").read_text())
    train = Path(prepared["prose"]["train"])
    shutil.rmtree(train)
    claim = train.parent / ".claims" / "00000.lock"
    with claim.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        job, began = ranks.start(common, 1, tmp_path), time.monotonic()
        while time.monotonic() < began + 2 * TIMEOUT:
            os.utime(claim)
            assert job.codes() == [None], job.output()
            time.sleep(0.5)
        assert [entry.name for entry in (tmp_path / "run").iterdir() if entry.name[0] != "."] == []
        assert job.wait() == [ExitCode.HANG], job.output()
    assert re.fullmatch(
        rf"rank 0 on host {HOST} has been in prepare for \d+ s", the_verdict(tmp_path / "run", job, [0])
    )
    ranks.run([*common, "max_steps=1"], 1, tmp_path)
    assert not (tmp_path / "run" / ".starting").exists()


@pytest.mark.parametrize("phase", ["prepare", "verify", "save"])
@pytest.mark.parametrize("other", ["moves", "stands still", "is stopped"])
def test_who_waits_for_the_work_of_another_rank_is_late_when_that_one_is(tmp_path, monkeypatch, other, phase):
    heart, late = Heart(), []
    heart.last = Beat(phase, 0, 0, 1000.0)  # whole seconds: sums of them are exact
    watchdog = Watchdog(RunDirectory(tmp_path), World(0, 2), heart, 600, "job")
    monkeypatch.setattr("llmtrain.training.watchdog._is_in_collective", lambda: True)
    monkeypatch.setattr("llmtrain.training.watchdog.time.monotonic", lambda: heart.last.at + passed)
    for number, passed in enumerate(range(100, 2000, 100)):
        seconds = passed if other == "stands still" else 3.0
        beat = number if other == "moves" else 0
        write_heartbeat(tmp_path / ".starting", 1, beat=beat, seconds=seconds)
        late.append(watchdog._late())
    found = next((100 * number for number, one in enumerate(late, 1) if one > 600), None)
    assert found == {"moves": None, "stands still": 1000, "is stopped": 1200}[other]


def write_heartbeat(directory: Path, rank: int, **said: object) -> None:
    directory.mkdir(exist_ok=True)
    (directory / f"rank_{rank:05d}.json").write_text(json.dumps({"job": "job", **said}))


def test_an_error_in_the_watchdog_is_told_once_and_it_goes_on(tmp_path, caplog):
    heart, written = Heart(), threading.Event()
    heart.beat("data", 3)
    failures = iter(range(3))

    def source() -> str:
        if next(failures, None) is not None:
            raise LookupError("no such source")
        written.set()
        return "prose"

    heart.source = source
    watchdog = Watchdog(RunDirectory(tmp_path), World(), heart, 600, "job")
    watchdog._tick = 0.01
    watchdog.start()
    assert written.wait(60)
    watchdog.begin()
    watchdog.stop()
    assert caplog.text.count("LookupError: no such source") == 1
    said = json.loads((tmp_path / "heartbeats" / "rank_00000.json").read_text())
    assert said["source"] == "prose"
    assert not (tmp_path / ".starting").exists()


@pytest.fixture
def growing(tiny, corpus, tmp_path) -> list[str]:
    """Overrides of a run whose text is tokenised beside it."""
    text = (corpus / "prose.jsonl").read_text()
    (tmp_path / "large.jsonl").write_text(text * (SMALL // len(text) + 2))
    source = f"data.sources.prose.path={tmp_path}/large.jsonl"
    return [*tiny, source, f"cache_dir={tmp_path}/cache", "max_steps=3", f"hang_timeout={TIMEOUT}"]


@pytest.mark.slow
def test_text_that_nobody_makes_is_a_hang(ranks, growing, tmp_path):
    job = ranks.start(growing, 2, tmp_path, {PATCH: "tests.training.faults:make_nothing"})
    assert job.wait() == [ExitCode.HANG] * 2, job.output()
    said = the_verdict(tmp_path / "run", job, [0, 1])
    assert re.match(r"rank.* in data of source (code|prose) of step 1 for \d+ s", said), said


@pytest.mark.slow
def test_text_that_is_being_made_is_none_however_long_it_takes(ranks, growing, tmp_path):
    began = time.monotonic()
    ranks.run(growing, 2, tmp_path, {PATCH: "tests.training.faults:make_slowly"})
    assert time.monotonic() - began > faults.SLOW > 2 * TIMEOUT
    assert not events(tmp_path / "run", "hang")


@pytest.mark.slow
def test_who_waits_for_another_rank_to_verify_does_not_hang(ranks, tiny, tmp_path):
    ranks.run([*tiny, "max_steps=1"], 2, tmp_path)
    hook = {PATCH: "tests.training.faults:verify_slowly"}
    ranks.run([*tiny, "max_steps=2", f"hang_timeout={TIMEOUT}"], 2, tmp_path, hook)
    assert not events(tmp_path / "run", "hang")


@pytest.mark.slow
def test_a_disk_that_takes_nothing_more_is_found_by_the_ranks_that_wait_for_it(ranks, tiny, tmp_path):
    common = [*tiny, "max_steps=30", "checkpoint.every=5", "checkpoint.asynchronous=true"]
    hook = {PATCH: "tests.training.faults:write_nothing"}
    job = ranks.start([*common, f"hang_timeout={TIMEOUT}"], 2, tmp_path, hook)
    assert job.wait() == [ExitCode.HANG] * 2, job.output()
    assert re.match(r"rank.* 1 .*in save of step 15", the_verdict(tmp_path / "run", job, [0, 1]))


@pytest.mark.slow
def test_where_gloo_complains_first_the_verdict_is_the_same(ranks, tiny, tmp_path):
    hook = {PATCH: "tests.training.faults:stand_still_longer_than_gloo_waits"}
    hook |= {faults.PHASE: "reduce", faults.STEP: "3"}
    job = ranks.start([*tiny, "hang_timeout=100"], 2, tmp_path, hook)
    assert job.wait() == [ExitCode.HANG] * 2, job.output()
    (event,) = events(tmp_path / "run", "hang")
    said = rf"rank 1 on host {HOST} has been in reduce of step 3 for \d+ s; rank 0 waits in \w+ of step 3"
    assert re.fullmatch(said, event["verdict"]), event
    assert not list((tmp_path / "run").glob("crash-*"))


# The sentence


def vital(
    rank: int,
    phase: Phase,
    step: int,
    *,
    source: str = "",
    waits: bool = False,
    collectives: int = 0,
    seconds: float = 600,
    answers: bool = True,
) -> Vital:
    turn = get_args(Phase).index(phase)
    return Vital(rank, f"node{rank // 8}", phase, step, turn, source, waits, collectives, seconds, answers)


def test_who_waits_for_text_is_behind_who_has_it():
    vitals = [vital(0, "data", 120), vital(1, "data", 120, source="prose", seconds=612.4)]
    assert verdict(vitals) == (
        "rank 1 on host node0 has been in data of source prose of step 120 for 612 s; "
        "rank 0 waits in data of step 120"
    )


def test_who_has_come_least_far_is_late_and_the_others_wait_where_they_are():
    vitals = [vital(rank, "reduce", 120) for rank in range(512)]
    vitals[9] = vital(9, "save", 119, seconds=700)
    vitals[3] = vital(3, "backward", 120)
    assert verdict(vitals) == (
        "rank 9 on host node1 has been in save of step 119 for 700 s; "
        "ranks 0, 1, 2, 4 and 506 others wait in reduce of step 120; rank 3 waits in backward of step 120"
    )


def test_who_does_not_answer_is_named_first():
    vitals = [vital(0, "data", 7), vital(1, "reduce", 8, seconds=90, answers=False), vital(2, "reduce", 8)]
    assert verdict(vitals) == (
        "rank 1 on host node0 has given no sign of life for 90 s, last in reduce of step 8; "
        "rank 0 waits in data of step 7; rank 2 waits in reduce of step 8"
    )
    never = Vital.of(1, None, now=0)
    assert verdict([vital(0, "build", 0), never]) == "rank 1 has never been heard of; rank 0 waits in build"


def test_who_waits_for_others_at_one_place_is_not_late():
    vitals = [vital(0, "save", 5, waits=True), vital(1, "save", 5), vital(2, "save", 5, waits=True)]
    assert verdict(vitals) == (
        "rank 1 on host node0 has been in save of step 5 for 600 s; ranks 0 and 2 wait in save of step 5"
    )


def test_of_ranks_in_collectives_the_one_in_an_earlier_one_is_late():
    vitals = [vital(rank, "reduce", 5, waits=True, collectives=40) for rank in range(3)]
    vitals[1] = vital(1, "reduce", 5, waits=True, collectives=39)
    assert verdict(vitals) == (
        "rank 1 on host node0 has been in reduce of step 5 for 600 s; ranks 0 and 2 wait in reduce of step 5"
        "; all are in collectives, rank 1 in an earlier one than the others"
    )
    vitals[1] = vital(1, "read", 4, waits=True, collectives=39)
    assert verdict(vitals).startswith("rank 1 on host node0 has been in read of step 4")
    computes = [vital(0, "forward", 5, collectives=39), vital(1, "forward", 5, collectives=40)]
    assert verdict(computes).startswith("ranks 0 on host node0 and 1 on host node0 have been in forward")


def test_where_all_are_at_one_place_nobody_is_accused():
    assert verdict([vital(rank, "reduce", 5, seconds=61) for rank in (0, 1)]) == (
        "ranks 0 on host node0 and 1 on host node0 have been in reduce of step 5 for 61 s; "
        "all ranks are there: what they do together, or what they read, does not come back"
    )
    assert verdict([vital(0, "data", 5, source="code")]) == (
        "rank 0 on host node0 has been in data of source code of step 5 for 600 s"
    )


def test_the_silence_of_a_rank_counts_from_its_last_beat():
    heartbeat = {"host": "a", "phase": "save", "step": 3, "turn": 7, "source": "", "waits": True}
    heartbeat |= {"collectives": 9, "seconds": 2.0, "time": 100.0}
    assert Vital.of(4, {**heartbeat, "answers": False}, now=160.0).seconds == 62.0
    assert Vital.of(4, {**heartbeat, "answers": True}, now=160.0).seconds == 2.0


def test_a_turn_counts_changes_of_phase_and_not_the_rounds_of_a_loop():
    heart = Heart()
    heart.beat("data", 4)
    for phase, turn in [
        ("data", 0),
        ("forward", 1),
        ("backward", 2),
        ("forward", 3),
        ("save", 4),
        ("save", 4),
    ]:
        heart.beat(phase)
        assert heart.last[:3] == (phase, 4, turn)
    heart.beat("data", 5)
    assert heart.last[:3] == ("data", 5, 0)
