"""Prepared shards hold every document once, are made once, and survive a kill at any moment."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from llmtrain.config import UserError
from llmtrain.data import prepare as prepare_module
from llmtrain.data import tokenizing
from llmtrain.data.artefacts import claimed, make_once, publish
from llmtrain.data.config import DataConfig
from llmtrain.data.prepare import (
    PreparedSource,
    parse_part,
    prepare,
    prepared_tokens,
    sample_documents,
    train_tokenizer,
)
from llmtrain.data.progress import LogProgress, work
from llmtrain.data.readers import cutting
from llmtrain.data.records import REASONS, Document
from llmtrain.data.shards import LocalShards, ShardedSource
from llmtrain.data.tokenizing import batches, is_held_out
from llmtrain.tokenizer import BytesConfig, BytesTokenizer, HuggingFaceConfig, SentencePieceConfig

BYTES = BytesConfig(kind="bytes")
SENTENCEPIECE = SentencePieceConfig(kind="sentencepiece", path=None, vocab_size=400)
WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "every", "good", "boy"]


DEFAULTS: dict[str, Any] = {
    "stages": [],
    "skip": [],
    "documents": "separate",
    "boundary_targets": None,
    "boundary": "bos_eos",
    "packing": "cut",
    "max_padding": 0.01,
    "curriculum": None,
    "shuffle_span": 1,
    "validation_fraction": 0.2,
    "bad_records": "quarantine",
    "max_bad_fraction": 0.001,
    "max_document_bytes": 2**24,
    "preparation": "ahead",
    "workers": None,
    "remote_cache_gb": 1.0,
}


def data(sources: dict[str, Any], **keys: Any) -> DataConfig:
    return DataConfig.model_validate({"sources": sources, **DEFAULTS, **keys})


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


def identity(path: Path) -> tuple[int, int]:
    return path.stat().st_ino, path.stat().st_mtime_ns


def hash_of(source: PreparedSource) -> tuple[str | None, str | None]:
    """The manifest hashes of both splits."""
    assert isinstance(source.train, Path)
    splits = source.train, source.train.parent / "validation"
    train, validation = (ShardedSource.open(split).manifest_hash for split in splits)
    return train, validation


def tokens_of(directory: Path | str | None) -> list[list[int]]:
    if directory is None:
        return []
    assert isinstance(directory, Path)
    source = ShardedSource.open(directory)
    found = []
    for shard in range(source.shards):
        offsets = source.offsets(shard).tolist()
        found += [source.read(shard, a, b).tolist() for a, b in itertools.pairwise(offsets)]
    return found


def test_complete_shards_are_asked_once_what_came_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepared = prepare(one(write_texts(tmp_path / "a.jsonl", some_texts(50))), BYTES, tmp_path / "cache")
    opened: list[Path] = []

    class Counted(LocalShards):
        def __init__(self, directory: Path) -> None:
            opened.append(directory)
            super().__init__(directory)

    monkeypatch.setattr("llmtrain.data.prepared.LocalShards", Counted)
    came = [prepared.conservation("one") for _ in range(3)]
    assert came[0] and came == [came[0]] * 3
    assert len(opened) == 2  # train and validation


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
    rejected = {"empty": 2}
    expected = {"documents": 304, "tokens": tokens, "text_bytes": text_bytes, "rejected": rejected}
    assert index["input"] == expected
    again = prepare(one(file), BYTES, tmp_path / "cache")
    splits = {"train": len(train), "held_out": len(held_out)}
    assert again.conservation("one") == {**expected, **splits, "complete": True}
    assert again.rejected("one") == rejected
    assert again.quarantine("one") == []  # an empty record is no mistake, and there is nothing to keep


def test_the_held_out_fraction(tmp_path: Path) -> None:
    held_out = sum(is_held_out(str(i).encode(), 0.05) for i in range(20_000))
    assert abs(held_out - 1000) < 5 * 31  # five standard deviations of a binomial
    file = write_texts(tmp_path / "a.jsonl", some_texts(50))
    assert prepare(one(file, validation_fraction=0), BYTES, tmp_path / "c").sources["one"].validation is None
    with pytest.raises(
        UserError, match=r"data.sources.one .* 50 are held out .* lower data.validation_fraction"
    ):
        prepare(one(file, validation_fraction=0.9999999), BYTES, tmp_path / "c")
    with pytest.raises(UserError, match=r"of 2 documents none has text to train on \(2 empty\)"):
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
        write_texts(tmp_path / "many" / f"{i}.jsonl", [f"{i} {text}" for text in some_texts(300, i)])
    (tmp_path / "long.txt").write_text("x" * 60_000)
    config = data(
        {n: {"path": str(tmp_path / n), "weight": 1.0} for n in ("many", "long.txt")}, validation_fraction=0
    )
    sample = list(sample_documents(config))
    sizes = Counter[str]()
    for document in sample:
        sizes[document.text[0]] += len(document.text)
    assert 18_000 <= sizes.total() <= 20_000
    many = sum((tmp_path / "many" / f"{i}.jsonl").stat().st_size for i in range(8))
    assert sizes["x"] == pytest.approx(20_000 * 60_000 / (60_000 + many), abs=1)
    assert sorted(name for name in sizes if name != "x") == ["0", "2", "4", "6"]


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
    paths = {"text": str(file), "shards": str(made.train)}
    both = data({name: {"path": path, "weight": 1} for name, path in paths.items()})
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
    documents = [Document("x" * n, n) for n in (5, 5, 30, 1, 2)]
    assert [[d.position for d in batch] for batch in batches(iter(documents), 10)] == [[5, 5], [30], [1, 2]]


def test_an_error_leaves_nothing_half_made(tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", some_texts(10))
    size = file.stat().st_size
    file.write_text(file.read_text() + "{broken\n")
    with pytest.raises(UserError, match=rf"data.sources.one.path=.*byte {size}: malformed JSON.*quarantine"):
        prepare(one(file, bad_records="raise"), BYTES, tmp_path / "cache")
    (source,) = (tmp_path / "cache/shards").iterdir()
    assert sorted(path.name for path in source.iterdir()) == [".claims", "source.json", "train", "validation"]
    assert not [*source.glob("train/*"), *source.glob("validation/*")]


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("a file where a directory should be")
    with pytest.raises(UserError, match=r"cache_dir: .*cache"):
        make_once(tmp_path / "cache" / "key", lambda _: None, "nothing")


GOOD, BAD = 10_000, 500


def damaged_corpus(directory: Path, count: int = GOOD, bad: int = BAD) -> tuple[Path, Path, Counter[str]]:
    """Good records with bad ones between them, the good ones alone, and how many bad there are by reason."""
    kinds: list[tuple[str, bytes]] = [
        ("malformed JSON", b'{"text": "cut off'),
        ("malformed JSON", b"plain words"),
        ("not an object", b'["text"]'),
        ("not an object", b"17"),
        ("duplicate key", b'{"text": "a", "text": "b"}'),
        ("missing field", b'{"title": "a"}'),
        ("null", b'{"text": null}'),
        ("not text", b'{"text": 5}'),
        ("not text", b'{"text": ["a"]}'),
        ("not UTF-8", b'{"text": "\xff\xfe"}'),
        ("half a surrogate pair", b'{"text": "\\ud83d"}'),
        ("NUL", b'{"text": "a\\u0000b"}'),
        ("empty", b'{"text": " \\n"}'),
        ("too long", b'{"text": "' + b"x" * 3000 + b'"}'),
    ]
    chosen = random.Random(0)
    lines = [(json.dumps({"text": text}).encode(), "") for text in some_texts(count)]
    clean = b"".join(line + b"\n" for line, _ in lines)
    for number in range(bad):
        reason, line = kinds[number % len(kinds)]
        lines.insert(chosen.randrange(len(lines) + 1), (line, reason))
    (directory / "mixed.jsonl").write_bytes(b"".join(line + b"\n" for line, _ in lines))
    (directory / "clean.jsonl").write_bytes(clean)
    return (
        directory / "mixed.jsonl",
        directory / "clean.jsonl",
        Counter(reason for _, reason in lines if reason),
    )


def test_bad_records_are_counted_kept_and_not_trained(tmp_path: Path) -> None:
    mixed, clean, reasons = damaged_corpus(tmp_path)
    keys = {"max_document_bytes": 2000, "max_bad_fraction": 0.1}
    assert reasons.total() == BAD and set(reasons) == set(REASONS)
    made, reference = (prepare(one(file, **keys), BYTES, tmp_path / "cache") for file in (mixed, clean))
    assert made.rejected("one") == dict(reasons)
    assert reference.rejected("one") == {}
    here, there = made.sources["one"], reference.sources["one"]
    assert tokens_of(here.train) == tokens_of(there.train) != []
    assert tokens_of(here.validation) == tokens_of(there.validation) != []
    came = made.conservation("one")
    assert came is not None
    assert came["documents"] == GOOD + BAD
    assert came["tokens"] == sum(map(len, tokens_of(here.train) + tokens_of(here.validation)))
    (kept,) = made.quarantine("one")
    lines = [json.loads(line) for line in kept.read_text().splitlines()]
    assert Counter(line["reason"] for line in lines) == reasons - Counter({"empty": reasons["empty"]})
    content = mixed.read_bytes()
    for line in lines:
        assert line["file"] == str(mixed) and line["unit"] == "byte"
        record = content[line["position"] :].split(b"\n")[0]
        assert line["record"] == record.decode(errors="backslashreplace")
        assert line["size"] in (len(record), len(record) + 1)


def test_too_many_bad_records_stop_by_name(tmp_path: Path) -> None:
    mixed, _, reasons = damaged_corpus(tmp_path)
    pattern = (
        rf"data.sources.one.path={mixed}: of [\d,]+ records of {mixed} that were read, \d+ are bad"
        r" \(.*malformed JSON.*\), more than data.max_bad_fraction=0.001 allows; the first is"
        rf" {mixed} at byte \d+: .*raise data.max_bad_fraction"
    )
    keys = {"max_document_bytes": 2000}
    with pytest.raises(UserError, match=pattern):
        prepare(one(mixed, **keys), BYTES, tmp_path / "cache")
    lenient = prepare(one(mixed, max_bad_fraction=0.1, **keys), BYTES, tmp_path / "cache")
    # What is in the cache now was made under another rule, which is no way around this one.
    bad = reasons.total() - reasons["empty"]
    with pytest.raises(UserError, match=rf"of 10,500 records of .*, {bad} are bad"):
        prepare(one(mixed, **keys), BYTES, tmp_path / "cache")
    with pytest.raises(UserError, match=r"data.bad_records=raise stops here"):
        prepare(one(mixed, bad_records="raise", max_bad_fraction=0.1, **keys), BYTES, tmp_path / "cache")
    skipping = one(mixed, bad_records="skip", max_bad_fraction=0.1, **keys)
    skipped = prepare(skipping, BYTES, tmp_path / "other")
    assert skipped.rejected("one") == lenient.rejected("one")
    assert skipped.quarantine("one") == []
    assert hash_of(skipped.sources["one"]) == hash_of(lenient.sources["one"])


def test_a_wrong_key_says_which_there_are(tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", some_texts(20))
    config = data({"one": {"path": str(file), "weight": 1, "text_key": "body"}})
    with pytest.raises(UserError, match=r"20 missing field.*body.*text_key.*there are: text"):
        prepare(config, BYTES, tmp_path / "cache")
    many = write_texts(tmp_path / "b.jsonl", some_texts(20_000))
    config = data({"one": {"path": str(many), "weight": 1, "text_key": "body"}})
    with pytest.raises(UserError, match=r"of 1,000 records .* were read"):  # it did not read on to the end
        prepare(config, BYTES, tmp_path / "cache")


def test_the_share_of_bad_records_is_that_of_the_whole_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad line in a stretch of a hundred is none too many if the file has thousands."""
    monkeypatch.setattr(cutting, "SMALLEST", 8000)
    lines = [json.dumps({"text": text}) for text in some_texts(3000)]
    lines[70] = "{"
    file = tmp_path / "a.jsonl"
    file.write_text("\n".join(lines) + "\n")
    assert len(cutting.parts(one(file).sources["one"])) > 20
    prepared = prepare(one(file), BYTES, tmp_path / "cache")
    assert prepared.rejected("one") == {"malformed JSON": 1}
    for number in range(0, 60, 10):
        lines[number] = "{"
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(UserError, match=r"of 3,000 records of .*, 7 are bad"):
        prepare(one(file), BYTES, tmp_path / "cache")


