"""Every key of the model's config shows, mistakes are named, imports are light."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from llmtrain.config import Config
from llmtrain.model import Decoder, DecoderConfig
from llmtrain.model.kernels import AttentionConfig, sdpa
from llmtrain.model.position import AlibiConfig, LearnedConfig, NoPositionConfig, PositionConfig, RopeConfig
from tests.model.small import POSITIONS, SEQ_LEN, VOCAB, config, decoder, tokens

PARTS = {
    "position": [RopeConfig, AlibiConfig, LearnedConfig, NoPositionConfig],
    "attention": [AttentionConfig],
}


def keys() -> Iterator[str]:
    """Every key below `model`, dotted."""
    for name in DecoderConfig.model_fields:
        parts: list[type[Config]] = PARTS.get(name, [])
        yield from dict.fromkeys(f"{name}.{key}" for part in parts for key in part.model_fields)
        if not parts:
            yield name


def shapes(model: Decoder) -> dict[str, Any]:
    return {name: parameter.shape for name, parameter in model.named_parameters()}


def logits(model: Decoder) -> list[float]:
    with torch.no_grad():
        return model(tokens()).flatten().tolist()


ROPE = POSITIONS["rope"]
CHANGES: dict[str, tuple[dict[str, Any], Any]] = {
    "d_model": ({"d_model": 64}, shapes),
    "n_layers": ({"n_layers": 3}, shapes),
    "n_heads": ({"n_heads": 2}, shapes),
    "n_kv_heads": ({"n_kv_heads": 4}, shapes),
    "head_dim": ({"head_dim": 16}, shapes),
    "d_ff": ({"d_ff": 64}, shapes),
    "norm": ({"norm": "layernorm"}, shapes),
    "norm_eps": ({"norm_eps": 1e-2}, logits),
    "embedding_norm": ({"embedding_norm": True}, shapes),
    "qk_norm": ({"qk_norm": True}, shapes),
    "residual": ({"residual": "parallel_one_norm"}, shapes),
    "bias": ({"bias": "qkv"}, shapes),
    "feed_forward": ({"feed_forward": "gelu"}, shapes),
    "tie_embeddings": ({"tie_embeddings": False}, shapes),
    "position.kind": ({"position": POSITIONS["alibi"]}, logits),
    "position.theta": ({"position": ROPE | {"theta": 50.0}}, logits),
    "position.layout": ({"position": ROPE | {"layout": "interleaved"}}, logits),
    "position.scaling": ({"position": ROPE | {"scaling": {"kind": "linear", "factor": 2.0}}}, logits),
    "position.scaled": (
        {"position": POSITIONS["alibi"] | {"scaled": True}},
        lambda model: getattr(model.position, "divisor", None),
    ),
    "attention.backend": ({"attention": {"backend": "sdpa"}}, lambda model: model.kernel.name),
}
"""For each key a change, and what it must be seen in."""


@pytest.mark.parametrize("key", list(keys()))
def test_every_key_shows(key: str) -> None:
    changes, observe = CHANGES[key]
    assert observe(decoder(**changes)) != observe(decoder())
    assert observe(decoder()) == observe(decoder())


def test_the_positions_all_differ() -> None:
    results = [logits(decoder(position=position)) for position in POSITIONS.values()]
    assert all(a != b for n, a in enumerate(results) for b in results[:n])


@pytest.mark.parametrize(
    ("changes", "key", "words"),
    [
        ({"n_kv_heads": 3}, "n_kv_heads", "must divide n_heads=4: one of 1, 2, 4"),
        ({"d_model": 30}, "head_dim", "n_heads=4 does not divide d_model=30"),
        ({"head_dim": 7}, "position", "head_dim=7 is odd"),
        ({"d_model": 0}, "d_model", "greater than 0"),
        ({"norm": "rms"}, "norm", "'rmsnorm', 'layernorm' or 'layernorm_no_bias'"),
        ({"position": {"kind": "ropes"}}, "position", "'rope', 'alibi', 'learned', 'none'"),
        ({"position": {"kind": "alibi", "scaled": False, "theta": 1.0}}, "position", "Extra inputs"),
        ({"attention": {"backend": "fast"}}, "attention", "'flash', 'flash4' or 'varlen'"),
        ({"d_modle": 3}, "d_modle", "Extra inputs"),
    ],
    ids=str,
)
def test_mistakes_name_their_key(changes: dict[str, Any], key: str, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        config(**changes)
    errors = caught.value.errors()
    assert [error["loc"][0] for error in errors] == [key]
    assert words in errors[0]["msg"]


def test_odd_heads_are_fine_without_rope() -> None:
    assert decoder(head_dim=7, position=POSITIONS["alibi"])(tokens()).isfinite().all()


class Wave(PositionConfig):
    """A position part of someone else's."""

    height: float

    def build(self, *, d_model: int, n_heads: int, head_dim: int, seq_len: int) -> Any:
        from llmtrain.model.position import Learned

        return Learned(int(self.height), d_model)


