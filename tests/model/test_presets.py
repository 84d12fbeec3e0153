"""Presets have the shapes they name: counted by hand, and by transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import llmtrain
from llmtrain.config.hydra import compose
from llmtrain.model import DecoderConfig
from llmtrain.training.config import TrainConfig
from tests.model.small import config

CONF = Path(llmtrain.__file__).parent.parent / "conf" / "model"

SHAPES = {  # billions of parameters that the name promises, with GPT-2's vocabulary of 50,257
    "124m": 0.124, "350m": 0.35, "760m": 0.76, "1_3b": 1.3, "3b": 3, "7b": 7, "13b": 13, "30b": 30, "70b": 70,
}  # fmt: skip
FAMILIES = ("falcon", "mpt", "bloom")
REAL: dict[str, tuple[int, int, str, dict[str, Any]]] = {
    # preset: vocabulary, parameters as its card says, transformers' class, its config
    "falcon_7b": (65024, 6_921_720_704, "Falcon", {
        "hidden_size": 4544, "num_hidden_layers": 32, "num_attention_heads": 71, "multi_query": True,
        "parallel_attn": True, "bias": False, "alibi": False, "new_decoder_architecture": False,
    }),
    "falcon_rw_1b": (50304, 1_311_625_216, "Falcon", {
        "hidden_size": 2048, "num_hidden_layers": 24, "num_attention_heads": 32, "multi_query": False,
        "parallel_attn": False, "bias": True, "alibi": True, "new_decoder_architecture": False,
    }),
    "mpt_7b": (50432, 6_649_286_656, "Mpt", {
        "d_model": 4096, "n_layers": 32, "n_heads": 32, "no_bias": True,
    }),
    "bloom_7b1": (250880, 7_069_016_064, "Bloom", {"hidden_size": 4096, "n_layer": 30, "n_head": 32}),
    "llama_7b": (32000, 6_738_415_616, "Llama", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "intermediate_size": 11008,
    }),
    "llama3_8b": (128256, 8_030_261_248, "Llama", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336,
    }),
    "mistral_7b": (32768, 7_248_023_552, "Mistral", {
        "hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
        "intermediate_size": 14336,
    }),
    "qwen3_8b": (151936, 8_190_735_360, "Qwen3", {
        "hidden_size": 4096, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 12288, "tie_word_embeddings": False,
    }),
}  # fmt: skip


def preset(name: str) -> DecoderConfig:
    """A preset of conf/model."""
    return compose(TrainConfig, [f"model={name}"]).model


def counted(name: str, vocab_size: int) -> int:
    """Parameters of a preset, on the meta device."""
    with torch.device("meta"):
        return preset(name).assemble(vocab_size=vocab_size, seq_len=2048).parameter_count


def by_hand(name: str, vocab_size: int) -> int:
    """The same from the numbers in its file, Llama's parts: RMSNorm, SwiGLU, no biases."""
    keys = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    d, heads, kv, inner = keys["d_model"], keys["n_heads"], keys["n_kv_heads"], keys["d_ff"]
    attention = d * d + 2 * d * (d // heads) * kv + d * d
    block = attention + 3 * d * inner + 2 * d
    tables = 1 if keys.get("tie_embeddings", True) else 2
    return keys["n_layers"] * block + tables * vocab_size * d + d


@pytest.mark.parametrize("name", ["tiny", *SHAPES])
def test_a_shape_against_a_hand_count(name: str) -> None:
    count = counted(name, 50257)
    assert count == by_hand(name, 50257)
    assert count / 1e9 == pytest.approx(SHAPES.get(name, count / 1e9), rel=0.12)


@pytest.mark.parametrize("name", sorted(SHAPES.keys() - {"124m"}))
def test_shapes_suit_the_hardware(name: str) -> None:
    """Heads of 128 and a d_ff that is a multiple of 256 (Shazeer's 8/3 d_model, rounded up)."""
    shape = preset(name)
    assert shape.d_head == 128 and shape.d_ff % 256 == 0
    if name != "70b":
        assert 0 <= shape.d_ff - 8 * shape.d_model / 3 < 256


@pytest.mark.parametrize("name", REAL)
def test_a_real_model_against_its_card_and_transformers(name: str) -> None:
    import transformers

    vocab_size, parameters, family, keys = REAL[name]
    assert counted(name, vocab_size) == parameters
    theirs = getattr(transformers, f"{family}Config")(vocab_size=vocab_size, **keys)
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForCausalLM")(theirs)
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_in_every_size_against_a_hand_count(name: str, family: str) -> None:
    """Their blocks have two matrices of 4 d_model, about as many weights as three of 8/3."""
    keys = yaml.safe_load((CONF / f"{name}.yaml").read_text())
    d, layers, vocab_size = keys["d_model"], keys["n_layers"], 50257
    kv = 1 if family == "falcon" else keys["n_kv_heads"]
    qkv, inner = d + 2 * kv * d // keys["n_heads"], 4 * d
    matrices = d * qkv + d * d + 2 * d * inner
    norm, norms = {"falcon": (2 * d, 1), "mpt": (d, 2), "bloom": (2 * d, 2)}[family]
    biases = qkv + d + inner + d if family == "bloom" else 0
    embedding_norm = norm if family == "bloom" else 0
    tables = (1 if keys.get("tie_embeddings", True) else 2) * vocab_size * d
    expected = layers * (matrices + biases + norms * norm) + norm + embedding_norm + tables
    shape = compose(TrainConfig, [f"model={name}", f"model/family={family}"]).model
    with torch.device("meta"):
        assert shape.assemble(vocab_size=vocab_size, seq_len=2048).parameter_count == expected
    assert shape.position.kind == ("alibi" if family in ("mpt", "bloom") else "rope")


def test_every_preset_and_part_is_tried() -> None:
    assert {path.stem for path in CONF.glob("family/*.yaml")} == set(FAMILIES)
    assert {path.stem for path in CONF.glob("*.yaml")} == {"base", "tiny", *SHAPES, *REAL}
    for path in CONF.glob("position/*.yaml"):
        assert config(position=yaml.safe_load(path.read_text())).position.kind == path.stem
    for path in CONF.glob("attention/*.yaml"):
        assert config(attention=yaml.safe_load(path.read_text())).attention.backend == path.stem