def test_the_worst_file_is_the_one_with_the_largest_share(tmp_path: Path) -> None:
    """More bad records in a long file are fewer of a hundred; what is remembered is held to later rules."""
    (tmp_path / "many").mkdir()
    for name, count, bad in (("long", 3000, 9), ("short", 100, 3)):
        lines = [json.dumps({"text": f"{name} {text}"}) for text in some_texts(count)]
        lines[:bad] = ["{"] * bad
        (tmp_path / "many" / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    made = prepare(one(tmp_path / "many", max_bad_fraction=1.0), BYTES, tmp_path / "cache")
    assert made.rejected("one") == {"malformed JSON": 12}
    with pytest.raises(UserError, match=r"of 100 records of \S*short\.jsonl that were read, 3 are bad"):
        prepare(one(tmp_path / "many", max_bad_fraction=0.01), BYTES, tmp_path / "cache")


@pytest.mark.parametrize("together", [True, False])
def test_bad_records_that_were_skipped_are_said_not_to_be_kept(
    together: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cutting, "SMALLEST", 8000)
    caplog.set_level(logging.INFO)
    mixed, _, _ = damaged_corpus(tmp_path, 1000, 20)
    part = (1, 1) if together else (1, 2)
    skipping = one(mixed, bad_records="skip", max_bad_fraction=0.5)
    prepare(skipping, BYTES, tmp_path / "cache", part=part)
    assert "not kept" not in caplog.text
    keeping = one(mixed, max_bad_fraction=0.5)
    for _ in range(2):  # the second time it is complete
        caplog.clear()
        prepared = prepare(keeping, BYTES, tmp_path / "cache")
        (line,) = [line for line in caplog.messages if "not kept" in line]
        (directory,) = (tmp_path / "cache/shards").iterdir()
        count = int(line.removeprefix("source one: ").split()[0])
        assert f"to keep them, delete {directory} and prepare again" in line
        kept = sum(path.read_text().count("\n") for path in prepared.quarantine("one"))
        assert (count > 0, kept > 0) == (True, not together)
        rejected = prepared.rejected("one")
        assert count + kept == sum(rejected.values()) - rejected["empty"]
    shutil.rmtree(directory)
    caplog.clear()
    prepare(keeping, BYTES, tmp_path / "cache")
    prepare(keeping, BYTES, tmp_path / "cache")
    assert "not kept" not in caplog.text


def test_a_kill_between_the_two_splits_loses_no_held_out_document(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A part without its training shard is not done, so that one comes last."""

    class Killed(BaseException):
        pass

    def publish_once(aside: Path, target: Path) -> None:
        if published:
            raise Killed
        published.append(target)
        publish(aside, target)

    file = write_texts(tmp_path / "a.jsonl", some_texts(200))
    published: list[Path] = []
    with monkeypatch.context() as patch:
        patch.setattr(tokenizing, "publish", publish_once)
        with pytest.raises(Killed):
            prepare(one(file), BYTES, tmp_path / "cache", workers=1)
    assert len(published) == 1  # one of the two is there
    prepared = prepare(one(file), BYTES, tmp_path / "cache", workers=1).sources["one"]
    reference = prepare(one(file), BYTES, tmp_path / "reference", workers=1).sources["one"]
    assert tokens_of(prepared.validation) == tokens_of(reference.validation) != []
    assert hash_of(prepared) == hash_of(reference)


def parts_of(text: str) -> list[tuple[int, int]]:
    return [parse_part(word) for word in text.split()]


@pytest.mark.parametrize("order", ["1/3 2/3 3/3", "3/3 1/3 2/3"])
def test_shares_of_several_machines_are_the_whole(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "SMALLEST", 8000)
    file = write_texts(tmp_path / "a.jsonl", some_texts(500))
    reference = prepare(one(file), BYTES, tmp_path / "reference")
    parts = len(cutting.parts(one(file).sources["one"]))
    assert parts >= 4 and reference.complete
    for number, part in enumerate(parts_of(order)):
        made = prepare(one(file), BYTES, tmp_path / "cache", part=part)
        assert made.complete == (number == 2)
        config, tokenizer = one(file), BytesTokenizer()
        known = prepared_tokens("one", config.sources["one"], config, tokenizer, tmp_path / "cache")
        assert known == (reference.open()[0]["one"].tokens if number == 2 else None)
        train = made.sources["one"].train
        assert isinstance(train, Path)
        there = {int(path.name[-5:]) for path in train.glob("shard-*")}
        mine = {i for i in range(parts) for share, of in parts_of(order)[: number + 1] if i % of == share - 1}
        assert there == mine
    assert hash_of(made.sources["one"]) == hash_of(reference.sources["one"])


def test_a_share_that_is_none() -> None:
    assert parse_part("3/16") == (3, 16)
    for text in ("0/3", "4/3", "3", "a/b", "1/-2", "/", "1/0"):
        with pytest.raises(UserError, match=rf"part={text}: give i/n"):
            parse_part(text)


@pytest.mark.parametrize("workers", [2, 3])
def test_any_number_of_processes_makes_the_same(
    workers: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cutting, "SMALLEST", 30_000)
    file = write_texts(tmp_path / "a.jsonl", some_texts(1000))
    alone = prepare(one(file), SENTENCEPIECE, tmp_path / "cache", workers=1)
    shutil.rmtree(tmp_path / "cache/shards")
    monkeypatch.setattr(prepare_module, "SMALL", 0)
    with caplog.at_level(logging.INFO, logger="llmtrain"):
        together = prepare(
            one(file), SENTENCEPIECE, tmp_path / "cache", LogProgress(seconds=0), workers=workers
        )
    assert hash_of(together.sources["one"]) == hash_of(alone.sources["one"])
    assert any("1,000 documents" in line and "100% of the input" in line for line in caplog.messages)
    assert not list(together.sources["one"].train.parent.glob(".tmp-*"))  # type: ignore[union-attr]


def test_an_error_in_a_process_is_the_same_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "SMALLEST", 30_000)
    mixed, _, _ = damaged_corpus(tmp_path, 1000, 300)
    with pytest.raises(UserError) as here:
        prepare(one(mixed, bad_records="raise"), BYTES, tmp_path / "here")
    monkeypatch.setattr(prepare_module, "SMALL", 0)
    with pytest.raises(UserError, match=r"data.bad_records=raise stops here") as there:
        prepare(one(mixed, bad_records="raise"), BYTES, tmp_path / "there", workers=2)
    assert len(here.value.lines) == len(there.value.lines) == 1


def test_a_part_that_somebody_else_has_is_left_to_him(tmp_path: Path) -> None:
    with claimed(tmp_path / "lock") as first:
        with claimed(tmp_path / "lock") as second:
            assert (first, second) == (True, False)
        assert (tmp_path / "lock").exists()
    assert not (tmp_path / "lock").exists()
    with pytest.raises(ZeroDivisionError), claimed(tmp_path / "lock"):
        1 / 0  # noqa: B018
    with claimed(tmp_path / "lock") as again:
        assert again


def test_documents_that_are_tokens_keep_their_ids(tmp_path: Path) -> None:
    np.array([72, 105, 257, 72, 111, 257, 33, 257], np.uint16).tofile(tmp_path / "tokens.bin")
    config = data(
        {"one": {"path": str(tmp_path / "tokens.bin"), "format": "nanogpt", "weight": 1}},
        validation_fraction=0,
    )
    source = prepare(config, BYTES, tmp_path / "cache").sources["one"]
    assert tokens_of(source.train) == [[72, 105, 257], [72, 111, 257], [33, 257]]
    assert isinstance(source.train, Path)
    assert ShardedSource.open(source.train).text_bytes(0).tolist() == [2, 2, 1]


PEAK = """
import resource, sys
from pathlib import Path
from llmtrain.data.prepare import prepare
from llmtrain.tokenizer import BytesConfig
from tests.data.test_prepare import one

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

if __name__ == "__main__":
    small, large, cache = map(Path, sys.argv[1:])
    prepare(one(small, validation_fraction=0), BytesConfig(kind="bytes"), cache)
    before = peak()
    config = one(large, validation_fraction=0, max_bad_fraction=0.6)
    prepared = prepare(config, BytesConfig(kind="bytes"), cache)
    print(prepared.rejected("one"), peak() - before)
"""


def test_a_document_of_64_mb_takes_little_memory(tmp_path: Path) -> None:
    good = write_texts(tmp_path / "small.jsonl", some_texts(10))
    with (tmp_path / "large.jsonl").open("wb") as file:
        file.write(b'{"text": "')
        for _ in range(64):
            file.write(b"x" * 2**20)
        file.write(b'"}\n' + good.read_bytes().splitlines(keepends=True)[0])
    (tmp_path / "peak.py").write_text(PEAK)
    command = [sys.executable, tmp_path / "peak.py", good, tmp_path / "large.jsonl", tmp_path / "cache"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    output = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout
    reasons, _, more = output.strip().rpartition(" ")
    assert reasons == "{'too long': 1}"
    assert int(more) < 32 * 2**20  # half of the line; max_document_bytes is 16 MiB


SLOW = """
import sys, time
from pathlib import Path
import llmtrain.data.prepare, llmtrain.data.tokenizing
from llmtrain.data.prepare import prepare
from llmtrain.data.readers import cutting
from llmtrain.tokenizer import BytesTokenizer, TokenizerConfig
from tests.data.test_prepare import one

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
    llmtrain.data.tokenizing.BATCH_BYTES = 2000
    cutting.SMALLEST = 8000
    log("asks")
    prepared = prepare(one(sys.argv[1]), SlowConfig(), Path(sys.argv[2]), workers=1)
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
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def batches_done(log: Path) -> int:
    return log.read_text().count("batch") if log.is_file() else 0


def test_a_killed_preparation_goes_on_where_it_was(
    slow: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cutting, "SMALLEST", 8000)
    file = write_texts(tmp_path / "a.jsonl", some_texts(400))
    process = start(slow, file, 0.1)
    while batches_done(tmp_path / "log") < 9:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (source,) = (tmp_path / "cache/shards").iterdir()
    before = {path: identity(path) for path in source.glob("*/shard-*/*")}
    assert 0 < len(list((source / "train").iterdir())) < 5
    assert list(source.glob(".tmp-*/train/tokens.bin"))  # it was at work
    prepared = prepare(one(file), BYTES, tmp_path / "cache").sources["one"]
    assert {path: identity(path) for path in before} == before  # nothing was made again
    reference = prepare(one(file), BYTES, tmp_path / "untouched").sources["one"]
    assert tokens_of(prepared.train) == tokens_of(reference.train) != []
    assert hash_of(prepared) == hash_of(reference)
    assert not list(source.glob(".tmp-*"))


CLEAR = "import sys, pathlib, llmtrain.data.tokenizing as t; t.clear_dead(pathlib.Path(sys.argv[1]))"
CONTAINER = ["unshare", "--map-root-user", "--pid", "--fork", "--kill-child"]


def has_containers() -> bool:
    return bool(shutil.which("unshare")) and subprocess.run([*CONTAINER, "true"]).returncode == 0


@pytest.mark.skipif(not has_containers(), reason="no containers here")
def test_the_dead_are_told_from_the_living_in_containers_too(slow: Path, tmp_path: Path) -> None:
    """Host names and process ids are the same in many; what a process of another kernel left is not ours."""

    def clear() -> list[Path]:
        command = [*CONTAINER, sys.executable, "-c", CLEAR, source]
        subprocess.run(command, check=True, cwd=Path(__file__).parents[2])
        return list(source.glob(".tmp-*"))

    process = start(slow, write_texts(tmp_path / "a.jsonl", some_texts(400)), 0.2)
    while batches_done(tmp_path / "log") < 6:
        assert process.poll() is None
        time.sleep(0.01)
    (source,) = (tmp_path / "cache/shards").iterdir()
    process.send_signal(signal.SIGSTOP)
    done, unfinished = source / ".tmp-00000-elsewhere-1", source / ".tmp-00003-elsewhere-1"
    for directory in (done, unfinished):
        directory.mkdir()
    (mine,) = {*source.glob(".tmp-*")} - {done, unfinished}
    assert {*clear()} == {mine, unfinished}
    process.kill()
    process.communicate()
    assert clear() == [unfinished]
    shutil.copytree(source / "train/shard-00000", source / "train/shard-00003")
    assert clear() == []


DOOR = """
import sys
import llmtrain.data.prepare
from llmtrain.data.readers import cutting
from llmtrain.prepare import main

cutting.SMALLEST, llmtrain.data.prepare.SMALL = 100_000, 0
sys.exit(main(sys.argv[1:]))
"""


def open_door(home: Path, cache: str) -> subprocess.Popen[str]:
    """`llmtrain prepare` with two workers and small parts, in a process group of its own."""
    (home / "door.py").write_text(DOOR)
    keys = ["data=files", f"data.sources.text.path={home}/a.jsonl", "data.workers=2", "tokenizer=bytes"]
    command = [sys.executable, home / "door.py", *keys, f"cache_dir={home / cache}"]
    environment = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    return subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment, process_group=0
    )


def end_by(
    process: subprocess.Popen[str], number: signal.Signals, shards: int, home: Path
) -> tuple[int, str]:
    """Send a signal to the whole group once so many shards are there; its exit code and what it said.

    None of its workers is left.
    """
    while len(list(home.glob("cache/shards/*/train/shard-*"))) < shards and process.poll() is None:
        time.sleep(0.01)
    workers = psutil.Process(process.pid).children() if process.poll() is None else []
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)
    _, said = process.communicate(timeout=120)
    _, left = psutil.wait_procs(workers, timeout=120)
    assert not left
    return process.returncode, said


