"""Hugging Face directories that are damaged, or whose weights are not what their config.json says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from llmtrain.config import UserError
from llmtrain.model import DecoderConfig
from llmtrain.model.huggingface import Pretrained
from tests.model import huggingface_models as theirs
from tests.model.small import VOCAB, tokens

Weights = dict[str, Tensor]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
Q, K = (f"model.layers.0.self_attn.{letter}_proj.weight" for letter in "qk")


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return theirs.save(theirs.build("Llama GQA"), tmp_path)


def configure(directory: Path, **keys: Any) -> None:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | keys))


def change(directory: Path, work: Callable[[Weights], Weights]) -> None:
    """Store the weights again, with the changes that `work` gives."""
    from safetensors.torch import save_file

    weights = theirs.stored(directory)
    save_file(weights | work(weights), directory / "model.safetensors", metadata={"format": "pt"})


# The head


def test_a_head_of_its_own_is_not_dropped_where_config_json_says_tied(llama: Path) -> None:
    configure(llama, tie_word_embeddings=True)
    with pytest.raises(UserError, match=r"lm_head.weight is not model.embed_tokens.weight, .*set it to fal"):
        theirs.ours(llama)
    change(llama, lambda stored: {HEAD: stored[EMBEDDING].bfloat16()})
    with pytest.raises(UserError, match=r"lm_head.weight is not"):
        theirs.ours(llama)


def test_a_head_that_is_the_embedding_stored_twice_is_read(llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    configure(llama, tie_word_embeddings=True)
    change(llama, lambda stored: {HEAD: stored[EMBEDDING].clone()})
    model = AutoModelForCausalLM.from_pretrained(llama, local_files_only=True)
    assert theirs.largest_difference(theirs.ours(llama), model, tokens()) < 1e-4


# Files


def test_config_json_that_is_no_config(llama: Path) -> None:
    file = llama / "config.json"
    whole = file.read_text()
    for keys, words in [
        ({"vocab_size": None}, "vocab_size"),
        ({"num_attention_heads": 0, "head_dim": None}, "a size in it is 0"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config: the weights are quantized"),
    ]:
        configure(llama, **keys)
        with pytest.raises(UserError, match=words) as caught:
            Pretrained.open(llama)
        assert caught.value.lines[0].startswith(str(file))
        file.write_text(whole)
    file.write_text("[1]")
    with pytest.raises(UserError, match=r"config.json: holds a list, not an object"):
        Pretrained.open(llama)


LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"


@pytest.mark.parametrize("file", ["model.safetensors", "pytorch_model.bin"])
@pytest.mark.parametrize("damage", ["cut", "pointer", "empty"])
def test_damaged_files_are_named_in_one_line(llama: Path, file: str, damage: str) -> None:
    if file.endswith(".bin"):
        theirs.pickled(llama, theirs.stored(llama))
    content = (llama / file).read_bytes()
    (llama / file).write_bytes({"cut": content[:5000], "pointer": LFS, "empty": b""}[damage])
    with pytest.raises(UserError, match=rf"{file}: cannot be read as weights \(.*fetch it again") as caught:
        theirs.ours(llama)
    assert len(caught.value.lines) == 1


def test_a_pickled_file_of_something_else(llama: Path) -> None:
    theirs.pickled(llama, {"model": {"x": torch.ones(1)}, "step": 3})  # type: ignore[dict-item]
    with pytest.raises(UserError, match="something else than tensors"):
        theirs.ours(llama)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "no weight_map in it"),
        ({"weight_map": {"x": "model.safetensors"}}, "x: not in the file that it names"),
    ],
)
def test_an_index_that_is_none(llama: Path, index: dict[str, Any], words: str) -> None:
    (llama / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=words):
        theirs.ours(llama)


# Shapes and dtypes


@pytest.mark.parametrize(
    ("name", "work", "words"),
    [
        ("row short", lambda w: {EMBEDDING: w[EMBEDDING][:-1].clone()}, rf"{VOCAB - 1}, 32\], .*{VOCAB}, 32"),
        ("one wide", lambda w: {EMBEDDING: w[EMBEDDING][:, :1].clone()}, r"embed_tokens.weight has .*, 1\]"),
        ("head one wide", lambda w: {HEAD: w[HEAD][:, :1].clone()}, r"lm_head.weight has the shape .*, 1\]"),
        ("exchanged", lambda w: {Q: w[K].clone(), K: w[Q].clone()}, r"proj.weight has the shape \[\d+, 32"),
        ("int8", lambda w: {Q: w[Q].to(torch.int8)}, r"q_proj.weight is stored as I8, which is quantized"),
        ("fp8", lambda w: {Q: w[Q].to(torch.float8_e4m3fn)}, r"q_proj.weight is stored as F8_E4M3"),
    ],
    ids=lambda value: value if isinstance(value, str) and "\\" not in value else "",
)  # fmt: skip
def test_each_part_is_what_config_json_says(
    llama: Path, name: str, work: Callable[[Weights], Weights], words: str
) -> None:
    change(llama, work)
    with pytest.raises(UserError, match=words):
        theirs.ours(llama)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_other_floating_dtypes_are_read(llama: Path, dtype: torch.dtype) -> None:
    change(llama, lambda stored: {key: value.to(dtype) for key, value in stored.items()})
    expected = theirs.stored(llama)[EMBEDDING].float()
    assert torch.equal(theirs.ours(llama).embedding.weight[:VOCAB], expected)


def test_the_check_reads_no_values(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from llmtrain.model.huggingface.stored import Reader

    found = Pretrained.open(llama)
    config = DecoderConfig.model_validate({**found.shape, "attention": {"backend": "sdpa"}})
    monkeypatch.setattr(Reader, "read", lambda *_: pytest.fail("a tensor was read"))
    found.check_weights(config)
    change(llama, lambda stored: {Q: stored[K].clone()})
    with pytest.raises(UserError, match=r"q_proj.weight has the shape"):
        found.check_weights(config)
