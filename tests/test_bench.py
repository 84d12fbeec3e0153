"""The benchmarks measure what they say: what is slow is seen to be slow, and nothing is lost where one fails.

This module is also the one that stations import: the functions and loaders at its top are theirs.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from fractions import Fraction
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from llmtrain import bench
from llmtrain.benchmarks import kernels, measure, model
from llmtrain.benchmarks.corpus import WEIGHTS, make_marked, make_text, make_tokens
from llmtrain.benchmarks.data import CANDIDATES, OURS, Candidate, Sizes, compare, loaders_table
from llmtrain.benchmarks.loaders import NanoGPT, Ours, Tensors, largest_deviation
from llmtrain.benchmarks.measure import FailedError, NotInstalledError, Result, Station, interleaved, rate
from llmtrain.benchmarks.scale import compare_scale
from llmtrain.benchmarks.text import WAYS, compare_text, text_table
from llmtrain.config import ExitCode

HERE = "tests.test_bench"
SMALL = Sizes(tokens=60_000, seq_len=64, rows=4, windows=2_000, late=3_000, repeats=3)

# Called in stations

calls = 0


def add(a: int, b: int) -> Result:
    global calls
    calls += 1
    return {"sum": a + b, "calls": calls}


def fail() -> Result:
    raise ValueError("the tyres\nare flat")


def crash() -> Result:
    os.kill(os.getpid(), signal.SIGSEGV)
    return {}


def sleep(seconds: float) -> Result:
    print("noise on standard output")
    time.sleep(seconds)
    return {}


def use(megabytes: int) -> Result:
    before = measure.memory()["own"]
    held = np.ones(megabytes * 1_000_000, np.uint8)
    return {"own": measure.memory()["own"] - before, "held": int(held[-1])}


def burn(seconds: float) -> Result:
    result: Result = {}
    with measure.cpu_seconds(result):
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass
        time.sleep(seconds)
    return result


class Slowed(Ours):
    """Ours, with a nap before each batch that takes several times as long as making it."""

    prepare = staticmethod(lambda files: None)

    def batches(self, start: int) -> Iterator[Tensors | None]:
        for batch in super().batches(start):
            time.sleep(0.01)
            yield batch


class SlowLate(Ours):
    """Ours, but it takes its time to get to a late batch."""

    prepare = staticmethod(lambda files: None)

    def batches(self, start: int) -> Iterator[Tensors | None]:
        time.sleep(0.5 if start else 0.0)
        yield from super().batches(start)


class Broken(NanoGPT):
    def batches(self, start: int) -> Iterator[Tensors | None]:
        raise RuntimeError("no batch today")


# measure.py


def test_every_call_begins_afresh_and_its_result_comes_back() -> None:
    with Station(HERE) as station:
        assert [station.call("add", 2, 3), station.call("add", 40, 2)] == [
            {"sum": 5, "calls": 1},
            {"sum": 42, "calls": 1},
        ]


def test_exceptions_crashes_and_hangs_are_told_and_the_station_goes_on() -> None:
    with Station(HERE) as station:
        with pytest.raises(FailedError, match=r"^ValueError: the tyres are flat$"):
            station.call("fail")
        with pytest.raises(FailedError, match="the process died"):
            station.call("crash")
        with pytest.raises(FailedError, match=r"no result in 1 s"):
            station.call("sleep", 60, limit=1)
        assert station.call("sleep", 0) == {}
        assert station.call("add", 1, 1)["sum"] == 2


def test_what_is_not_installed_or_does_not_import_is_told_each_time(tmp_path: Path) -> None:
    with Station(HERE, ["json", "no_such_library"]) as station:
        for _ in range(2):
            with pytest.raises(NotInstalledError, match="no_such_library"):
                station.call("add", 1, 1)
    with Station("no.such.module") as station:
        for _ in range(2):
            with pytest.raises(FailedError, match=r"No module named 'no'"):
                station.call("add", 1, 1)


def test_memory_and_processor_time_are_those_of_the_call() -> None:
    with Station(HERE) as station:
        assert station.call("use", 50)["own"] == pytest.approx(50, abs=5)
        assert station.call("burn", 0.3)["cpu_s"] == pytest.approx(0.3, abs=0.1)  # sleeping costs nothing


def test_candidates_take_turns_and_one_that_fails_is_asked_once() -> None:
    asked = []

    def candidate(name: str) -> Callable[[], Result]:
        def run() -> Result:
            asked.append(name)
            if name == "b":
                raise FailedError("b is broken")
            return {"turn": len(asked)}

        return run

    results = interleaved({name: candidate(name) for name in "abc"}, rounds=3)
    assert "".join(asked) == "abccaac"
    assert results["a"] == [{"turn": 1}, {"turn": 5}, {"turn": 6}]
    assert str(results["b"]) == "b is broken"


def test_medians_are_of_numbers_only() -> None:
    results = [{"a": value, "name": "x", "none": None} for value in (1.0, 9.0, 2.0)]
    assert measure.medians(results) == {"a": 2.0, "name": "x", "none": None}


def test_rate_counts_units_a_second_without_warm_up_and_without_starting_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0
    monkeypatch.setattr(time, "perf_counter", lambda: now)

    def take(seconds: float) -> None:
        nonlocal now
        now += seconds

    def steps() -> Iterator[int]:
        for number in count():
            take(0.005)
            yield 10
            if number % 10 == 9:
                yield 0
                take(0.1)  # starting over: part of the item that follows

    def slow_at_first() -> Iterator[int]:
        take(0.3)
        yield 1_000_000
        yield from steps()

    expected = 10 / 0.005
    for one in (steps, slow_at_first):
        assert rate(one(), 0.3, warm_up=0.1) == pytest.approx(expected)
    assert rate(slow_at_first(), 0.3, warm_up=0.0) > 10 * expected  # the test can tell


def test_tables_are_aligned_markdown() -> None:
    table = measure.markdown(("a", "long heading"), [("some", 1), ("x", 22)])
    assert table.splitlines() == [
        "| a    | long heading |",
        "|------|--------------|",
        "| some | 1            |",
        "| x    | 22           |",
    ]
    assert [measure.number(value) for value in (None, 0.12345, 7.0, 98.76, 12345.6)] == [
        "-",
        "0.123",
        "7",
        "98.8",
        "12,346",
    ]


# corpus.py


def test_token_files_hold_whole_documents_and_enough_of_them(tmp_path: Path) -> None:
    files = make_tokens(tmp_path / "tokens", 64, 100_000)
    for name in WEIGHTS:
        tokens, offsets = files.tokens(name), files.offsets(name)
        assert offsets[0] == 0 and offsets[-1] == len(tokens) >= 100_000
        assert np.diff(offsets).min() >= 1 and len(np.unique(np.diff(offsets))) > 5


def test_marked_files_say_where_each_token_is_from(tmp_path: Path) -> None:
    files = make_marked(tmp_path / "marked", 15, 1_000, like=2048)
    for number, (name, weight) in enumerate(WEIGHTS.items()):
        tokens = files.tokens(name)
        assert set(tokens.tolist()) == {number}
        assert len(tokens) >= 1_000 * weight * 16


def test_text_files_have_the_shares_of_the_mixture(tmp_path: Path) -> None:
    files = make_text(tmp_path / "text", 1_000_000)
    sizes = {}
    for name, path in files.items():
        texts = [json.loads(line)["text"] for line in path.read_text(encoding="utf-8").splitlines()]
        sizes[name] = sum(len(text.encode()) for text in texts)
        assert 1_000_000 * WEIGHTS[name] <= sizes[name]
    assert sum(sizes.values()) == int((tmp_path / "text" / "bytes").read_text())


# Loaders


def test_the_deviation_is_the_largest_of_any_source_after_any_row() -> None:
    weights = [0.5, 0.3, 0.2]
    sources = np.random.default_rng(5).choice(3, 200, p=weights)
    marks = np.repeat(sources[:, None], 4, axis=1)
    marks[50] = [0, 0, 1, 2]  # a row of several sources counts by its tokens
    worst, counts = Fraction(0), [Fraction(0)] * 3
    for n, row in enumerate(marks.tolist(), start=1):
        for source in range(3):
            counts[source] += Fraction(row.count(source), 4)
            worst = max(worst, abs(counts[source] - Fraction(str(weights[source])) * n))
    assert largest_deviation(marks, weights) == pytest.approx(float(worst))


def test_loaders_are_measured_and_those_that_cannot_be_are_named(tmp_path: Path) -> None:
    candidates = {
        name: CANDIDATES[name] for name in (OURS, "llmtrain, prefetch thread", "nanoGPT random crop")
    } | {
        "slowed": Candidate(f"{HERE}:Slowed"),
        "slow when late": Candidate(f"{HERE}:SlowLate"),
        "absent": Candidate(f"{HERE}:Slowed", needs=("no_such_library",)),
        "broken": Candidate(f"{HERE}:Broken", late=None, mixes=False),
    }
    report = compare(tmp_path, seconds=0.3, rounds=2, sizes=SMALL, candidates=candidates)
    loaders = json.loads(json.dumps(report))["loaders"]
    assert loaders["absent"] == {"late": None, "missing": "no_such_library"}
    assert "no batch today" in loaders["broken"]["error"]
    for name in (OURS, "llmtrain, prefetch thread", "nanoGPT random crop", "slowed"):
        numbers = {key: loaders[name][key] for key in ("mtok_s", "ratio", "first_ms", "rss_mb")}
        assert min(numbers.values()) > 0, numbers
        assert len(loaders[name]["rounds"]) == 2
    assert loaders[OURS]["ratio"] == 1
    assert loaders["slowed"]["ratio"] < 0.5
    assert loaders["slowed"]["mtok_s"] < 100 * 4 * 64 / 1e6  # a nap of 10 ms a batch
    assert loaders[OURS]["deviation"] < 1 and loaders[OURS]["state_bytes"] < 1000
    assert loaders["slow when late"]["resume_ratio"] > 2
    assert loaders["slow when late"]["resume_s"] > 0.5
    table = loaders_table(report).splitlines()
    assert len(table) == 2 + len(candidates)
    assert [row for row in table if "not installed" in row and "absent" in row]
    assert [row for row in table if "no batch today" in row and "broken" in row]


def _is_installed(peer: Candidate) -> bool:
    tops = (name.partition(".")[0] for name in peer.needs)
    return bool(peer.package) and all(find_spec(top) for top in tops)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, peer in CANDIDATES.items() if _is_installed(peer)])
def test_each_peer_that_is_installed_gives_the_tokens_of_the_files(name: str, tmp_path: Path) -> None:
    sizes = Sizes(tokens=30_000, seq_len=32, rows=4, windows=1_000, late=1_000, repeats=1)
    candidates = {OURS: CANDIDATES[OURS], name: CANDIDATES[name]}
    result = compare(tmp_path, seconds=0.2, rounds=1, sizes=sizes, candidates=candidates)["loaders"][name]
    assert not {"missing", "error"} & result.keys(), result
    assert result["mtok_s"] > 0
    assert result["deviation"] < 300  # of 1,000: all three sources are there, in about their shares


# Text


@pytest.mark.parametrize("part", list(WAYS))
def test_ways_from_text_to_tokens_make_the_same_tokens(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every way is given the same text, so that the counts of tokens can be compared."""
    from llmtrain.benchmarks import text

    few = ("llmtrain, fastest", "llmtrain, tokenizers", "Hugging Face interleave + map batched, tokenizers")
    ways = WAYS[part] if part == "prepare" else {name: WAYS[part][name] for name in few}
    monkeypatch.setitem(WAYS, part, ways)
    monkeypatch.setattr(text, "make_text", lambda where, _: make_text(where, 300_000))
    report = compare_text(part, tmp_path / part, rounds=1, size=300_000)
    found = {name: way for name, way in report["ways"].items() if "missing" not in way}
    assert not [way for way in found.values() if "error" in way]
    assert {name for name in found if "llmtrain" not in name}
    ours = {way["tokens"] for name, way in found.items() if "llmtrain" in name}
    assert len(ours) == 1
    for way in found.values():
        assert way["mtok_cpu_s"] == pytest.approx(way["tokens"] / way["cpu_s"] / 1e6)
        if part == "prepare":
            assert way["tokens"] == min(ours)
        else:  # the peer ends with its first source
            assert 0.5 * min(ours) < way["tokens"] <= min(ours)
    table = text_table(part, report)
    assert all(name in table for name in report["ways"])
    assert report["ratios"]