def test_a_position_part_of_ones_own() -> None:
    model = decoder(position={"_target_": "tests.model.test_config.Wave", "height": 30.0})
    assert shapes(model)["position.embedding.weight"] == (30, 32)
    assert model(tokens()).shape == (2, SEQ_LEN, VOCAB)


def test_parameters_against_a_hand_count() -> None:
    model = decoder(n_kv_heads=2, tie_embeddings=False, position=POSITIONS["learned"])
    block = 32 * (32 + 16 + 16) + 32 * 32 + 3 * 32 * 48 + 2 * 32
    assert model.parameter_count == 2 * VOCAB * 32 + SEQ_LEN * 32 + 2 * block + 32
    assert decoder(n_kv_heads=2).parameter_count == VOCAB * 32 + 2 * block + 32


def test_flops_against_a_counter() -> None:
    """The formula counts norms, which are no products, and leaves out the vocabulary's padding."""
    model = decoder(n_kv_heads=2, head_dim=16)
    with FlopCounterMode(display=False) as counter:
        model(tokens(), tokens()).total.backward()
    norms, padding = 5 * 32, 84 * 32
    counted = counter.get_total_flops() / tokens().numel()
    assert counted == model.flops_per_token(SEQ_LEN) + 6 * (padding - norms)


def test_parameter_names_are_the_checkpoint_contract() -> None:
    block = [
        "attention_norm.weight",
        "attention.qkv.weight",
        "attention.out.weight",
        "feed_forward_norm.weight",
        "feed_forward.gate_up.weight",
        "feed_forward.down.weight",
    ]
    blocks = [f"blocks.{n}.{name}" for n in range(2) for name in block]
    assert list(decoder().state_dict()) == ["embedding.weight", *blocks, "final_norm.weight"]
    other = decoder(
        feed_forward="gelu", norm="layernorm", tie_embeddings=False, position=POSITIONS["learned"]
    )
    added = set(other.state_dict()) - set(decoder().state_dict())
    assert {name for name in added if not name.endswith("norm.bias")} == {
        "head.weight",
        "position.embedding.weight",
        "blocks.0.feed_forward.up.weight",
        "blocks.1.feed_forward.up.weight",
    }


def test_the_model_imports_torch_and_pydantic_only() -> None:
    heavy = ["deepspeed", "hydra", "omegaconf", "transformers", "datasets", "wandb", "safetensors"]
    heavy.append("flash_attn")
    modules = "import llmtrain.model, llmtrain.model.huggingface, llmtrain.model.generation"
    code = f"import sys; {modules}; print([name for name in {heavy} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_auto_is_sdpa_here() -> None:
    assert decoder(attention={"backend": "auto"}).kernel is sdpa.KERNEL


@pytest.mark.parametrize(
    ("d_model", "kind", "width"), [(100, "swiglu", 512), (96, "geglu", 256), (100, "gelu", 400)]
)
def test_no_d_ff_is_as_wide_as_its_kind_asks(d_model: int, kind: str, width: int) -> None:
    assert config(d_model=d_model, n_heads=2, n_kv_heads=1, d_ff=None, feed_forward=kind).d_ff == width
