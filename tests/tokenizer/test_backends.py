"""Backends: the same ids as `tokenizers`, or not used.

Run as a script, this measures them: `python -m tests.tokenizer.test_backends`.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import sys
import sysconfig
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from llmtrain.config import UserError
from llmtrain.data import tokenizing
from llmtrain.data.prepare import prepare
from llmtrain.data.progress import SilentProgress
from llmtrain.data.readers import cutting
from llmtrain.tokenizer import HuggingFaceConfig, HuggingFaceTokenizer, backends, huggingface, load_tokenizer
from tests.data import test_prepare as preparing

FAST = ("tiktoken", "gigatoken", "fastokens")
SPECIAL = ["<|endoftext|>", "<s>", "</s>"]
LLAMA = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _stdlib(pattern: str, size: int) -> list[str]:
    texts: list[str] = []
    for file in sorted(Path(sysconfig.get_path("stdlib")).glob(pattern)):
        texts.append(file.read_text("utf-8", errors="replace"))
        if sum(map(len, texts)) > size:
            break
    return texts


def _pre_tokenizer(kind: str) -> Any:
    if kind != "llama":
        return pre_tokenizers.ByteLevel(add_prefix_space=kind == "prefix")
    split = pre_tokenizers.Split(Regex(LLAMA), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


@cache
def trained(kind: str, size: int = 3000) -> str:
    """tokenizer.json of a byte-level BPE: split as GPT-2 or as Llama 3 does it, or with something special."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = _pre_tokenizer(kind), decoders.ByteLevel()
    if kind == "nfc":
        tokenizer.normalizer = normalizers.NFC()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(
        [*_stdlib("[a-d]*.py", 10**6), "人工智能的发展离不开数据、算法与算力。" * 20], trainer
    )
    if kind == "added":
        tokenizer.add_tokens([AddedToken("<tool>", special=False), AddedToken("    def", special=False)])
    return tokenizer.to_str()


def _load(kind: str, backend: str = "auto") -> HuggingFaceTokenizer:
    return HuggingFaceTokenizer({"tokenizer.json": trained(kind).encode()}, Path("tokenizer.json"), backend)


@cache
def _pair(kind: str, name: str) -> tuple[HuggingFaceTokenizer, HuggingFaceTokenizer]:
    return _load(kind, "tokenizers"), _load(kind, name)


def _assert_equal(kind: str, name: str, texts: Sequence[str]) -> None:
    reference, other = _pair(kind, name)
    for text, one, two in zip(texts, reference.encode_batch(texts), other.encode_batch(texts), strict=True):
        assert two.dtype == np.int32 and one.tolist() == two.tolist(), text


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_ids_equal_on_text_that_took_no_part_in_the_choice(kind: str, name: str) -> None:
    _assert_equal(kind, name, _stdlib("[m-p]*.py", 10**6))
    _assert_equal(kind, name, [])
    _assert_equal(kind, name, ["", "x", ""])


PIECES = st.sampled_from(
    [*SPECIAL, " ", "\n", "\r\n", "\t", "'s", "'LL", "don't", "漢字", "12345", "🎉", "\u3000", "<|", "\x00"]
)


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@given(text=st.lists(st.one_of(PIECES, st.text(max_size=8)), max_size=12).map("".join))
@settings(max_examples=150, deadline=None)
def test_ids_equal_on_any_text(kind: str, name: str, text: str) -> None:
    _assert_equal(kind, name, [text])


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "added"])
def test_special_text_is_text(kind: str, name: str) -> None:
    texts = [
        "a</s>b",
        "<|endoftext|>",
        "x<s><|endoftext|></s>\n",
        "<|endoftext|" + "<|endoftext|>" * 3,
        "</s> " * 50,
    ]
    tokenizer = _pair(kind, name)[1]
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert not {0, 1, 2} & set(ids.tolist())
        assert tokenizer.decode(ids.tolist()) == text
    _assert_equal(kind, name, texts)


