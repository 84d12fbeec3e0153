"""Prepared shards hold every document once, are made once, and survive a kill at any moment."""

from __future__ import annotations

import itertools
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from llmtrain.config import UserError
from llmtrain.data import prepare as prepare_module
from llmtrain.data.artefacts import make_once
from llmtrain.data.config import DataConfig
from llmtrain.data.prepare import batches, is_held_out, prepare, sample_documents, train_tokenizer
from llmtrain.data.progress import LogProgress, work
from llmtrain.data.readers import Document
from llmtrain.data.shards import ShardedSource
from llmtrain.tokenizer import BytesConfig, HuggingFaceConfig, SentencePieceConfig

BYTES = BytesConfig(kind="bytes")
SENTENCEPIECE = SentencePieceConfig(kind="sentencepiece", path=None, vocab_size=400)
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "every", "good", "boy"]


def data(sources: dict[str, Any], **keys: Any) -> DataConfig:
    defaults = {"documents": "separate", "boundary": "bos_eos", "shuffle_span": 1, "validation_fraction": 0.2}
    return DataConfig.model_validate({"sources": sources, **defaults, **keys})


def one(path: Path | str, **keys: Any) -> DataConfig:
    return data({"one": {"path": str(path), "weight": 1.0}}, **keys)


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def some_texts(count: int, seed: int = 0) -> list[str]:
    return [
        " ".join(WORDS[(seed + i * k) % len(WORDS)] for k in range(1, 12)) + f" {seed}.{i}\n"
        for i in range(count)
    ]


def tokens_of(directory: Path | None) -> list[list[int]]:
    if directory is None:
        return []
    source = ShardedSource.open(directory)
    found = []
    for shard in range(len(source.lengths)):
        offsets = source.offsets(shard).tolist()
        found += [source.read(shard, a, b).tolist() for a, b in itertools.pairwise(offsets)]
    return found


def test_every_document_is_in_exactly_one_split(tmp_path: Path) -> None:
    texts = [*some_texts(300), "", "漢字 🎉", "", some_texts(1)[0]]  # the last is the first once more
    file = write_texts(tmp_path / "a.jsonl", texts)
    prepared = prepare(one(file), BYTES, tmp_path / "cache").sources["one"]
    train, held_out = tokens_of(prepared.train), tokens_of(prepared.validation)
    assert all((ids[0], ids[-1]) == (256, 257) for ids in train + held_out)
    text_of = prepare(one(file), BYTES, tmp_path / "cache").tokenizer.decode
    found = Counter(text_of(ids) for ids in train) + Counter(text_of(ids) for ids in held_out)
    assert found == Counter(text for text in texts if text)
    assert [text_of(ids) for ids in train] == [t for t in texts if t and not is_held_out(t.encode(), 0.2)]
    assert not {text_of(ids) for ids in train} & {text_of(ids) for ids in held_out}
    index = ShardedSource.open(prepared.train).index
    tokens = sum(map(len, train + held_out))
    text_bytes = sum(len(text.encode()) for text in texts)
    assert index["input"] == {"documents": 304, "tokens": tokens, "text_bytes": text_bytes, "empty": 2}


def test_the_held_out_fraction(tmp_path: Path) -> None:
    held_out = sum(is_held_out(str(i).encode(), 0.05) for i in range(20_000))
    assert abs(held_out - 1000) < 5 * 31  # five standard deviations of a binomial
    file = write_texts(tmp_path / "a.jsonl", some_texts(50))
    assert prepare(one(file, validation_fraction=0), BYTES, tmp_path / "c").sources["one"].validation is None
    with pytest.raises(
        UserError, match=r"data.sources.one .* 50 are held out .* lower data.validation_fraction"
    ):
        prepare(one(file, validation_fraction=0.9999999), BYTES, tmp_path / "c")
    with pytest.raises(UserError, match=r"of 2 documents none has any text"):
        prepare(one(write_texts(tmp_path / "b.jsonl", ["", ""])), BYTES, tmp_path / "c")


