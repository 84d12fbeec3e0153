"""Exchange of weights with Hugging Face: a decoder with Llama's parts is exactly a `LlamaForCausalLM`.

    here                                    there
    -------------------------------------   ------------------------------------------------------
    embedding.weight                        model.embed_tokens.weight
    blocks.N.attention_norm.weight          model.layers.N.input_layernorm.weight
    blocks.N.attention.qkv.weight           model.layers.N.self_attn.{q,k,v}_proj.weight, in rows
    blocks.N.attention.out.weight           model.layers.N.self_attn.o_proj.weight
    blocks.N.feed_forward_norm.weight       model.layers.N.post_attention_layernorm.weight
    blocks.N.feed_forward.gate_up.weight    model.layers.N.mlp.{gate,up}_proj.weight, in rows
    blocks.N.feed_forward.down.weight       model.layers.N.mlp.down_proj.weight
    final_norm.weight                       model.norm.weight
    head.weight (untied only)               lm_head.weight

The vocabulary's padding is cut off on the way out and comes back as zeros on the way in.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llmtrain.config import UserError
from llmtrain.model.decoder import DecoderConfig, padded
from llmtrain.model.position import RopeConfig

Weights = dict[str, Tensor]

TOP = {
    "embedding.weight": "model.embed_tokens.weight",
    "final_norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
IN_BLOCK = {
    "attention_norm.weight": ["input_layernorm.weight"],
    "attention.qkv.weight": [f"self_attn.{part}_proj.weight" for part in "qkv"],
    "attention.out.weight": ["self_attn.o_proj.weight"],
    "feed_forward_norm.weight": ["post_attention_layernorm.weight"],
    "feed_forward.gate_up.weight": ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
    "feed_forward.down.weight": ["mlp.down_proj.weight"],
}
VOCABULARY = ("embedding.weight", "head.weight")

LLAMA: dict[str, Any] = {
    "norm": "rmsnorm",
    "embedding_norm": False,
    "qk_norm": False,
    "residual": "sequential",
    "bias": "none",
    "feed_forward": "swiglu",
}
"""The choices of a DecoderConfig that Llama has made."""

LLAMA_KEYS = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
"""The choices of a LlamaConfig that this decoder has made, and what a missing key means there."""


def export_llama(
    directory: Path,
    config: DecoderConfig,
    state_dict: Mapping[str, Tensor],
    *,
    vocab_size: int,
    seq_len: int,
    bos_id: int | None,
    eos_id: int | None,
) -> None:
    """Writes config.json, model.safetensors and generation_config.json for `AutoModelForCausalLM`.

    The weights keep their dtype. Other options than Llama's are a UserError that names the key.
    """
    llama, weights = to_llama(
        config, state_dict, vocab_size=vocab_size, seq_len=seq_len, bos_id=bos_id, eos_id=eos_id
    )
    from safetensors.torch import save_file
    from transformers import GenerationConfig, LlamaConfig

    directory.mkdir(parents=True, exist_ok=True)
    LlamaConfig(**llama).save_pretrained(directory)
    GenerationConfig(bos_token_id=bos_id, eos_token_id=eos_id).save_pretrained(directory)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def to_llama(
    config: DecoderConfig,
    state_dict: Mapping[str, Tensor],
    *,
    vocab_size: int,
    seq_len: int,
    bos_id: int | None,
    eos_id: int | None,
) -> tuple[dict[str, Any], Weights]:
    """(keys of a LlamaConfig, its state dict). The tensors are contiguous and on the CPU."""
    rope = _llama_rope(config)
    sizes = _row_sizes(config)
    weights: Weights = {}
    for name, theirs in _names(config):
        value = state_dict[name][:vocab_size] if name in VOCABULARY else state_dict[name]
        parts = value.split(sizes[_in_block(name)]) if len(theirs) > 1 else [value]
        weights.update({key: part.detach().cpu().clone() for key, part in zip(theirs, parts, strict=True)})
    return {
        "architectures": ["LlamaForCausalLM"],
        "dtype": str(state_dict["embedding.weight"].dtype).removeprefix("torch."),
        "vocab_size": vocab_size,
        "hidden_size": config.d_model,
        "intermediate_size": config.d_ff,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.d_head,
        "rms_norm_eps": config.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope.theta},
        "tie_word_embeddings": config.tie_embeddings,
        "max_position_embeddings": seq_len,
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": None,
        **LLAMA_KEYS,
    }, weights


def from_llama(llama: Mapping[str, Any], weights: Mapping[str, Tensor]) -> tuple[DecoderConfig, Weights]:
    """The inverse of `to_llama`, for a config.json of transformers 5 or 4 and the weights beside it.

    `DecoderConfig.assemble(vocab_size=llama["vocab_size"], ...)` loads the state dict. What this decoder
    cannot be (biases, scaled RoPE) is a UserError.
    """
    config = _decoder_config(llama)
    state_dict: Weights = {}
    for name, theirs in _names(config):
        value = torch.cat([weights[key] for key in theirs])
        if name in VOCABULARY:
            value = F.pad(value, (0, 0, 0, padded(len(value)) - len(value)))
        state_dict[name] = value
    return config, state_dict


def _names(config: DecoderConfig) -> Iterator[tuple[str, list[str]]]:
    """(our name, Llama's names whose rows it holds) of every parameter."""
    for ours, theirs in TOP.items():
        if ours != "head.weight" or not config.tie_embeddings:
            yield ours, [theirs]
    for n in range(config.n_layers):
        for ours, parts in IN_BLOCK.items():
            yield f"blocks.{n}.{ours}", [f"model.layers.{n}.{part}" for part in parts]


def _in_block(name: str) -> str:
    return name.split(".", 2)[-1]


def _row_sizes(config: DecoderConfig) -> dict[str, list[int]]:
    """Rows of each part of the two fused matrices."""
    keys = config.n_kv_heads * config.d_head
    return {
        "attention.qkv.weight": [config.n_heads * config.d_head, keys, keys],
        "feed_forward.gate_up.weight": [config.d_ff, config.d_ff],
    }


def _llama_rope(config: DecoderConfig) -> RopeConfig:
    """The config's RoPE, or a UserError that names every key that Llama has no home for."""
    chosen = {key: getattr(config, key) for key in LLAMA}
    wrong = [f"model.{key}={value}" for key, value in chosen.items() if value != LLAMA[key]]
    if not isinstance(config.position, RopeConfig):
        wrong.append(f"model.position={getattr(config.position, 'kind', type(config.position).__name__)}")
    if config.d_model % config.n_heads:
        wrong.append(f"model.n_heads={config.n_heads} that does not divide model.d_model={config.d_model}")
    if wrong:
        raise UserError(
            f"{', '.join(wrong)}: cannot be exported to Hugging Face yet; its Llama architecture has "
            "model.position=rope, model.norm=rmsnorm and model.feed_forward=swiglu"
        )
    rope: RopeConfig = config.position
    return rope


def _decoder_config(llama: Mapping[str, Any]) -> DecoderConfig:
    rope = llama.get("rope_parameters") or llama.get("rope_scaling") or {}
    wrong = [f"{key}={llama[key]}" for key, ours in LLAMA_KEYS.items() if llama.get(key, ours) != ours]
    if (kind := rope.get("rope_type", rope.get("type", "default"))) != "default":
        wrong.append(f"rope_type={kind}")
    if wrong:
        raise UserError(f"config.json: {', '.join(wrong)}: such a Llama cannot be read yet")
    heads = llama["num_attention_heads"]
    return DecoderConfig.model_validate(
        {
            "d_model": llama["hidden_size"],
            "n_layers": llama["num_hidden_layers"],
            "n_heads": heads,
            "n_kv_heads": llama.get("num_key_value_heads") or heads,
            "head_dim": llama.get("head_dim"),
            "d_ff": llama["intermediate_size"],
            "norm_eps": llama["rms_norm_eps"],
            "tie_embeddings": llama.get("tie_word_embeddings", False),
            "position": {"kind": "rope", "theta": rope.get("rope_theta", llama.get("rope_theta", 10000.0))},
            "attention": {"backend": "auto"},
            **LLAMA,
        }
    )