@pytest.mark.parametrize("name", FAST)
def test_added_tokens_that_are_not_special_keep_their_ids(name: str) -> None:
    ids = _load("added", "tokenizers").encode_batch(["a<tool>b    def"])[0].tolist()
    assert {3000, 3001} <= set(ids)  # the reference takes them for what they are
    _assert_equal(
        "added", name, ["a<tool>b    def", "<tool>", "no such", "<tool", "<tool></s>", "x    define"]
    )


def test_auto_takes_the_fastest_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    tokenizer = _load("gpt2")
    assert tokenizer.choose_backend(_stdlib("[m-p]*.py", 10**5)) == tokenizer.backend_name
    assert tokenizer.backend_name in FAST  # each is several times as fast as the reference
    line = caplog.messages[-1]
    assert line.startswith(f"tokenizer: {tokenizer.backend_name} (") and "ids equal to tokenizers on" in line
    assert all(name in line for name in (*FAST, "tokenizers"))


def test_auto_chooses_when_there_is_much_to_encode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "CHOOSE_AFTER", 10_000)
    tokenizer = _load("gpt2")
    before = tokenizer.encode_batch(["word " * 1000])[0]
    assert tokenizer.backend_name == "tokenizers"
    np.testing.assert_array_equal(tokenizer.encode_batch(["word " * 1000])[0], before)
    assert tokenizer.backend_name in FAST


def test_the_choice_is_no_part_of_the_tokenizer(tmp_path: Path) -> None:
    one, two = _pair("gpt2", "gigatoken")
    assert one.fingerprint == two.fingerprint == _load("gpt2").fingerprint
    two.save(tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["tokenizer.json"]
    assert load_tokenizer(tmp_path).backend_name == "tokenizers"  # type: ignore[attr-defined]


def test_another_process_takes_the_choice_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _load("gpt2").save(tmp_path)

    def no_check(*_: Any) -> None:
        raise AssertionError("checked again")

    monkeypatch.setattr(backends, "hard_texts", no_check)
    assert load_tokenizer(tmp_path, backend="gigatoken").backend_name == "gigatoken"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "gigatoken", None)  # another machine
    assert load_tokenizer(tmp_path, backend="gigatoken").backend_name == "tokenizers"  # type: ignore[attr-defined]


def _encode(directory: str, name: str, texts: list[str], results: Any) -> None:
    tokenizer = load_tokenizer(Path(directory), backend=name)
    results.put([ids.tolist() for ids in tokenizer.encode_batch(texts)])


@pytest.mark.parametrize("name", FAST)
def test_worker_processes(name: str, tmp_path: Path) -> None:
    reference, other = _pair("gpt2", name)
    reference.save(tmp_path)
    texts = _stdlib("q*.py", 10**5)
    other.encode_batch(texts)
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    process = context.Process(target=_encode, args=(str(tmp_path), name, texts, results))
    process.start()
    assert results.get(timeout=60) == [ids.tolist() for ids in reference.encode_batch(texts)]
    process.join()


def _building(encode: backends.Encode) -> Any:
    return lambda document: (encode, [])


