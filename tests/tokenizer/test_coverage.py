"""What a tokenizer cannot say, or says in bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from llmtrain.tokenizer import BytesTokenizer, HuggingFaceTokenizer
from llmtrain.tokenizer.coverage import coverage
from llmtrain.tokenizer.sentencepiece import SentencePieceTokenizer
from llmtrain.tokenizer.training import train_sentencepiece

ENGLISH = "The quick brown fox jumps over the lazy dog, and the dog sleeps on. " * 20
CHINESE = "敏捷的棕色狐狸跳过懒狗。"


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> SentencePieceTokenizer:
    file = tmp_path_factory.mktemp("sp") / "tokenizer.model"
    train_sentencepiece([ENGLISH], 330, file)
    return SentencePieceTokenizer.from_file(file)


def hugging_face(directory: Path, model: object, trainer: object, byte_level: bool) -> HuggingFaceTokenizer:
    tokenizer = Tokenizer(model)
    if byte_level:
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator([ENGLISH], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    return HuggingFaceTokenizer.from_path(directory, "tokenizers")


def test_text_it_was_made_for(sentencepiece):
    found = coverage(sentencepiece, [ENGLISH])
    assert found.unknown == 0 and found.in_bytes == 0 and found.warnings == []
    assert found.bytes == len(ENGLISH) and found.bytes / found.tokens > 1


def test_sentencepiece_spells_other_text_in_bytes(sentencepiece):
    found = coverage(sentencepiece, [CHINESE])
    assert found.unknown == 0 and found.in_bytes > 0.9
    assert len(found.warnings) == 1 and "of the tokens are bytes" in found.warnings[0]
    mixed = coverage(sentencepiece, [ENGLISH, CHINESE])
    assert 0 < mixed.in_bytes < found.in_bytes


def test_a_byte_level_vocabulary_has_pieces_of_characters(tmp_path):
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    found = coverage(hugging_face(tmp_path, models.BPE(), trainer, True), [CHINESE])
    assert found.unknown == 0 and found.in_bytes > 0.9


def test_a_vocabulary_without_bytes_loses_characters(tmp_path):
    trainer = trainers.BpeTrainer(vocab_size=100, show_progress=False)
    tokenizer = hugging_face(tmp_path, models.BPE(), trainer, False)
    found = coverage(tokenizer, [ENGLISH + CHINESE])
    assert found.unknown == pytest.approx(len(CHINESE) / len(ENGLISH + CHINESE), rel=0.2)
    assert coverage(tokenizer, [CHINESE]).unknown > 0.9
    assert any("are unknown to the tokenizer" in line for line in coverage(tokenizer, [CHINESE]).warnings)


def test_bytes_are_what_a_tokenizer_of_bytes_is_for():
    found = coverage(BytesTokenizer(), [CHINESE])
    assert found.in_bytes is None and found.unknown == 0 and found.warnings == []