# The door


def test_a_loader_that_nobody_knows_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["data", "--loaders", "wonder"]) == ExitCode.CONFIG
    assert "wonder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("kernels --output HERE/no/x.json", "argument --output: HERE/no: no such directory; make it first"),
        ("kernels --output HERE", "argument --output: HERE is a directory; name a file in it"),
        ("kernels --seconds -1", "argument --seconds: -1 is not above 0 and finite"),
        ("kernels --seconds nan", "argument --seconds: nan is not above 0 and finite"),
        ("kernels --rows 0", "argument --rows: 0 is not above 0"),
        ("step --turns 0", "argument --turns: 0 is not above 0"),
        ("data --smaller 0", "argument --smaller: 0 is not above 0"),
        ("data --directory HERE/no", "argument --directory: HERE/no: no such directory; make it first"),
        ("model --directory HERE/no", "argument --directory: HERE/no: no such directory; make it first"),
        ("model --nanogpt HERE/model.py", "argument --nanogpt: HERE/model.py: no such file"),
    ],
)
def test_a_mistake_is_told_before_anything_is_measured(
    words: str, reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        bench.main(words.replace("HERE", str(tmp_path)).split())
    assert end.value.code == 78
    (line,) = capsys.readouterr().err.splitlines()
    assert reason.replace("HERE", str(tmp_path)) in line


@pytest.mark.skipif(torch.cuda.is_available(), reason="backends that need a GPU are there")
def test_a_run_that_measured_nothing_ends_with_1(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["kernels", "--backends", "flash4", "--length", "8"]) == 1
    assert "error: llmtrain bench kernels: no candidate was measured" in capsys.readouterr().err


def test_a_measurement_that_fails_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("llmtrain.benchmarks.step.__name__", HERE)  # the station has no `measure` there
    assert bench.main(["step", "--turns", "1", "--stages", "0", "--directory", str(tmp_path)]) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: llmtrain bench step: ")


@pytest.mark.parametrize(
    ("command", "gpu", "cpu"),
    [
        ("kernels", asdict(kernels.TRAINING), asdict(kernels.SMALL)),
        ("model", asdict(model.LARGE), asdict(model.SMALL)),
    ],
)
def test_help_tells_the_sizes_that_are_taken(
    command: str, gpu: dict[str, Any], cpu: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench.main([command, "--help"])
    words = " ".join(capsys.readouterr().out.split())
    for name, value in gpu.items():
        text = words.partition(f" --{name.replace('_', '-')} ")[2].partition(" --")[0]
        both = f"{value}, without a GPU {cpu[name]}" if value != cpu[name] else f"{value}"
        assert f"(default: {both})" in text, name


def test_the_door_writes_every_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "out.json"
    words = ["data", "--seconds", "0.1", "--rounds", "1", "--smaller", "2000", "--only", "loaders"]
    words += ["--loaders", "nanogpt"]
    assert bench.main([*words, "--output", str(output), "--directory", str(tmp_path)]) == 0
    report: dict[str, Any] = json.loads(output.read_text())
    assert set(report["loaders"]) == {OURS, "nanoGPT random crop"} and report["machine"]["cores"] > 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in report["loaders"])
    assert [path.name for path in tmp_path.iterdir()] == ["out.json"]  # its own files are gone


def test_a_hundred_gigabytes_of_shards_take_little_memory(tmp_path: Path) -> None:
    """Rows of 500 shards of 200 MB, each read and checked: the memory of the process hardly knows of it."""
    found = compare_scale(tmp_path / "big", 10_000)
    assert found["shards"] == 10_000
    assert found["sparse_shards_read_from,_GB"] == 100
    assert 50 < found["memory_after_all_of_it,_MB"] < 700


def test_a_step_of_the_trainer_is_measured_beside_deepspeed_s(tmp_path: Path) -> None:
    """How close the two are is for a quiet machine to say; here, that both were measured and are alike."""
    output = tmp_path / "step.json"
    words = ["step", "--turns", "1", "--stages", "0", "--output", str(output), "--directory", str(tmp_path)]
    assert bench.main(words) == 0
    (stage,) = json.loads(output.read_text())["stages"]
    assert (stage["stage"], stage["tensors"]) == (0, 171)
    assert stage["ratio"] == pytest.approx(stage["ours_ms"] / stage["bare_ms"])
    assert 0.2 < stage["ratio"] < 5
    assert [path.name for path in tmp_path.iterdir()] == ["step.json"]


def test_saves_are_measured_beside_deepspeed_s(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "save.json"
    words = ["save", "--sizes", "10", "--rounds", "1", "--output", str(output), "--directory", str(tmp_path)]
    assert bench.main(words) == 0
    (size,) = json.loads(output.read_text())["sizes"]
    ways = size["ways"]
    assert ways["verified"]["mb"] == pytest.approx(ways["raw"]["mb"], rel=0.01)
    assert ways["raw"]["mb"] == pytest.approx(12 * size["parameters"] / 1e6, rel=0.05)  # vocabulary padded
    assert ways["stock"]["mb"] == ways["stock_durable"]["mb"] > ways["raw"]["mb"]
    assert all(0 < way["stall_s"] <= way["total_s"] for way in ways.values())
    assert ways["asynchronous"]["stall_s"] < ways["asynchronous"]["total_s"]
    assert "DeepSpeed + fsync" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["save.json"]