def content(directory: Path) -> dict[str, bytes]:
    files = [path for path in directory.rglob("*") if path.is_file() and ".claims" not in path.parts]
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}


def test_the_door_may_be_killed_again_and_again(tmp_path: Path) -> None:
    write_texts(tmp_path / "a.jsonl", some_texts(40_000))
    undisturbed = open_door(tmp_path, "undisturbed")
    kills, chosen = 0, random.Random(0)
    for number in range(5):
        code, said = end_by(open_door(tmp_path, "cache"), signal.SIGKILL, 1 + 4 * number, tmp_path)
        assert code in (0, -signal.SIGKILL), said
        kills += code != 0
        time.sleep(chosen.random() / 10)
    assert kills > 2
    last = open_door(tmp_path, "cache")
    _, said = last.communicate(timeout=120)
    assert last.returncode == 0 == undisturbed.wait(timeout=120), said
    assert content(tmp_path / "cache/shards") == content(tmp_path / "undisturbed/shards") != {}
    assert not list(tmp_path.glob("cache/**/.*tmp*"))


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (signal.SIGINT, 130, "error: interrupted; finished shards are kept, the same command goes on"),
        (
            signal.SIGTERM,
            143,
            "error: stopped by SIGTERM; finished shards are kept, the same command goes on",
        ),
    ],
)
def test_signals_end_the_door_in_one_line(
    number: signal.Signals, code: int, line: str, tmp_path: Path
) -> None:
    write_texts(tmp_path / "a.jsonl", some_texts(40_000))
    found, said = end_by(open_door(tmp_path, "cache"), number, 1, tmp_path)
    progress = [other for other in said.splitlines() if other.startswith("prepare ")]  # where it is slow
    assert (found, said.splitlines()) == (code, [*progress, line])
    assert not list(tmp_path.glob("cache/**/.tmp-*"))


