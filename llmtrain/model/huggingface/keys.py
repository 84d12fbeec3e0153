"""config.json: what its keys are called here, both ways, and what of it a decoder cannot be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from llmtrain.model.decoder import DecoderConfig
from llmtrain.model.huggingface.families import Family
from llmtrain.model.position import LinearScaling, Llama3Scaling, RopeConfig, RopeScaling

LLAMA_SIZES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "d_ff": "intermediate_size",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
FALCON_SIZES = {
    "d_model": "hidden_size",
    "n_layers": "num_hidden_layers",
    "n_heads": "num_attention_heads",
    "d_ff": "ffn_hidden_size",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
MPT_SIZES = {
    "d_model": "d_model",
    "n_layers": "n_layers",
    "n_heads": "n_heads",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
BLOOM_SIZES = {
    "d_model": "hidden_size",
    "n_layers": "n_layer",
    "n_heads": "n_head",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
GATED = {"silu": "swiglu", "gelu": "geglu"}
PLAIN = {"gelu": "gelu", "gelu_pytorch_tanh": "gelu_tanh", "gelu_new": "gelu_tanh", "relu2": "relu_squared"}
SCALING = {
    "kind": "rope_type",
    "factor": "factor",
    "low_freq_factor": "low_freq_factor",
    "high_freq_factor": "high_freq_factor",
    "original_seq_len": "original_max_position_embeddings",
}
SCALINGS: dict[str, type[RopeScaling]] = {"linear": LinearScaling, "llama3": Llama3Scaling}

LAYERNORM = {"norm": "layernorm", "embedding_norm": False, "qk_norm": False}
ALIBI = {"kind": "alibi", "scaled": False}


# Ours to theirs


def keys_of(family: Family, config: DecoderConfig, seq_len: int) -> dict[str, Any]:
    """The keys of their config that a decoder of this family decides."""
    return _WRITERS[family.model_type](config, seq_len)


def _llama_keys(config: DecoderConfig, seq_len: int) -> dict[str, Any]:
    return {
        **_sizes(config, LLAMA_SIZES),
        "head_dim": config.d_head,
        "hidden_act": _inverse(GATED)[config.feed_forward],
        "rope_parameters": _rope_keys(config.position),
        "max_position_embeddings": seq_len,
    }


def _llama_biases(config: DecoderConfig, seq_len: int) -> dict[str, Any]:
    biases = dict.fromkeys(("attention_bias", "mlp_bias"), config.bias == "all")
    return _llama_keys(config, seq_len) | biases


def _falcon_keys(config: DecoderConfig, seq_len: int) -> dict[str, Any]:
    one_or_all = config.n_kv_heads in (1, config.n_heads)
    new = config.residual == "parallel" or not one_or_all
    rope = isinstance(config.position, RopeConfig)
    return {
        **_sizes(config, FALCON_SIZES),
        "num_kv_heads": config.n_kv_heads,
        "multi_query": config.n_kv_heads == 1,
        "new_decoder_architecture": new,
        "parallel_attn": config.residual != "sequential",
        "num_ln_in_parallel_attn": {"parallel": 2, "parallel_one_norm": 1}.get(config.residual),
        "bias": config.bias == "all",
        "activation": _inverse(PLAIN)[config.feed_forward],
        "alibi": not rope,
        **({"rope_parameters": _rope_keys(config.position)} if rope else {}),
        "max_position_embeddings": seq_len,
    }


def _mpt_keys(config: DecoderConfig, seq_len: int) -> dict[str, Any]:
    attention = {"alibi": True, "alibi_bias_max": 8}
    return {
        **_sizes(config, MPT_SIZES),
        "max_seq_len": seq_len,
        "attn_config": attention,
        "no_bias": True,
        "learned_pos_emb": False,
    }


def _bloom_keys(config: DecoderConfig, seq_len: int) -> dict[str, Any]:
    return {**_sizes(config, BLOOM_SIZES), "seq_length": seq_len}


_WRITERS: dict[str, Callable[[DecoderConfig, int], dict[str, Any]]] = {
    "llama": _llama_biases,
    "qwen2": _llama_keys,
    "qwen3": _llama_keys,
    "falcon": _falcon_keys,
    "mpt": _mpt_keys,
    "bloom": _bloom_keys,
}


def _sizes(config: DecoderConfig, names: Mapping[str, str]) -> dict[str, Any]:
    return {theirs: getattr(config, ours) for ours, theirs in names.items()}


def _rope_keys(rope: RopeConfig) -> dict[str, Any]:
    if rope.scaling is None:
        return {"rope_type": "default", "rope_theta": rope.theta}
    scaling = {SCALING[key]: value for key, value in rope.scaling.model_dump().items()}
    return {"rope_theta": rope.theta, **scaling}


def _inverse(table: Mapping[str, str]) -> dict[str, str]:
    """Of several names the first."""
    return {ours: theirs for theirs, ours in reversed([*table.items()])}


# Theirs to ours


def shape_of(theirs: Any) -> dict[str, Any]:
    """The keys of a DecoderConfig, all but `attention`; ValueError where a `PretrainedConfig` is none."""
    return _READERS[theirs.model_type](theirs)


def window_of(theirs: Any) -> int | None:
    """How far back a token sees, itself included, in the layers where that is limited."""
    layers = getattr(theirs, "layer_types", None)
    if layers is not None and "sliding_attention" not in layers:
        return None
    return getattr(theirs, "sliding_window", None)


def _llama_shape(theirs: Any) -> dict[str, Any]:
    biases = getattr(theirs, "attention_bias", False), getattr(theirs, "mlp_bias", False)
    _require(theirs, "hidden_act", GATED)
    _only(len({*biases}) == 1, "attention_bias and mlp_bias that differ")
    head_dim = getattr(theirs, "head_dim", None) or theirs.hidden_size // theirs.num_attention_heads
    return {
        **_read_sizes(theirs, {ours: name for ours, name in LLAMA_SIZES.items() if ours != "head_dim"}),
        "head_dim": head_dim,
        "norm": "rmsnorm",
        "embedding_norm": False,
        "qk_norm": False,
        "residual": "sequential",
        "bias": "all" if any(biases) else "none",
        "feed_forward": GATED[theirs.hidden_act],
        "position": _rope_shape(theirs.rope_parameters),
    }


def _qwen2_shape(theirs: Any) -> dict[str, Any]:
    return _llama_shape(theirs) | {"bias": "qkv"}


def _qwen3_shape(theirs: Any) -> dict[str, Any]:
    return _llama_shape(theirs) | {"qk_norm": True}


def _falcon_shape(theirs: Any) -> dict[str, Any]:
    _require(theirs, "activation", PLAIN)
    new, residual = theirs.new_decoder_architecture, "sequential"
    if new or theirs.parallel_attn:
        two = new and theirs.num_ln_in_parallel_attn in (None, 2)
        residual = "parallel" if two else "parallel_one_norm"
    kv_heads = 1 if theirs.multi_query else theirs.num_attention_heads
    return {
        **_read_sizes(theirs, FALCON_SIZES),
        "n_kv_heads": theirs.num_kv_heads if new else kv_heads,
        "head_dim": None,
        **LAYERNORM,
        "residual": residual,
        "bias": "all" if theirs.bias else "none",
        "feed_forward": PLAIN[theirs.activation],
        "position": ALIBI | {"scaled": True} if theirs.alibi else _rope_shape(theirs.rope_parameters),
    }


def _mpt_shape(theirs: Any) -> dict[str, Any]:
    attention = theirs.attn_config
    for key, plain in {
        "alibi": True, "alibi_bias_max": 8, "clip_qkv": None, "softmax_scale": None, "qk_ln": False,
        "prefix_lm": False, "attn_type": "multihead_attention",
    }.items():  # fmt: skip
        _only(getattr(attention, key) == plain, f"attn_config.{key}={getattr(attention, key)}")
    _only(theirs.no_bias, "no_bias=false")
    _only(theirs.logit_scale is None, f"logit_scale={theirs.logit_scale}")
    _only(theirs.expansion_ratio == 4, f"expansion_ratio={theirs.expansion_ratio}")
    return {
        **_mha_shape(theirs, MPT_SIZES),
        "norm": "layernorm_no_bias",
        "bias": "none",
        "feed_forward": "gelu",
    }


def _bloom_shape(theirs: Any) -> dict[str, Any]:
    _only(not theirs.apply_residual_connection_post_layernorm, "apply_residual_connection_post_layernorm")
    slices = theirs.pretraining_tp if theirs.slow_but_exact else 1
    _only(slices == 1, f"slow_but_exact with pretraining_tp={slices}, whose sums leave the biases out")
    return {
        **_mha_shape(theirs, BLOOM_SIZES),
        "embedding_norm": True,
        "bias": "all",
        "feed_forward": "gelu_tanh",
    }


def _mha_shape(theirs: Any, names: Mapping[str, str]) -> dict[str, Any]:
    sizes = _read_sizes(theirs, names)
    return {
        **sizes,
        "n_kv_heads": sizes["n_heads"],
        "head_dim": None,
        "d_ff": 4 * sizes["d_model"],
        **LAYERNORM,
        "residual": "sequential",
        "position": ALIBI,
    }


def _read_sizes(theirs: Any, names: Mapping[str, str]) -> dict[str, Any]:
    return {ours: getattr(theirs, name) for ours, name in names.items()}


def _rope_shape(rope: Mapping[str, Any]) -> dict[str, Any]:
    kind = rope.get("rope_type", "default")
    _only(
        kind == "default" or kind in SCALINGS, f"rope_type={kind} (default, {', '.join(SCALINGS)} are known)"
    )
    share = rope.get("partial_rotary_factor", 1.0)
    _only(share == 1.0, f"partial_rotary_factor={share}")
    scaling = {key: rope[SCALING[key]] for key in SCALINGS[kind].model_fields} if kind in SCALINGS else None
    return {
        "kind": "rope",
        "theta": rope["rope_theta"],
        "layout": "half",
        "scaling": scaling,
    }


def _require(theirs: Any, key: str, known: Mapping[str, str]) -> None:
    value = getattr(theirs, key)
    _only(value in known, f"{key}={value} ({', '.join(known)} are known)")


def _only(is_so: bool, what: str) -> None:
    if not is_so:
        raise ValueError(f"{what}: this decoder cannot be such a model")


_READERS: dict[str, Callable[[Any], dict[str, Any]]] = {
    "llama": _llama_shape,
    "mistral": _llama_shape,
    "qwen2": _qwen2_shape,
    "qwen3": _qwen3_shape,
    "falcon": _falcon_shape,
    "mpt": _mpt_shape,
    "bloom": _bloom_shape,
}
READABLE = tuple(_READERS)
