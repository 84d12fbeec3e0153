"""Text that is being prepared shows that it gets on, to this process and to those that wait for it."""

from __future__ import annotations

import itertools
import os
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from llmtrain.config import UserError
from llmtrain.data import artefacts, tokenizing
from llmtrain.data import prepare as prepare_module
from llmtrain.data.artefacts import POLL, locked, make_once, no_tick, touching
from llmtrain.data.growing import Preparation
from llmtrain.data.prepare import prepare
from llmtrain.data.progress import SilentProgress
from llmtrain.data.shards import Header
from llmtrain.data.workers import Crew, Job
from llmtrain.tokenizer import BytesTokenizer
from tests.data.test_prepare import BYTES, damaged_corpus, one


def test_who_waits_for_a_lock_hears_of_its_holder_only_while_that_one_gets_on(tmp_path: Path) -> None:
    lock, heard, count = tmp_path / "lock", threading.Semaphore(0), itertools.count(1)
    ticks: list[int] = []

    def tick() -> None:
        ticks.append(next(count))
        heard.release()

    def wait_for_it() -> None:
        with locked(lock, "it", tick):
            heard.release()

    with locked(lock, "it"):
        waiter = threading.Thread(target=wait_for_it)
        waiter.start()
        time.sleep(3 * POLL)
        assert not ticks, "a holder that does nothing is not heard of"
        touch = touching(lock, no_tick)
        touch()
        assert heard.acquire(timeout=60)
        touch()
        time.sleep(3 * POLL)
        assert len(ticks) == 1, "the file is not touched at every tick"
    assert heard.acquire(timeout=60)
    waiter.join()


def test_a_computation_ticks_while_it_computes_and_not_while_it_waits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(artefacts, "LOOK", 0.2)
    ticks: list[None] = []

    def compute(directory: Path) -> None:
        until = time.monotonic() + 60
        while not ticks and time.monotonic() < until:
            sum(range(10_000))

    make_once(tmp_path / "computed", compute, "it", lambda: ticks.append(None))
    assert ticks
    ticks.clear()
    monkeypatch.setattr(artefacts, "WORKS", 0.5)  # gloo's loops, which other tests left, wake every 10 ms
    make_once(tmp_path / "waited", lambda _: time.sleep(1.0), "it", lambda: ticks.append(None))
    assert not ticks


class Told(SilentProgress):
    """Counts how often it is."""

    times = 0

    def update(self, consumed: int, documents: int, text_bytes: int, tokens: int) -> None:
        self.times += 1


@pytest.mark.parametrize("workers", [1, 2])
def test_preparing_ticks_with_every_batch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    monkeypatch.setattr(prepare_module, "SMALL", 0)
    file, _, _ = damaged_corpus(tmp_path, 1000, 0)
    file.write_bytes(file.read_bytes() * 40)
    ticks: list[None] = []
    told = Told()
    prepare(one(file), BYTES, tmp_path / "cache", told, workers=workers, tick=lambda: ticks.append(None))
    assert len(ticks) >= told.times > 3


def test_who_makes_a_part_shows_it_to_other_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artefacts, "TOUCH", 0.0)
    file, _, _ = damaged_corpus(tmp_path, 1000, 0)
    file.write_bytes(file.read_bytes() * 40)
    seen: set[int] = set()

    def look() -> None:
        seen.update(claim.stat().st_mtime_ns for claim in tmp_path.glob("cache/shards/*/.claims/*"))
        time.sleep(0.02)  # file systems count time in ticks

    prepare(one(file), BYTES, tmp_path / "cache", tick=look)
    assert len(seen) > 2


def test_a_crew_whose_part_another_job_has_gets_on_as_that_one_does(tmp_path: Path) -> None:
    file, _, _ = damaged_corpus(tmp_path, 10, 0)
    config, header = one(file), Header(BytesTokenizer().fingerprint, 258, "bos_eos")
    preparation = Preparation("one", config.sources["one"], config, header, tmp_path / "cache")
    job = Job(preparation, 0)
    claim = preparation.directory / ".claims" / "00000.lock"
    claim.parent.mkdir(parents=True)
    claim.touch()
    crew = Crew([job], tmp_path, 1)

    def ask() -> int:
        crew._hear(SimpleNamespace(job=job), "elsewhere")  # type: ignore[arg-type]
        return crew.heard

    assert [ask(), ask()] == [0, 0]
    os.utime(claim, ns=(1, 1))
    assert [ask(), ask()] == [1, 1]


def test_reading_on_is_told_where_no_record_has_text(tmp_path: Path) -> None:
    def ticks(blocks: int) -> int:
        file, ticks = tmp_path / f"{blocks}.jsonl", list[None]()
        file.write_text('{"text": ""}\n' * (blocks * tokenizing.TELL_RECORDS))
        with pytest.raises(UserError, match="none has text"):
            prepare(one(file), BYTES, tmp_path / "cache", tick=lambda: ticks.append(None))
        return len(ticks)

    assert ticks(9) == ticks(3) + 6