@pytest.mark.parametrize(
    ("number", "line"),
    [(signal.SIGINT, "error: interrupted\n"), (signal.SIGTERM, "error: stopped by SIGTERM\n")],
)
def test_signals_are_one_line_before_the_work_begins(number: signal.Signals, line: str) -> None:
    """The class of the config takes seconds to import."""
    code = (
        "import os, time\n"
        "from llmtrain import prepare\n"
        f"prepare._config = lambda: os.kill(os.getpid(), {number}) or time.sleep(60)\n"
        "prepare.main([])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (128 + number, line)


def test_two_processes_at_once_do_the_work_once(slow: Path, tmp_path: Path) -> None:
    file = write_texts(tmp_path / "a.jsonl", some_texts(400))
    processes = [start(slow, file, 0.4) for _ in range(2)]
    answers = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert answers[0] == answers[1] != ""
    count = batches_done(tmp_path / "log")
    assert "asks" in (tmp_path / "log").read_text().splitlines()[1:-1]  # they did want it at the same time
    (tmp_path / "log").unlink()
    alone = write_texts(tmp_path / "b.jsonl", some_texts(400))
    start(slow, alone, 0).communicate(timeout=120)
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


def test_what_signs_a_url_is_written_nowhere(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Shards are handed on; a signature in them would be too."""
    files = tmp_path / "files"
    files.mkdir()
    (files / "a.jsonl").write_text('{"text": "good"}\n{broken\n')
    handler = functools.partial(SimpleHTTPRequestHandler, directory=str(files))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_address[1]}/a.jsonl?part=1&sig=TOPSECRET"
        prepared = prepare(one(url, max_bad_fraction=1, validation_fraction=0.0), BYTES, tmp_path / "cache")
        server.shutdown()
    assert tokens_of(prepared.sources["one"].train)
    written = [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
    assert any(b"part=1&sig=<left out>" in path.read_bytes() for path in written)
    assert not any(b"TOPSECRET" in path.read_bytes() for path in written)
