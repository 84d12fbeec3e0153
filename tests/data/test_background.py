"""Shards that are made while they are read equal those made ahead, and no process outlives its parent."""

from __future__ import annotations

import json
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
import pytest

from llmtrain.config import UserError
from llmtrain.data import growing
from llmtrain.data import prepare as prepare_module
from llmtrain.data import workers as workers_module
from llmtrain.data.prepare import Prepared, prepare
from llmtrain.data.readers import cutting
from llmtrain.data.shards import LocalShards
from llmtrain.data.workers import Crew, Job
from llmtrain.tokenizer import BytesConfig, BytesTokenizer, SentencePieceConfig
from tests.data.test_prepare import (
    BYTES,
    SENTENCEPIECE,
    data,
    hash_of,
    one,
    some_texts,
    tokens_of,
    write_texts,
)

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(cutting, "SMALLEST", 8000)
    monkeypatch.setattr(prepare_module, "SMALL", 0)
    monkeypatch.setattr(workers_module, "GRACE", 0.5)
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "a.jsonl", some_texts(1500))


def wait_for(prepared: Prepared, seconds: float = 60) -> None:
    """Wait until every shard is there; the errors of whoever makes them are raised."""
    deadline = time.monotonic() + seconds
    while not all(source.complete for source in prepared.open()[0].values()):
        assert time.monotonic() < deadline
        if prepared.crew is not None:
            prepared.crew.check()
        time.sleep(0.05)


