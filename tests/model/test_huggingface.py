"""Weights of transformers' Llama in our decoder, and ours in transformers."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llmtrain.config import UserError
from llmtrain.model.huggingface import export_llama, from_llama, to_llama
from tests.model.small import KV_HEADS, SEQ_LEN, VOCAB, config, decoder, relative_error, tokens

CASES = [
    pytest.param(KV_HEADS[heads], tied, id=f"{heads}-{'tied' if tied else 'untied'}")
    for heads, tied in itertools.product(KV_HEADS, [True, False])
]
IDS = {"vocab_size": VOCAB, "seq_len": SEQ_LEN, "bos_id": 1, "eos_id": None}


@pytest.mark.parametrize(("n_kv_heads", "tied"), CASES)
def test_a_llamas_weights_give_its_logits(n_kv_heads: int, tied: bool) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=n_kv_heads, tie_word_embeddings=tied,
            head_dim=16, rms_norm_eps=1e-4, initializer_range=0.2, max_position_embeddings=2048,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    ).eval()  # fmt: skip
    shape, weights = from_llama(llama.config.to_dict(), llama.state_dict())
    ours = shape.assemble(vocab_size=VOCAB, seq_len=SEQ_LEN)
    ours.load_state_dict(weights)
    ids = tokens(length=1024)
    with torch.no_grad():
        assert relative_error(ours(ids), llama(ids).logits) < 1e-5
    assert (shape.n_kv_heads, shape.tie_embeddings, shape.d_head) == (n_kv_heads, tied, 16)
    back, theirs = to_llama(shape, weights, **IDS)
    expected = {name: value for name, value in llama.state_dict().items() if not (tied and "lm_head" in name)}
    assert theirs.keys() == expected.keys()
    assert all(torch.equal(theirs[name], value) for name, value in expected.items())
    assert back["rope_parameters"] == {"rope_type": "default", "rope_theta": 500.0}


@pytest.mark.parametrize(("n_kv_heads", "tied"), CASES)
def test_an_export_reloads_to_the_same_logits(tmp_path: Path, n_kv_heads: int, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    model = decoder(sharp=False, n_kv_heads=n_kv_heads, tie_embeddings=tied, attention={"backend": "sdpa"})
    export_llama(tmp_path / "out", model.config, model.state_dict(), **IDS)
    llama = AutoModelForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True)
    with torch.no_grad():
        difference = (llama(tokens()).logits - model(tokens())).abs().max().item()
    assert difference <= 1e-6
    assert type(llama).__name__ == "LlamaForCausalLM"
    assert (llama.config.vocab_size, llama.config.max_position_embeddings) == (VOCAB, SEQ_LEN)
    assert (llama.generation_config.bos_token_id, llama.generation_config.eos_token_id) == (1, None)


def test_the_weights_keep_their_dtype_and_the_directory_reads_back(tmp_path: Path) -> None:
    from safetensors.torch import load_file

    model = decoder(tie_embeddings=False, n_kv_heads=2).bfloat16()
    export_llama(tmp_path, model.config, model.state_dict(), **IDS)
    written = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in written.values()} == {torch.bfloat16}
    keys = json.loads((tmp_path / "config.json").read_text())
    assert keys["dtype"] == "bfloat16"
    shape, weights = from_llama(keys, written)
    ours, theirs = model.config.model_dump(), shape.model_dump()
    assert theirs == ours | {"head_dim": 8, "attention": {"backend": "auto"}}
    with torch.no_grad():
        model.embedding.weight[VOCAB:] = 0  # what the padding holds is nobody's business
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(torch.equal(value[:VOCAB], state[name][:VOCAB]) for name, value in weights.items())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"position": {"kind": "alibi"}}, "model.position=alibi"),
        ({"position": {"kind": "learned"}}, "model.position=learned"),
        ({"position": {"kind": "none"}}, "model.position=none"),
        ({"norm": "layernorm"}, "model.norm=layernorm"),
        ({"feed_forward": "gelu"}, "model.feed_forward=gelu"),
        ({"n_heads": 3, "head_dim": 8}, "model.n_heads=3"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_has_no_llama_home_is_not_yet_exported(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    model = decoder(**changes)
    with pytest.raises(UserError, match="yet") as caught:
        export_llama(tmp_path / "out", model.config, model.state_dict(), **IDS)
    assert named in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_llamas_that_this_decoder_is_not() -> None:
    keys, _ = to_llama(config(), decoder().state_dict(), **IDS)
    scaled = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    for wrong in ({"attention_bias": True}, {"hidden_act": "gelu"}, {"rope_parameters": scaled}):
        with pytest.raises(UserError, match="cannot be read yet"):
            from_llama(keys | wrong, {})


def test_a_config_of_transformers_4_is_read() -> None:
    keys, weights = to_llama(config(), decoder().state_dict(), **IDS)
    old = {key: value for key, value in keys.items() if key not in ("rope_parameters", "head_dim")}
    shape, _ = from_llama(old | {"rope_theta": 123.0, "rope_scaling": None}, weights)
    assert (shape.position.theta, shape.d_head) == (123.0, 8)
