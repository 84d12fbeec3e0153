"""Where the time of a run went, against what a stopwatch says of a real run that is killed and goes on."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest

from llmtrain.training.goodput import (
    PARTS,
    Account,
    Goodput,
    account_before,
    advise,
    daly,
    failures,
    loss_of,
    seconds_of,
    young,
)
from llmtrain.training.heartbeat import Heart
from llmtrain.training.report import write_report
from llmtrain.training.run_directory import RunDirectory, write_atomically
from llmtrain.training.watchdog import spent_before
from tests.ranks import PATCH
from tests.training.faults import TIMES

IDLE = 2.0
"""Seconds between the kill and the next start."""


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.quiet
def test_a_killed_and_resumed_run_accounts_for_every_second(ranks, tiny, tmp_path):
    run, patch = tmp_path / "run", {PATCH: "tests.training.faults:take_time"}
    common = [*tiny, "checkpoint.every=5", "max_steps=14", "hang_timeout=20"]
    common += ["callbacks.sample.prompts=[]", "data.validation_fraction=0"]
    job = ranks.start(common, 1, tmp_path, patch)
    began = time.monotonic()
    while not ((run / "metrics.jsonl").exists() and len(lines_of(run / "metrics.jsonl")) >= 8):
        assert time.monotonic() < began + 120, job.output()
        time.sleep(0.02)
    job.kill()
    job.wait()
    killed = time.monotonic()
    before = lines_of(run / "metrics.jsonl")
    time.sleep(IDLE)
    again = time.monotonic()
    ranks.run(common, 1, tmp_path, patch)
    ended = time.monotonic()

    lines, events = lines_of(run / "metrics.jsonl"), lines_of(run / "events.jsonl")
    spent = json.loads((run / "heartbeats" / "rank_00000.json").read_text())["goodput"]
    seconds = [line["perf/step_seconds"] - TIMES["data"] for line in lines]
    replayed = [line["step"] <= before[-1]["step"] for line in lines[len(before) :]]
    lost = sum(some for some, again in zip(seconds[len(before) :], replayed, strict=True) if again)
    saves = [event["seconds"] for event in events if event["event"] == "save"]
    starts = [event for event in events if event["event"] in ("start", "resume")]

    assert sum(spent.values()) == pytest.approx(ended - began, abs=2.5), "every second is somewhere"
    assert sum(replayed) >= 3 and spent["lost"] == pytest.approx(lost, rel=0.2, abs=0.4)
    assert spent["productive"] == pytest.approx(sum(seconds) - lost, rel=0.2, abs=0.8)
    assert spent["stall"] == pytest.approx(len(lines) * TIMES["data"], rel=0.4, abs=0.4)
    stood = sum(saves) + len(saves) * TIMES["save"]  # the ledger and the report beside it count too
    assert stood - 0.1 <= spent["checkpoint"] <= stood + 2.0
    assert spent["idle"] == pytest.approx(again - killed, abs=2.5) and spent["idle"] >= IDLE - 0.5
    told = sum(sum(start["seconds"].values()) for start in starts)
    assert told <= spent["restart"] <= told + 2.0
    assert starts[1]["seconds"]["load"] > 0 and starts[1]["seconds"]["build"] > 0
    assert spent["evaluation"] < 0.2

    last = seconds_of(lines)
    assert last["lost"] == pytest.approx(spent["lost"]) and last["idle"] == pytest.approx(spent["idle"])
    assert lines[-1]["goodput/share"] == pytest.approx(last["productive"] / sum(last.values()))
    told = [sum(seconds_of([line]).values()) for line in lines]
    assert told == sorted(told), "what was spent stays spent"

    page = write_report(run).read_text()
    assert "Goodput" in page and "trained again after the end of a process" in page and "Young" in page
    assert f"{100 * lines[-1]['goodput/share']:.1f} %" in page


# Parts


def test_a_second_counts_for_the_phase_it_was_spent_in():
    goodput = Goodput()
    goodput.go_on(Account({"productive": 100.0, "idle": 5.0}, trained=7, until=1000.0), started=1030.0)
    for phase, step in [("import", 0), ("build", 5), ("data", 6), ("forward", 6), ("read", 7), ("save", 7)]:
        goodput.spend(phase, step, 1.0)
    goodput.spend("backward", 8, 10.0)
    goodput.spend("eval", 8, 3.0)
    expected = dict(zip(PARTS, [110.0, 1.0, 3.0, 1.0, 2.0, 2.0, 35.0], strict=True))
    assert goodput.seconds == expected
    metrics = goodput.as_metrics()
    assert metrics["goodput/share"] == 110 / 154
    assert seconds_of([{"step": 1}, {"step": 2, **metrics}]) == expected
    assert goodput.start == {"import": 1.0, "prepare": 0.0, "build": 1.0, "verify": 0.0, "load": 0.0}


def test_the_newer_of_line_and_heartbeat_counts():
    started = {"time": "2026-01-01T00:00:10.000+00:00", "event": "start", "seconds": {"import": 4.0}}
    line = {"step": 9, "goodput/share": 0.5, **{f"goodput/{part}_seconds": 2.0 for part in PARTS}}
    began = 1767225600.0 + 10 - 4
    found = account_before([line], [started], {})
    assert found == Account(dict.fromkeys(PARTS, 2.0), 9, began + 14)
    earlier = {"time": "2026-01-01T00:00:09.000+00:00", "event": "rejected"}
    assert account_before([line], [earlier, started], {}) == found
    assert account_before([line], [earlier], {}) is None
    older = {"goodput": dict.fromkeys(PARTS, 1.0), "trained": 4, "time": 5.0}
    assert account_before([line], [started], older) == found
    newer = {"goodput": dict.fromkeys(PARTS, 3.0), "trained": 12, "time": 5.0}
    assert account_before([line], [started], newer) == Account(newer["goodput"], 12, 5.0)
    assert account_before([], [], {}) is None
    assert account_before([], [started], newer) == Account(newer["goodput"], 12, 5.0)


def test_a_start_that_was_killed_was_no_idle_time(tmp_path):
    directory = RunDirectory(tmp_path)
    assert spent_before(directory) is None
    for part, place in ((5.0, directory.heartbeats), (7.0, directory.starting)):
        told = {"goodput": dict.fromkeys(PARTS, part), "trained": 3, "time": 100 + part}
        write_atomically(place / "rank_00000.json", json.dumps(told))
        assert spent_before(directory) == Account(told["goodput"], 3, told["time"])


def test_a_beat_costs_next_to_nothing():
    heart, rounds = Heart(), 20_000
    began = time.process_time()
    for _ in range(rounds):
        heart.beat("forward", 3)
    assert (time.process_time() - began) / rounds < 1e-4, "a step has a dozen"


# How often to save


def test_young_s_interval_is_that_of_the_literature():
    assert young(6.0, 3 * 3600.0) == pytest.approx(360.0)  # RELIABILITY.md 4.3: every 6 minutes, 3.3 % lost
    assert loss_of(360.0, 6.0, 3 * 3600.0) == pytest.approx(0.0333, abs=1e-4)


@pytest.mark.parametrize("cost", [0.5, 5.0, 60.0, 300.0, 1200.0])
def test_daly_s_interval_is_the_optimum_of_the_exact_model(cost):
    # Daly (2006), eq. 20: the expected time is proportional to (exp((t + cost) / M) - 1) / t.
    between = 3600.0
    t = np.exp(np.linspace(math.log(1.0), math.log(4 * between), 400_001))
    best = float(t[np.argmin(np.expm1((t + cost) / between) / t)])
    assert daly(cost, between) == pytest.approx(best, rel=0.005)
    assert abs(daly(cost, between) - best) < abs(young(cost, between) - best)


def test_where_saving_takes_longer_than_the_run_lasts_it_saves_once_in_between():
    assert daly(100.0, 50.0) == daly(200.0, 50.0) == 50.0


def test_an_end_without_a_word_is_a_failure():
    def count(*kinds: str) -> int:
        return failures([{"event": kind} for kind in kinds])

    assert count("start", "save", "end") == 0
    assert count("start", "save", "signal", "resume", "end", "resume", "rewind", "resume", "end") == 0
    assert count("start", "hang", "resume", "resume", "signal", "resume", "end") == 2


def test_advice_is_from_what_was_measured():
    save = {"event": "save", "seconds": 30.0, "stall_seconds": 6.0}
    begun = [{"event": "start", "ranks": 16}, save, save]
    spent = {"productive": 5 * 3600.0, "restart": 3600.0, "idle": 7200.0}
    assert advise([{"event": "start", "ranks": 16}], spent) is None
    assumed = advise(begun, spent)
    assert (
        advise([*begun, {"event": "corruption", "ranks": [0, 1]}], spent) == assumed
    )  # those that are wrong
    assert (assumed.cost, assumed.failures, assumed.between_failures) == (6.0, 0, 50_000 * 3600 / 16)
    measured = advise([*begun, {"event": "resume", "ranks": 16}, save, {"event": "resume"}], spent)
    assert (measured.failures, measured.between_failures) == (2, 3 * 3600.0)
    assert measured.young == pytest.approx(360.0)
    assert measured.loss == pytest.approx(1 / 30)
