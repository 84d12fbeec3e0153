"""transformers' own tiny random models, one of each shape that a decoder can be."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmtrain.model import Decoder, DecoderConfig
from llmtrain.model.huggingface import Pretrained
from tests.model.small import VOCAB

LLAMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "head_dim": 16,
    "rms_norm_eps": 1e-4,
    "initializer_range": 0.2,
    "max_position_embeddings": 2048,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 256,
}
FALCON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "layer_norm_epsilon": 1e-4,
    "initializer_range": 0.2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
}
FALCON_40B = FALCON | {"new_decoder_architecture": True, "num_kv_heads": 2}
FALCON_RW = FALCON | {"alibi": True, "bias": True, "multi_query": False, "parallel_attn": False}
MPT = {
    "vocab_size": VOCAB,
    "d_model": 48,
    "n_layers": 2,
    "n_heads": 4,
    "max_seq_len": 2048,
    "layer_norm_epsilon": 1e-4,
    "initializer_range": 0.2,
}
BLOOM = {
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "n_layer": 2,
    "n_head": 4,
    "layer_norm_epsilon": 1e-4,
    "initializer_range": 0.2,
}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama MHA": ("llama", LLAMA | {"num_key_value_heads": 4}),
    "Llama GQA": ("llama", LLAMA),
    "Llama MQA": ("llama", LLAMA | {"num_key_value_heads": 1}),
    "Llama tied": ("llama", LLAMA | {"tie_word_embeddings": True}),
    "Llama with biases": ("llama", LLAMA | {"attention_bias": True, "mlp_bias": True}),
    "Llama with GeGLU": ("llama", LLAMA | {"hidden_act": "gelu"}),
    "Llama, linear scaling": ("llama", LLAMA | {"rope_parameters": LINEAR}),
    "Llama 3.1": ("llama", LLAMA | {"rope_parameters": LLAMA3}),
    "Mistral": ("mistral", LLAMA | {"sliding_window": None}),
    "Mistral 0.1": ("mistral", LLAMA | {"sliding_window": 512}),
    "Qwen2": ("qwen2", LLAMA | {"head_dim": 8}),
    "Qwen2, wide heads": ("qwen2", LLAMA),
    "Qwen3": ("qwen3", LLAMA | {"tie_word_embeddings": True}),
    "Falcon 7B": ("falcon", FALCON),
    "Falcon RW": ("falcon", FALCON_RW),
    "Falcon MQA with ALiBi": ("falcon", FALCON | {"alibi": True, "activation": "gelu_pytorch_tanh"}),
    "Falcon 40B": ("falcon", FALCON_40B),
    "Falcon 11B": ("falcon", FALCON_40B | {"num_ln_in_parallel_attn": 1, "ffn_hidden_size": 96}),
    "MPT": ("mpt", MPT),
    "MPT, six heads": ("mpt", MPT | {"n_heads": 6}),
    "BLOOM": ("bloom", BLOOM),
    "BLOOM, three heads, untied": ("bloom", BLOOM | {"n_head": 3, "tie_word_embeddings": False}),
}


def build(name: str) -> Any:
    """A model whose norms and biases are random too."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, keys = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **keys)).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if "norm" in key or "ln_" in key or key.endswith("bias"):
                parameter.add_(0.3 * torch.randn(parameter.shape))
    return model


def save(model: Any, directory: Path, **options: Any) -> Path:
    """What a user downloads: config.json and safetensors."""
    model.save_pretrained(directory, **options)
    return directory


def pickled(directory: Path, weights: dict[str, torch.Tensor]) -> None:
    """Weights as they were stored before safetensors."""
    for file in directory.glob("*.safetensors*"):
        file.unlink()
    torch.save(weights, directory / "pytorch_model.bin")


def ours(directory: Path, vocab_size: int = VOCAB, seq_len: int = 64) -> Decoder:
    """The decoder that a directory is."""
    from contextlib import nullcontext

    found = Pretrained.open(directory)
    config = DecoderConfig.model_validate({**found.shape, "attention": {"backend": "sdpa"}})
    decoder = config.assemble(vocab_size=vocab_size, seq_len=seq_len)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.fill_(float("nan"))  # what is not written shows
    found.initialize(decoder, nullcontext)
    return decoder


def stored(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of a directory's safetensors."""
    from safetensors.torch import load_file

    return {key: value for file in directory.glob("*.safetensors") for key, value in load_file(file).items()}


def largest_difference(a: nn.Module, b: Any, ids: torch.Tensor) -> float:
    """Of the logits of our model and theirs."""
    with torch.no_grad():
        return float((a(ids) - b(ids).logits).abs().max())