def test_a_backend_with_other_ids_is_not_used(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It has forgotten one merge of 2,700, the last: a token of it stands in no document, perhaps."""
    caplog.set_level(logging.INFO)
    real = backends._BUILD["tiktoken"]

    def forgetful(document: dict[str, Any]) -> Any:
        model = document["model"]
        return real({**document, "model": {**model, "merges": model["merges"][:-1]}})

    monkeypatch.setattr(backends, "_BUILD", {"tiktoken": forgetful})
    tokenizer = _load("gpt2")
    assert tokenizer.choose_backend() == "tokenizers"
    assert "tokenizer: tiktoken is not used: its ids differ from token" in caplog.text
    with pytest.raises(
        UserError, match=r"tokenizer.backend=tiktoken does not suit .* its ids differ.*choose auto"
    ):
        _load("gpt2", "tiktoken")


def test_the_users_own_documents_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    word = "unheard-of-combination"

    def wrong_once(texts: Sequence[str]) -> list[Any]:
        ids = _load("gpt2", "tokenizers").encode_batch(texts)
        return [one[:-1] if word in text else one for text, one in zip(texts, ids, strict=True)]

    monkeypatch.setattr(backends, "_BUILD", {"json": _building(wrong_once)})  # a module that is there
    reference = _load("gpt2", "tokenizers").encode_batch
    document = json.loads(trained("gpt2"))
    assert backends.require("json", reference, document).name == "json"
    with pytest.raises(UserError, match="its ids differ"):
        backends.require("json", reference, document, ["fine", f"some {word}"])


def test_ids_that_differ_in_the_text_itself_are_found_while_it_is_prepared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A backend with other ids for a word that only the end of the source has: that part is made again."""
    word = "unheard-of-combination"
    plain = _load("gpt2", "tokenizers").encode_batch

    def wrong_once(texts: Sequence[str]) -> list[Any]:
        return [ids[:-1] if word in text else ids for text, ids in zip(texts, plain(texts), strict=True)]

    monkeypatch.setattr(cutting, "SMALLEST", 8000)
    monkeypatch.setattr(tokenizing, "CHECK_EVERY", 16)
    monkeypatch.setattr(tokenizing, "BATCH_BYTES", 3000)
    texts = preparing.some_texts(400)
    texts[-50:] = [f"{text} {word}" for text in texts[-50:]]
    data = preparing.one(preparing.write_texts(tmp_path / "a.jsonl", texts), boundary="eos")
    reference = prepare(data, _load("gpt2", "tokenizers"), tmp_path / "reference").sources["one"]
    with monkeypatch.context() as patch:
        patch.setattr(backends, "_BUILD", {"json": _building(wrong_once)})
        lying = _load("gpt2", "json")
    progress = Watched()
    found = prepare(data, lying, tmp_path / "cache", progress).sources["one"]
    text_bytes = sum(len(text.encode()) for text in texts)
    assert progress.last[:3] == ((tmp_path / "a.jsonl").stat().st_size, len(texts), text_bytes)
    for split in ("train", "validation"):
        ids, expected = (preparing.tokens_of(getattr(source, split)) for source in (found, reference))
        assert ids == expected != []
    assert found.preparation is not None
    encoders = [found.preparation.report(n).encoder.split()[0] for n in range(len(found.preparation.parts))]
    assert encoders == ["json", "json", "json", "tokenizers"]
    (line,) = [record.message for record in caplog.records if record.levelno == logging.WARNING]
    assert line.startswith("data.sources.one: json does not suit this tokenizer.json: its ids differ from ")
    assert f"delete {found.preparation.directory}, set tokenizer.backend=tokenizers" in line
    assert not list(found.preparation.directory.glob(".tmp-*"))


class Watched(SilentProgress):
    """Remembers how far it all had come in the end."""

    last = (0, 0, 0, 0)

    def update(self, *sums: int) -> None:
        self.last = sums


def test_one_document_in_so_many_is_given_to_the_reference(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However they come in batches: it is time that each one takes. Other places in other parts."""
    plain = _load("gpt2", "tokenizers").encode_batch
    monkeypatch.setattr(cutting, "SMALLEST", 8000)
    monkeypatch.setattr(tokenizing, "CHECK_EVERY", 16)
    monkeypatch.setattr(tokenizing, "BATCH_BYTES", 500)
    monkeypatch.setattr(backends, "_BUILD", {"json": _building(plain)})
    tokenizer = _load("gpt2", "json")
    asked: list[str] = []
    monkeypatch.setattr(tokenizer, "_encode_reference", lambda texts: asked.extend(texts) or plain(texts))
    texts = [f"{number}: {text}" for number, text in enumerate(preparing.some_texts(400))]
    data = preparing.one(preparing.write_texts(tmp_path / "a.jsonl", texts), boundary="eos")
    preparation = prepare(data, tokenizer, tmp_path / "cache").sources["one"].preparation
    assert preparation is not None
    places, first = np.array([texts.index(text) for text in asked]), 0
    firsts = set()
    for number in range(len(preparation.parts)):
        last = first + preparation.report(number).records
        mine = places[(places >= first) & (places < last)] - first
        assert mine[0] < 16 and last - first - mine[-1] <= 16 and set(np.diff(mine)) == {16}
        firsts.add(int(mine[0]))
        first = last
    assert first == len(texts) and len(firsts) > 1


class Panic(BaseException):
    """What a Rust library raises when it panics is no Exception either."""


def test_a_backend_that_fails_is_replaced(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    plain = _load("gpt2", "tokenizers")

    def panics(texts: Sequence[str]) -> list[Any]:
        if any("trigger" in text for text in texts):
            raise Panic("in Rust")
        return plain.encode_batch(texts)

    monkeypatch.setattr(backends, "_BUILD", {"json": _building(panics)})
    tokenizer = _load("gpt2", "json")  # the sample has nothing that it fails on
    texts = ["fine", "the trigger"]
    for one, two in zip(tokenizer.encode_batch(texts), plain.encode_batch(texts), strict=True):
        np.testing.assert_array_equal(one, two)
    assert _load("gpt2").choose_backend(["a trigger"]) == "tokenizers"
    assert "json is not used: fails on the sample: Panic" in caplog.text or "Panic('in Rust')" in caplog.text


@pytest.mark.parametrize("kind", ["nfc", "prefix"])
def test_what_a_backend_cannot_do_is_said(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(UserError, match=r"tokenizer.backend=tiktoken does not suit this tokenizer.json: it"):
        _load(kind, "tiktoken")
    tokenizer = _load(kind)
    assert tokenizer.choose_backend() != "tiktoken"
    texts = ["e\u0301 x", "Ångström"]
    for one, two in zip(
        tokenizer.encode_batch(texts), _load(kind, "tokenizers").encode_batch(texts), strict=True
    ):
        np.testing.assert_array_equal(one, two)


def test_a_backend_that_is_not_installed(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    caplog.set_level(logging.INFO)
    for name in FAST:
        monkeypatch.setitem(sys.modules, name, None)
    (tmp_path / "tokenizer.json").write_text(trained("gpt2"))
    with pytest.raises(
        UserError, match=r"tokenizer.backend=gigatoken is not installed: pip install gigatoken"
    ):
        HuggingFaceConfig(kind="huggingface", path=tmp_path, backend="gigatoken").load()
    assert _load("gpt2").choose_backend() == "tokenizers"
    assert "llmtrain[fast]" in caplog.text


def test_half_surrogates_are_refused_by_all() -> None:
    for name in ("tokenizers", *FAST):
        if name == "tokenizers" or name in sys.modules:
            with pytest.raises(TypeError):
                _load("gpt2", name).encode_batch(["a\ud800"])


def _measure() -> None:
    """MB of text a second of processor time; each text is encoded once, so that no cache knows it."""
    import random

    characters = "".join(map(chr, range(0x4E00, 0x5E00)))
    draw = random.Random(0)
    words = ["".join(draw.choices(characters, k=draw.choice((1, 2, 2, 3, 4)))) for _ in range(5000)]
    common = [1 / rank for rank in range(1, len(words) + 1)]
    chinese = [
        "".join(w + draw.choice(("", "", "", "\uff0c", "。")) for w in draw.choices(words, common, k=1000))
        for _ in range(700)
    ]
    code = _stdlib("*/[a-z]*.py", 5 * 10**6)
    prose = [line for text in code for line in text.split('"""')[1::2]]
    for kind in ("gpt2", "llama"):
        for label, texts in {"prose": prose, "code": code, "chinese (made up)": chinese}.items():
            size, row = sum(len(text.encode()) for text in texts), []
            for name in ("tokenizers", *FAST):
                tokenizer = _load(kind, name)
                tokenizer.encode_batch(["warm"])
                start = time.process_time()
                tokenizer.encode_batch(texts)
                row.append(f"{name} {size / (time.process_time() - start) / 1e6:.1f}")
            print(f"{kind:6} {label:18} {size / 1e6:5.1f} MB: {', '.join(row)} MB/s")


if __name__ == "__main__":
    _measure()
