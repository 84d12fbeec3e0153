"""Every tokenizer: lossless, deaf to special-token text, the same after save and load."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from llmtrain.config import UserError
from llmtrain.tokenizer import (
    BytesConfig,
    HuggingFaceConfig,
    SentencePieceConfig,
    SentencePieceTokenizer,
    Tokenizer,
    load_tokenizer,
)
from llmtrain.tokenizer.training import train_sentencepiece

MODULES = ("argparse.py", "json/decoder.py", "typing.py", "unicodedata.py", "this.py", "textwrap.py")
AWKWARD = [
    "",
    " ",
    "\t\tif x:\r\n\t\t\treturn\n\n",
    "    indented\n  less\n",
    "naïve 漢字 🎉 \u200b\ufeff\u2028\x00\x1b",
    "▁ literal lower one eighth block▁▁ and \u2585 \u2047",
    "<s> </s> <unk> <pad> <|endoftext|> <|im_start|> [CLS] <0x41>",
    "trailing spaces   ",
]


@pytest.fixture(scope="module")
def library() -> list[str]:
    root = Path(sysconfig.get_path("stdlib"))
    return [(root / name).read_text("utf-8") for name in MODULES if (root / name).is_file()]


@pytest.fixture(scope="module")
def sentencepiece_file(library: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("spm") / "tokenizer.model"
    train_sentencepiece(library, 700, path)
    return path


@pytest.fixture(scope="module")
def huggingface_directory(library: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 like byte-level BPE that would add bos by its template and match special tokens in text."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<s>", "</s>", "<unk>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(library, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer.enable_truncation(8)
    tokenizer.enable_padding(length=8)
    directory = tmp_path_factory.mktemp("hf")
    tokenizer.save(str(directory / "tokenizer.json"))
    return directory


@pytest.fixture(params=["sentencepiece", "huggingface", "bytes"])
def tokenizer(
    request: pytest.FixtureRequest, sentencepiece_file: Path, huggingface_directory: Path
) -> Tokenizer:
    return {
        "sentencepiece": SentencePieceConfig(kind="sentencepiece", path=sentencepiece_file, vocab_size=300),
        "huggingface": HuggingFaceConfig(kind="huggingface", path=huggingface_directory),
        "bytes": BytesConfig(kind="bytes"),
    }[request.param].load()


def test_speaks_the_protocol(tokenizer: Tokenizer) -> None:
    assert isinstance(tokenizer, Tokenizer)
    ids = tokenizer.encode_batch(["one", "two"])
    assert [one.dtype for one in ids] == [np.dtype(np.int32)] * 2
    assert tokenizer.bos_id is not None and tokenizer.eos_id is not None
    assert 0 <= max(tokenizer.bos_id, tokenizer.eos_id) < tokenizer.vocab_size


def test_decode_gives_the_text_back(tokenizer: Tokenizer, library: list[str]) -> None:
    texts = library + AWKWARD
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert tokenizer.decode(ids.tolist()) == text
        assert ids.size == 0 or (ids.min() >= 0 and ids.max() < tokenizer.vocab_size)


@given(st.text(max_size=60))
@settings(max_examples=200, deadline=None)
def test_sentencepiece_is_lossless_on_any_text(sentencepiece_file: Path, text: str) -> None:
    tokenizer = _loaded(sentencepiece_file)
    assert tokenizer.decode(tokenizer.encode_batch([text])[0].tolist()) == text


_LOADED: dict[Path, SentencePieceTokenizer] = {}


def _loaded(path: Path) -> SentencePieceTokenizer:
    return _LOADED.setdefault(path, SentencePieceTokenizer.from_file(path))


def test_special_token_text_is_text(tokenizer: Tokenizer) -> None:
    texts = ["a<s>b", "</s>", "x<|endoftext|>y", "<unk>", "<pad>", "<|endoftext|></s><s>"]
    controls = {tokenizer.bos_id, tokenizer.eos_id, 0 if tokenizer.vocab_size > 258 else None}  # 0: <unk>
    for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True):
        assert not controls & set(ids.tolist())
        assert tokenizer.decode(ids.tolist()) == text


def test_control_ids_have_no_text(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode_batch(["text"])[0].tolist(), tokenizer.eos_id]
    assert tokenizer.decode([i for i in ids if i is not None]) == "text"


def test_save_and_load_round_trip(tokenizer: Tokenizer, tmp_path: Path, library: list[str]) -> None:
    tokenizer.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    assert (again.fingerprint, again.vocab_size) == (tokenizer.fingerprint, tokenizer.vocab_size)
    assert (again.bos_id, again.eos_id) == (tokenizer.bos_id, tokenizer.eos_id)
    for one, other in zip(tokenizer.encode_batch(library), again.encode_batch(library), strict=True):
        np.testing.assert_array_equal(one, other)


def test_fingerprints_differ(
    sentencepiece_file: Path, huggingface_directory: Path, library: list[str], tmp_path: Path
) -> None:
    train_sentencepiece(library, 701, tmp_path / "other.model")
    files = [sentencepiece_file, tmp_path / "other.model"]
    prints = [SentencePieceTokenizer.from_file(file).fingerprint for file in files]
    prints += [
        load_tokenizer(huggingface_directory).fingerprint,
        BytesConfig(kind="bytes").load().fingerprint,
    ]
    assert len(set(prints)) == 4


def test_training_is_repeatable(library: list[str], sentencepiece_file: Path, tmp_path: Path) -> None:
    train_sentencepiece(iter(library), 700, tmp_path / "again.model")
    assert (tmp_path / "again.model").read_bytes() == sentencepiece_file.read_bytes()
    assert SentencePieceTokenizer.from_file(sentencepiece_file).vocab_size == 700


@pytest.mark.parametrize(
    ("texts", "size"), [(["tiny"], 5000), ([], 400), (["".join(map(chr, range(0x4E00, 0x5200)))], 300)]
)
def test_a_vocabulary_that_does_not_suit_the_text(texts: list[str], size: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"tokenizer.vocab_size={size}"):
        train_sentencepiece(texts, size, tmp_path / "t.model")


def test_long_lines_are_trained_on(library: list[str], tmp_path: Path) -> None:
    """SentencePiece skips sentences above 4192 bytes: one long line must count nevertheless."""
    line = library[0].replace("\n", " ")
    train_sentencepiece([line], 700, tmp_path / "t.model")
    ids = SentencePieceTokenizer.from_file(tmp_path / "t.model").encode_batch([line])[0]
    assert len(ids) < len(line) / 2


def test_huggingface_adds_truncates_and_pads_nothing(huggingface_directory: Path) -> None:
    tokenizer = load_tokenizer(huggingface_directory)
    plain = tokenizers.Tokenizer.from_file(str(huggingface_directory / "tokenizer.json"))
    assert (
        plain.encode("hello").ids[0] == 1 and len(plain.encode("hello " * 50).ids) == 8
    )  # the traps are there
    assert plain.encode("a</s>").ids[-2:] != tokenizer.encode_batch(["a</s>"])[0].tolist()[-2:]
    assert tokenizer.decode(tokenizer.encode_batch(["hello " * 50])[0].tolist()) == "hello " * 50


def test_huggingface_side_files_name_bos_and_eos(huggingface_directory: Path, tmp_path: Path) -> None:
    common = load_tokenizer(huggingface_directory)
    assert (common.bos_id, common.eos_id) == (1, 2)  # by their common names
    (tmp_path / "tokenizer.json").write_bytes((huggingface_directory / "tokenizer.json").read_bytes())
    named = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(named))
    configured = load_tokenizer(tmp_path)
    assert (configured.bos_id, configured.eos_id) == (0, 0)
    assert configured.fingerprint != common.fingerprint  # documents would be bounded by other ids
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": None, "eos_token": "</s>"}))
    assert load_tokenizer(tmp_path).bos_id is None


def test_eos_that_is_not_marked_special_is_deaf_too(huggingface_directory: Path, tmp_path: Path) -> None:
    document = json.loads((huggingface_directory / "tokenizer.json").read_text())
    for token in document["added_tokens"]:
        token["special"] = False
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.eos_id not in tokenizer.encode_batch(["a</s>b"])[0]


def test_a_model_that_reaches_its_control_tokens_by_matching_is_refused(tmp_path: Path) -> None:
    pieces = [("<unk>", 0.0), ("</s>", 0.0), ("<", -5.0), ("/", -5.0), ("s", -5.0), (">", -5.0)]
    unigram = tokenizers.Tokenizer(models.Unigram(pieces, unk_id=0))
    unigram.add_special_tokens(["</s>"])
    unigram.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="'</s>' becomes the control id 1"):
        load_tokenizer(tmp_path)


def test_missing_and_damaged_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer.path=.*nowhere.model cannot be read"):
        SentencePieceConfig(kind="sentencepiece", path=tmp_path / "nowhere.model", vocab_size=300).load()
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(UserError, match=r"bad.model: not a SentencePiece model"):
        SentencePieceConfig(kind="sentencepiece", path=tmp_path / "bad.model", vocab_size=300).load()
    with pytest.raises(UserError, match=r"tokenizer.json"):
        HuggingFaceConfig(kind="huggingface", path=tmp_path).load()
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        HuggingFaceConfig(kind="huggingface", path=tmp_path).load()
    with pytest.raises(UserError, match="no tokenizer in"):
        load_tokenizer(tmp_path / "empty")
