"""Raw text that is tokenised while the run trains on it: the run that prepared shards give, killed or not."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llmtrain.config import UserError
from llmtrain.training.run_directory import RunDirectory
from llmtrain.where import where
from tests.ranks import PATCH
from tests.training.test_resume import records

ALL_BUT_ONE = {PATCH: "tests.training.faults:make_all_but_one"}
MEGABYTES = {"web": 24, "books": 17}
"""Above what is prepared at once (16 MiB), and above a part, so that there are several."""


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    """Two sources of library code, every document once with its number, so that all differ."""
    directory = tmp_path_factory.mktemp("raw")
    library = [path.read_text() for path in sorted(Path(json.__file__).parent.parent.glob("*.py"))]
    for name, megabytes in MEGABYTES.items():
        written, number = 0, 0
        with (directory / f"{name}.jsonl").open("w") as file:
            while written < megabytes * 2**20:
                text = f"# {name} {number}\n{library[number % len(library)]}"
                written += file.write(json.dumps({"text": text}) + "\n")
                number += 1
    return directory


@pytest.fixture
def live(tiny, raw) -> list[str]:
    kept = [word for word in tiny if not word.startswith(("+data.", "cache_dir="))]
    sources = [
        f"+data.sources.{name}.{key}={value}"
        for name, weight in (("web", 0.7), ("books", 0.3))
        for key, value in (("path", raw / f"{name}.jsonl"), ("weight", weight))
    ]
    return [*kept, *sources, "data.shuffle_span=64", "max_steps=30", "checkpoint.every=10"]


def workers(cache: Path) -> set[int]:
    """Processes that tokenise into a cache beside training."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                command = (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if b"llmtrain.data.workers" in command and str(cache).encode() in command:
                found.add(int(entry.name))
    return found


def test_a_live_run_equals_one_over_prepared_shards_also_after_kill_9(ranks, live, tmp_path):
    ahead = [*live, "data.preparation=ahead", f"cache_dir={tmp_path}/cache-a", f"output_dir={tmp_path}/ahead"]
    ranks.run(ahead, 2, tmp_path)
    expected = records(tmp_path / "ahead")
    assert sorted(expected) == list(range(1, 31))

    words = [*live, f"cache_dir={tmp_path}/cache-b", f"output_dir={tmp_path}/live"]
    job = ranks.start(words, 2, tmp_path, ALL_BUT_ONE)
    deadline = time.monotonic() + 120
    shards = tmp_path / "cache-b/shards"
    while not list(shards.glob("*/train/shard-*")):
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.005)
    assert workers(tmp_path / "cache-b"), job.output()
    job.kill(signal.SIGKILL)
    job.wait()
    deadline = time.monotonic() + 60
    while workers(tmp_path / "cache-b"):
        assert time.monotonic() < deadline, "a worker outlived its run"
        time.sleep(0.05)
    done = {path: path.stat().st_ino for path in shards.glob("*/train/shard-*/tokens.bin")}
    assert 1 <= len(done) < 4

    ranks.run(words, 2, tmp_path)
    assert {path: path.stat().st_ino for path in done} == done, "a shard was made again"
    run = records(tmp_path / "live")
    assert sorted(run) == list(range(1, 31))
    for step, rows in run.items():
        assert rows == expected[step] * len(rows), step
    hashes = [
        {
            json.loads(path.read_text())["manifest_hash"]
            for path in tmp_path.glob(f"{cache}/shards/*/train/index.json")
        }
        for cache in ("cache-a", "cache-b")
    ]
    assert len(hashes[0]) == 2
    assert hashes[0] == hashes[1]


def test_bad_text_found_while_training_ends_every_rank_by_name(ranks, live, raw, tmp_path):
    lines = (raw / "web.jsonl").read_text().splitlines(keepends=True)
    middle = len(lines) // 2
    (tmp_path / "web.jsonl").write_text("".join([*lines[:middle], *(["{broken\n"] * 200), *lines[middle:]]))
    options = [
        f"data.sources.web.path={tmp_path}/web.jsonl",
        f"cache_dir={tmp_path}/cache",
        "max_steps=100000",
    ]
    live = [word for word in live if not word.startswith("+data.sources.web.path")]
    job = ranks.start([*live, *[f"+{options[0]}"], *options[1:]], 2, tmp_path)
    assert job.wait() == [78, 78], job.output()
    assert "web.jsonl" in job.output()
    assert "malformed JSON" in job.output()
    assert "data.max_bad_fraction" in job.output()