def until(condition: Callable[[], object], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def crew() -> list[int]:
    """The workers of this process; the ranks that other tests keep warm are its children, too."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):  # a zombie has no command, either
            found += [child.pid] if "-P" in child.cmdline() else []
    return found


def alive(pids: list[int]) -> list[int]:
    found = []
    for pid in pids:
        with suppress(psutil.NoSuchProcess):
            found += [pid] if psutil.Process(pid).status() != psutil.STATUS_ZOMBIE else []
    return found


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("tokenizer", [BYTES, SENTENCEPIECE])
def test_background_or_ahead(
    workers: int, tokenizer: BytesConfig | SentencePieceConfig, file: Path, tmp_path: Path
) -> None:
    prepared = prepare(one(file), tokenizer, tmp_path / "cache", background=True, workers=workers)
    source, held_out = (split["one"] for split in prepared.open())
    assert not source.complete and source.tokens is None and source.manifest_hash is None
    assert source.shards == held_out.shards == len(cutting.parts(one(file).sources["one"])) > 10
    order = random.Random(0).sample(range(source.shards), source.shards)
    prepared.schedule({"one": order}, {"one": 1.0})
    lengths = source.lengths(np.array(order[:3]))  # waits for three shards, and not for all
    read = [source.read(shard, 0, int(length)) for shard, length in zip(order, lengths, strict=False)]
    wait_for(prepared)
    reference = prepare(one(file), prepared.tokenizer, tmp_path / "ahead", workers=1)
    assert hash_of(prepared.sources["one"]) == hash_of(reference.sources["one"])
    assert (source.manifest_hash, held_out.manifest_hash) == hash_of(reference.sources["one"])
    train, _ = reference.open()
    assert source.tokens == train["one"].tokens
    assert source.fingerprint == train["one"].fingerprint  # growing or complete, it is the same source
    for shard, ids in zip(order, read, strict=False):
        assert ids.tolist() == train["one"].read(shard, 0, len(ids)).tolist()
    assert prepared.conservation("one") == reference.conservation("one")
    prepared.close()


def test_small_input_is_prepared_at_once(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SMALL", 16 << 20)
    prepared = prepare(one(file), BYTES, tmp_path / "cache", background=True)
    assert prepared.complete and prepared.crew is None


class Recorder:
    """Which parts a crew hands out, in their order: it has no processes."""

    def __init__(self, crew: Crew) -> None:
        self.crew = crew

    def take(self, count: int) -> list[tuple[str, int]]:
        taken = []
        for _ in range(count):
            if (job := self.crew._next()) is not None:
                self.crew._open.discard(job.key)  # done
                taken.append((job.preparation.name, job.number))
        return taken


def test_what_is_made_first(tmp_path: Path, file: Path) -> None:
    other = write_texts(tmp_path / "b.jsonl", some_texts(1500, 5))
    paths = {"a": str(file), "b": str(other)}
    config = data({name: {"path": path, "weight": 1} for name, path in paths.items()})
    header = prepare_module.Header(BytesTokenizer().fingerprint, 258, "bos_eos")
    preparations = {
        name: growing.Preparation(name, source, config, header, tmp_path / "cache")
        for name, source in config.sources.items()
    }
    count = len(preparations["a"].parts)
    jobs = [Job(preparation, number) for preparation in preparations.values() for number in range(count)]
    crew = Crew(jobs, tmp_path, 1)
    recorder = Recorder(crew)
    assert recorder.take(2) == [("a", 0), ("a", 1)]  # the order of the files, as long as nobody knows better
    backwards = list(reversed(range(count)))
    crew.schedule({"a": backwards, "b": backwards}, {"a": 0.25, "b": 0.75})
    taken = recorder.take(12)
    shares = [name for name, _ in taken]
    assert 2 <= shares.count("a") <= 4
    assert set(shares[:2]) == {"a", "b"}  # the first shard of each source is needed first
    for name in "ab":
        numbers = [number for of, number in taken if of == name]
        assert numbers == backwards[: len(numbers)]
    crew.want(preparations["a"], [5, 3])
    crew.want(preparations["b"], [2])
    crew.want(preparations["a"], [1])  # which is there
    assert recorder.take(3) == [("b", 2), ("a", 5), ("a", 3)]
    rest = recorder.take(10 * count)
    assert len({*taken, *rest}) == len(taken) + len(rest) == 2 * count - 5  # each once


def test_an_error_reaches_everybody_who_waits(file: Path, tmp_path: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    lines[200] = b"{broken\n"
    file.write_bytes(b"".join(lines))
    config = one(file, bad_records="raise")
    prepared = prepare(config, BYTES, tmp_path / "cache", background=True, workers=1)
    # Another rank has no workers, and hears of it through the directory.
    preparation = growing.Preparation("one", config.sources["one"], config, prepared.open()[0]["one"].header,
                                      tmp_path / "cache")  # fmt: skip
    elsewhere = growing.GrowingShards(preparation, "train")
    caught: list[UserError] = []

    def wait() -> None:
        with pytest.raises(UserError) as error:
            for shard in range(elsewhere.count):
                elsewhere.path(shard)
        caught.append(error.value)

    waiting = threading.Thread(target=wait, daemon=True)  # one that waits for ever must not keep us
    waiting.start()
    with pytest.raises(UserError, match=r"malformed JSON.*data.bad_records=raise stops here") as here:
        wait_for(prepared)
    waiting.join(timeout=60)
    assert not waiting.is_alive(), "it was never told"
    assert [error.lines for error in caught] == [here.value.lines]
    prepared.close()
    # Mended by another rule, the old error is forgotten.
    again = prepare(one(file, max_bad_fraction=0.1), BYTES, tmp_path / "cache", background=True, workers=1)
    assert again.sources["one"].train == prepared.sources["one"].train
    wait_for(again)
    assert again.rejected("one") == {"malformed JSON": 1}
    again.close()


def test_one_who_waits_already_hears_of_a_failure(file: Path, tmp_path: Path) -> None:
    """Without workers of its own: the shard that another process failed at never comes."""
    config = one(file)
    header = prepare_module.Header(BytesTokenizer().fingerprint, 258, "bos_eos")
    preparation = growing.Preparation("one", config.sources["one"], config, header, tmp_path / "cache")
    preparation.begin()
    heard: list[list[str]] = []

    def wait() -> None:
        try:
            growing.GrowingShards(preparation, "train").path(3)
        except UserError as error:
            heard.append(list(error.lines))

    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    time.sleep(0.3)
    assert waiting.is_alive() and not heard
    preparation.fail(UserError("the disk is full"))
    waiting.join(timeout=60)
    assert not waiting.is_alive() and heard == [["the disk is full"]]


def test_parts_of_laxer_rules_are_found_out_before_anything_is_made(file: Path, tmp_path: Path) -> None:
    lines = file.read_bytes().splitlines(keepends=True)
    lines[:20] = [b"{broken\n"] * 20
    file.write_bytes(b"".join(lines))
    some = prepare(one(file, max_bad_fraction=1.0), BYTES, tmp_path / "cache", part=(1, 2), workers=1)
    train = some.sources["one"].train
    assert isinstance(train, Path) and not some.complete
    there = sorted(path.name for path in train.glob("shard-*"))
    assert "shard-00000" in there
    strict = prepare(one(file), BYTES, tmp_path / "cache", background=True, workers=1)
    with pytest.raises(UserError, match=rf"data.sources.one.path={file}: of .*20 are bad \(20 malformed"):
        wait_for(strict)
    strict.close()
    assert sorted(path.name for path in train.glob("shard-*")) == there


def test_a_rank_without_workers_only_waits(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(growing, "SPEAK", 0.1)
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    second = prepare(one(file), BYTES, tmp_path / "cache", background=True)
    assert second.crew is None
    monkeypatch.delenv("RANK")
    source = second.open()[0]["one"]
    count = source.shards
    found: list[int] = []
    with caplog.at_level(logging.INFO, logger="llmtrain"):
        waiting = threading.Thread(target=lambda: found.append(int(source.lengths(np.array([2]))[0])))
        waiting.start()
        expected = f"waiting for one: shard 3 of {count} is being tokenised (0 of {count} done"
        until(lambda: any(line.startswith(expected) for line in caplog.messages))
        first = prepare(one(file), BYTES, tmp_path / "cache", background=True)
        first.schedule({}, {})
        waiting.join(timeout=60)
        wait_for(first)
    assert found and found[0] > 0
    first.close()


def test_closing_stops_at_once(file: Path, tmp_path: Path) -> None:
    prepared = prepare(one(file), BYTES, tmp_path / "cache", background=True, workers=2)
    until(crew)
    pids = crew()
    source = prepared.open()[0]["one"]
    source.lengths(np.array([0]))
    began = time.monotonic()
    prepared.close()
    assert time.monotonic() - began < 25, "it waited as long as it may"
    assert not alive(pids)
    there = len(list((prepared.sources["one"].train).glob("shard-*")))  # type: ignore[union-attr]
    if there < source.shards:
        with pytest.raises(RuntimeError, match="closed"):
            source.lengths(np.arange(source.shards))
    ahead = prepare(one(file), BYTES, tmp_path / "cache", workers=1)
    reference = prepare(one(file), BYTES, tmp_path / "other", workers=1)
    assert hash_of(ahead.sources["one"]) == hash_of(reference.sources["one"])


def test_a_worker_that_is_killed_is_replaced(file: Path, tmp_path: Path) -> None:
    prepared = prepare(one(file), BYTES, tmp_path / "cache", background=True, workers=1)
    until(crew)
    (pid,) = crew()
    os.kill(pid, signal.SIGSTOP)  # it still starts
    assert prepared.crew is not None
    prepared.schedule({}, {})
    until(lambda: any(worker.job for worker in prepared.crew._workers))  # the part it is given dies with it
    os.kill(pid, signal.SIGKILL)
    wait_for(prepared)
    assert pid not in crew()
    prepared.close()
    assert tokens_of(prepared.sources["one"].train)


HOLDER = """
import json, os, sys, time
from pathlib import Path
import psutil
import llmtrain.data.prepare
from llmtrain.data.readers import cutting
from tests.data.test_prepare import BYTES, one

if __name__ == "__main__":
    cutting.SMALLEST, llmtrain.data.prepare.SMALL = 8000, 0
    prepare = llmtrain.data.prepare.prepare
    prepared = prepare(one(sys.argv[1]), BYTES, Path(sys.argv[2]), background=True, workers=2)
    source = prepared.open()[0]["one"]
    source.offsets(source.shards // 2)
    print(json.dumps([child.pid for child in psutil.Process().children()]), flush=True)
    if sys.argv[3] == "stay":
        time.sleep(600)
    if sys.argv[3] == "raise":
        raise SystemExit(3)
"""


@pytest.mark.parametrize(("how", "code"), [("stay", -signal.SIGKILL), ("leave", 0), ("raise", 3)])
def test_no_process_outlives_its_parent(how: str, code: int, tmp_path: Path) -> None:
    """However it ends; and what it had done by then is not done again."""
    file = write_texts(tmp_path / "long.jsonl", some_texts(30_000))
    (tmp_path / "holder.py").write_text(HOLDER)
    command = [sys.executable, tmp_path / "holder.py", file, tmp_path / "cache", how]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None
    pids = json.loads(process.stdout.readline())
    assert len(pids) == 2
    if how == "stay":
        assert alive(pids) == pids
        process.kill()
    assert process.wait(timeout=60) == code
    deadline = time.monotonic() + 60
    while alive(pids):
        assert time.monotonic() < deadline, "a worker outlived its parent"
        time.sleep(0.02)
    (source,) = (tmp_path / "cache/shards").iterdir()
    done = {path: path.stat().st_mtime_ns for path in source.glob("train/shard-*/*")}
    assert 0 < len(list(source.glob("train/shard-*"))) < len(cutting.parts(one(file).sources["one"]))
    prepared = prepare(one(file), BYTES, tmp_path / "cache", workers=1)
    assert {path: path.stat().st_mtime_ns for path in done} == done
    reference = prepare(one(file), BYTES, tmp_path / "reference", workers=1)
    assert hash_of(prepared.sources["one"]) == hash_of(reference.sources["one"])


def test_workers_need_neither_torch_nor_the_program_that_starts_them(file: Path, tmp_path: Path) -> None:
    program = "import sys, llmtrain.data.workers; sys.exit(bool({'torch', 'transformers'} & {*sys.modules}))"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY).returncode == 0
    # A program without the guard that `multiprocessing` asks for, whose import would start all over again.
    (tmp_path / "bare.py").write_text(HOLDER.replace('if __name__ == "__main__":', "if True:"))
    command = [sys.executable, tmp_path / "bare.py", file, tmp_path / "cache", "leave"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    assert subprocess.run(command, env=environment, timeout=60).returncode == 0


def test_a_run_directory_finds_what_grew(file: Path, tmp_path: Path) -> None:
    """What is written down when training starts holds when the shards are complete."""
    prepared = prepare(one(file, validation_fraction=1e-9), BYTES, tmp_path / "cache", background=True)
    written = json.loads(json.dumps(prepared.as_dict()))
    assert not Prepared.from_dict(prepared.tokenizer, written, None, 0).sources["one"].is_there()
    assert set(prepared.open()[1]) == {"one"}  # nobody knows yet that nothing is held out
    wait_for(prepared)
    later = Prepared.from_dict(prepared.tokenizer, written, None, 0)
    assert later.sources["one"].is_there()
    train, held_out = later.open()
    assert set(train) == {"one"} and not held_out
    source = later.sources["one"].train
    assert isinstance(source, Path)
    assert LocalShards(source).index["documents"] == train["one"].documents == 1500
    prepared.close()