@pytest.mark.parametrize(
    ("boundary", "ends"),
    [("bos_eos", (256, 257)), ("bos", (256, 98)), ("eos", (97, 257)), ("none", (97, 98))],
)
def test_boundary(boundary: str, ends: tuple[int, int], tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", ["ab"])
    prepared = prepare(one(file, boundary=boundary, validation_fraction=0), BYTES, tmp_path / "cache")
    (ids,) = tokens_of(prepared.sources["one"].train)
    assert (ids[0], ids[-1]) == ends


def test_a_boundary_the_tokenizer_cannot_serve(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models

    Tokenizer(models.WordLevel({"a": 0, "<unk>": 1}, unk_token="<unk>")).save(
        str(tmp_path / "tokenizer.json")
    )
    file = write_texts(tmp_path / "a.jsonl", ["a"])
    config = HuggingFaceConfig(kind="huggingface", path=tmp_path)
    with pytest.raises(
        UserError, match=r"data.boundary=bos_eos: the tokenizer has no bos id; set data.boundary to none"
    ):
        prepare(one(file), config, tmp_path / "cache")


def test_what_the_cache_depends_on(tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", some_texts(20))
    cache = tmp_path / "cache"

    def where(config: DataConfig) -> Path:
        return next(iter(prepare(config, BYTES, cache).sources.values())).train

    first = where(one(file))
    assert first == where(
        data({"other_name": {"path": str(file), "epochs": 3.0}}, shuffle_span=7, documents="attend")
    )
    assert first != where(one(file, boundary="eos"))
    assert first != where(one(file, validation_fraction=0.1))
    write_texts(file, some_texts(21))
    assert first != where(one(file))


def test_two_machines_agree(tmp_path: Path) -> None:
    """The same text elsewhere, prepared in other batches, has the same manifest hash."""
    hashes = []
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
        file = write_texts(tmp_path / name / f"{name}.jsonl", some_texts(200))
        prepared = prepare(one(file), SENTENCEPIECE, tmp_path / name / "cache")
        hashes.append(ShardedSource.open(prepared.sources["one"].train).manifest_hash)
    assert hashes[0] == hashes[1]


def test_the_tokenizer_is_trained_once_on_training_documents(tmp_path: Path) -> None:
    files = [write_texts(tmp_path / f"{name}.jsonl", some_texts(200, seed)) for seed, name in enumerate("ab")]
    names = [{"a": 0, "b": 1}, {"x": 1, "y": 0}]
    configs = [
        data({n: {"path": str(files[i]), "weight": 1.0 + i} for n, i in order.items()}) for order in names
    ]
    first, second = (train_tokenizer(config, 400, tmp_path / "cache") for config in configs)
    assert first == second != train_tokenizer(configs[0], 401, tmp_path / "cache")
    sample = [document.text for document in sample_documents(configs[0])]
    assert sample == [document.text for document in sample_documents(configs[1])]
    everything = some_texts(200, 0) + some_texts(200, 1)
    assert sorted(sample) == sorted(text for text in everything if not is_held_out(text.encode(), 0.2))


def test_the_sample_is_bounded_and_in_proportion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "SAMPLE_BYTES", 20_000)
    monkeypatch.setattr(prepare_module, "SAMPLE_INPUTS", 4)
    (tmp_path / "many").mkdir()
    for i in range(8):
        write_texts(tmp_path / "many" / f"{i}.jsonl", some_texts(300, i))
    (tmp_path / "long.txt").write_text("x" * 60_000)
    config = data(
        {n: {"path": str(tmp_path / n), "weight": 1.0} for n in ("many", "long.txt")}, validation_fraction=0
    )
    sample = list(sample_documents(config))
    sizes = Counter[str]()
    for document in sample:
        sizes[Path(document.file).name] += len(document.text)
    assert 18_000 <= sizes.total() <= 20_000
    many = sum((tmp_path / "many" / f"{i}.jsonl").stat().st_size for i in range(8))
    assert sizes["long.txt"] == pytest.approx(20_000 * 60_000 / (60_000 + many), abs=1)
    assert sorted(name for name in sizes if name != "long.txt") == [
        "0.jsonl",
        "2.jsonl",
        "4.jsonl",
        "6.jsonl",
    ]


def test_prepared_shards_as_a_source(tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", some_texts(100))
    made = prepare(one(file), BYTES, tmp_path / "cache").sources["one"]
    again = prepare(one(made.train), BYTES, tmp_path / "unused").sources["one"]
    assert (again.train, again.validation) == (made.train, made.validation and made.validation.resolve())
    assert not (tmp_path / "unused").exists()
    with pytest.raises(UserError, match=r"was prepared with boundary bos_eos, not eos: set data.boundary"):
        prepare(one(made.train, boundary="eos"), BYTES, tmp_path / "cache")
    with pytest.raises(
        UserError, match=r"tokenizer.path is null, and every source is already made of tokens"
    ):
        prepare(one(made.train), SENTENCEPIECE, tmp_path / "cache")
    both = data({"text": {"path": str(file), "weight": 1}, "shards": {"path": str(made.train), "weight": 1}})
    with pytest.raises(UserError, match=r"data.sources.shards.path=.* was prepared with tokenizer"):
        prepare(both, SENTENCEPIECE, tmp_path / "cache")
    with pytest.raises(UserError, match="not a prepared directory"):
        prepare(
            data({"s": {"path": str(tmp_path), "format": "shards", "weight": 1}}), BYTES, tmp_path / "cache"
        )


def test_every_missing_input_is_named_at_once(tmp_path: Path) -> None:
    sources = {name: {"path": str(tmp_path / f"{name}.jsonl"), "weight": 1.0} for name in "ab"}
    with pytest.raises(UserError) as caught:
        prepare(data(sources), BYTES, tmp_path / "cache")
    starts = [f"data.sources.{name}.path={tmp_path / name}.jsonl: no file matches" for name in "ab"]
    assert all(line.startswith(start) for line, start in zip(caught.value.lines, starts, strict=True))


def test_batches_keep_order_and_size() -> None:
    documents = [Document("x" * n, "f", n, 0) for n in (5, 5, 30, 1, 2)]
    assert [[d.row for d in batch] for batch in batches(iter(documents), 10)] == [[5, 5], [30], [1, 2]]


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", some_texts(10))
    file.write_text(file.read_text() + "{broken\n")
    with pytest.raises(UserError, match=r"a\.jsonl:11: malformed JSON"):
        prepare(one(file), BYTES, tmp_path / "cache")
    assert [path.suffix for path in (tmp_path / "cache/shards").iterdir()] == [".lock"]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a directory should be")
    with pytest.raises(UserError, match=r"cache_dir: .*cache"):
        make_once(tmp_path / "cache" / "key", lambda _: None, "nothing")


SLOW = """
import sys, time
from pathlib import Path
from llmtrain.data.config import DataConfig
from llmtrain.data.prepare import prepare
from llmtrain.tokenizer import BytesTokenizer, TokenizerConfig

def log(word):
    with open(sys.argv[3], "a") as file:
        file.write(word + "\\n")

class Slow(BytesTokenizer):
    def encode_batch(self, texts):
        log("batch")
        time.sleep(float(sys.argv[4]))
        return super().encode_batch(texts)

class SlowConfig(TokenizerConfig):
    def load(self):
        return Slow()

if __name__ == "__main__":
    import llmtrain.data.prepare
    llmtrain.data.prepare.BATCH_BYTES = 2000
    source = {"one": {"path": sys.argv[1], "weight": 1.0}}
    keys = dict(documents="separate", boundary="bos_eos", shuffle_span=1, validation_fraction=0.2)
    log("asks")
    prepared = prepare(DataConfig(sources=source, **keys), SlowConfig(), Path(sys.argv[2]))
    print(prepared.sources["one"].train)
"""


@pytest.fixture
def slow(tmp_path: Path) -> Path:
    (tmp_path / "slow.py").write_text(SLOW)
    return tmp_path / "slow.py"


def start(slow: Path, file: Path, seconds: float) -> subprocess.Popen[str]:
    home = slow.parent
    command = [sys.executable, slow, file, home / "cache", home / "log", str(seconds)]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def batches_done(log: Path) -> int:
    return log.read_text().count("batch") if log.is_file() else 0


def test_a_killed_preparation_is_begun_again(slow: Path, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", some_texts(400))
    process = start(slow, file, 0.2)
    while batches_done(tmp_path / "log") < 4:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    left = sorted(path.name for path in (tmp_path / "cache/shards").iterdir())
    assert [name[:5] for name in left if not name.endswith(".lock")] == [".tmp-"]  # hidden, and only that
    assert list((tmp_path / "cache/shards").glob(".tmp-*/train/shard-00000/tokens.bin"))  # it was at work
    prepared = prepare(one(file), BYTES, tmp_path / "cache").sources["one"]
    reference = prepare(one(file), BYTES, tmp_path / "untouched").sources["one"]
    assert tokens_of(prepared.train) == tokens_of(reference.train) != []
    assert not list((tmp_path / "cache/shards").glob(".tmp-*"))


def test_two_processes_at_once_do_the_work_once(slow: Path, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", some_texts(400))
    processes = [start(slow, file, 0.4) for _ in range(2)]
    answers = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0] == answers[1] != ""
    count = batches_done(tmp_path / "log")
    assert "asks" in (tmp_path / "log").read_text().splitlines()[1:-1]  # they did want it at the same time
    (tmp_path / "log").unlink()
    alone = write_texts(tmp_path / "b.jsonl", some_texts(400))
    start(slow, alone, 0).communicate(timeout=60)
    assert count == batches_done(tmp_path / "log") > 5


def test_a_long_preparation_shows_that_it_lives(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", some_texts(100))
    with caplog.at_level(logging.INFO, logger="llmtrain"):
        prepare(one(file), BYTES, tmp_path / "cache", LogProgress(seconds=0))
    assert any(
        "prepare one: 100 documents" in line and "100% of the input" in line for line in caplog.messages
    )
    assert any(line.startswith("prepared one: 100 documents = ") for line in caplog.messages)
    caplog.clear()
    progress = LogProgress(seconds=60)
    with work(progress, "short", 10):
        progress.update(5, 1, 1, 1)
    assert not caplog.messages