def test_a_run_that_waits_for_text_stops_when_one_rank_is_told(ranks, live, tmp_path):
    job = ranks.start([*live, f"cache_dir={tmp_path}/cache", "data.workers=1"], 2, tmp_path)
    deadline = time.monotonic() + 120
    while not (found := workers(tmp_path / "cache")):
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.002)
    for worker in found:
        os.kill(worker, signal.SIGSTOP)  # before it has made anything: nobody will
    while "waiting for" not in job.output():
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.1)
    os.kill(job.pids[1], signal.SIGTERM)
    assert job.wait() == [85, 85], job.output()
    assert not list((tmp_path / "run").glob("checkpoints/step_*"))
    assert not workers(tmp_path / "cache")


@pytest.fixture
def evaluated(live) -> list[str]:
    """Evaluated after step 2 on everything that is held out: no sooner than all text is tokenised."""
    sizes = ["seq_len=512", "micro_batch_size=4", "max_steps=2", "data.validation_fraction=0.004"]
    return [*live, *sizes, "callbacks.evaluation.documents=null", "data.workers=1"]


def evaluation(run: Path) -> tuple[dict, dict]:
    """What the last line of metrics.jsonl says of it, and eval/heldout.json."""
    line = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    scores = {key: value for key, value in line.items() if key.startswith("eval/")}
    return scores, json.loads((run / "eval/heldout.json").read_text())


def test_an_evaluation_waits_for_held_out_text_can_be_stopped_and_misses_nothing(ranks, evaluated, tmp_path):
    ahead = ["data.preparation=ahead", f"cache_dir={tmp_path}/cache-a", f"output_dir={tmp_path}/ahead"]
    ranks.run([*evaluated, *ahead], 2, tmp_path)

    live, cache = [*evaluated, f"cache_dir={tmp_path}/cache-b"], tmp_path / "cache-b"
    job = ranks.start(live, 2, tmp_path, ALL_BUT_ONE)
    deadline = time.monotonic() + 240
    while "held-out shard" not in job.output():
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.1)
    os.kill(job.pids[1], signal.SIGTERM)
    assert job.wait() == [85, 85], job.output()
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step_*")] == ["step_00000001"]
    assert not workers(cache)
    assert len(list(cache.glob("shards/*/train/index.json"))) < 2, "nothing is left to wait for"

    ranks.run(live, 2, tmp_path)
    scores, stored = evaluation(tmp_path / "run")
    assert "eval/unigram_bits_per_byte" in scores
    assert (scores, stored) == evaluation(tmp_path / "ahead")


def test_where_answers_beside_a_run_whose_text_is_still_made_and_after_kill_9(ranks, live, tmp_path):
    cache, run = tmp_path / "cache", tmp_path / "run"
    options = ["max_steps=1000000", "checkpoint.every=1000000", "data.workers=1"]
    job = ranks.start([*live, f"cache_dir={cache}", *options], 1, tmp_path, ALL_BUT_ONE)
    deadline = time.monotonic() + 240
    while not RunDirectory(run).read_metrics():
        assert time.monotonic() < deadline, job.output()
        time.sleep(0.05)

    trained = list(where(run, {"step": "1"}))
    assert len(trained) == 8
    rows = []
    with pytest.raises(UserError, match="1 of 2 shards are made; the run makes them in the order of its"):
        rows.extend(where(run, {"step": "1000000"}))
    assert len(rows) < 8

    job.kill(signal.SIGKILL)
    job.wait()
    assert list(where(run, {"step": "1"})) == trained
    made = len(list(cache.glob("shards/*/train/shard-*")))
    command = [sys.executable, "-m", "llmtrain.where", str(run), "step=1000000", "format=json"]
    after = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert len(after.stdout.splitlines()) == 8
    assert after.stderr.count("1 of 2 shards are there; others that are needed are tokenised now") > 0
    assert len(list(cache.glob("shards/*/train/shard-*"))) > made
    assert not workers(cache)
