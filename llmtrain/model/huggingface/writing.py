"""A decoder as a directory that `transformers` loads, written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.model.decoder import Decoder, DecoderConfig
from llmtrain.model.huggingface.families import Family, family_of
from llmtrain.model.huggingface.keys import keys_of
from llmtrain.model.huggingface.rows import grouped, halves, rows_of_parts
from llmtrain.model.init import VOCABULARY

GB = 10**9


def write_pretrained(
    directory: Path,
    config: DecoderConfig,
    weights: Mapping[str, Tensor],
    *,
    vocab_size: int,
    seq_len: int,
    bos_id: int | None,
    eos_id: int | None,
    dtype: torch.dtype,
    max_shard_gb: float,
) -> Family:
    """Writes config.json, generation_config.json and safetensors for `AutoModelForCausalLM`.

    `weights` gives the parameters by our names; each is asked for once, and what is held at a time is one
    shard. A parameter larger than `max_shard_gb` is a shard of its own. An option set without a home is a
    UserError before anything is written.
    """
    family = family_of(config)
    with torch.device("meta"):
        decoder = config.assemble(vocab_size=vocab_size, seq_len=seq_len)
    _write_config(directory, family, config, decoder, dtype, {"bos_token_id": bos_id, "eos_token_id": eos_id})
    shards = list(_shards(decoder, dtype, max_shard_gb * GB))
    writer = _Writer(directory, family, decoder, dtype)
    files: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        of = f"-{number:05d}-of-{len(shards):05d}" if len(shards) > 1 else ""
        files |= writer.write(f"model{of}.safetensors", names, weights)
    if len(shards) > 1:
        index = {"metadata": {"total_size": writer.bytes}, "weight_map": files}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    return family


def _write_config(
    directory: Path,
    family: Family,
    config: DecoderConfig,
    decoder: Decoder,
    dtype: torch.dtype,
    ids: dict[str, int | None],
) -> None:
    from transformers import AutoConfig, GenerationConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    directory.mkdir(parents=True, exist_ok=True)
    keys = {
        **keys_of(family, config, decoder.seq_len),
        "architectures": [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[family.model_type]],
        "dtype": str(dtype).removeprefix("torch."),
        "vocab_size": decoder.vocab_size,
        "pad_token_id": None,
        **ids,
    }
    AutoConfig.for_model(family.model_type, **keys).save_pretrained(directory)
    GenerationConfig(**ids).save_pretrained(directory)


def _shards(decoder: Decoder, dtype: torch.dtype, limit: float) -> Iterator[list[str]]:
    """The parameters of each file, in the model's order."""
    names: list[str] = []
    held = 0
    for name, parameter in decoder.named_parameters():
        size = parameter.numel() * dtype.itemsize
        if names and held + size > limit:
            yield names
            names, held = [], 0
        names.append(name)
        held += size
    yield names


class _Writer:
    def __init__(self, directory: Path, family: Family, decoder: Decoder, dtype: torch.dtype) -> None:
        self.directory, self.family, self.decoder, self.dtype = directory, family, decoder, dtype
        self.bytes = 0

    def write(self, file: str, names: list[str], weights: Mapping[str, Tensor]) -> dict[str, str]:
        """Write the parameters of these names; {their name: the file}."""
        from safetensors.torch import save_file

        tensors = {key: value for name in names for key, value in self._translated(name, weights[name])}
        save_file(tensors, self.directory / file, metadata={"format": "pt"})
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())
        return dict.fromkeys(tensors, file)

    def _translated(self, name: str, value: Tensor) -> Iterator[tuple[str, Tensor]]:
        """(their name, tensor) of one of our parameters; each tensor has memory of its own."""
        config: DecoderConfig = self.decoder.config
        if name in VOCABULARY:
            value = value[: self.decoder.vocab_size]
        if getattr(config.position, "layout", None) == "interleaved":
            value = _in_halves(name, value, config)
        if self.family.grouped_qkv and ".attention.qkv." in name:
            value = grouped(value, config.n_heads, config.n_kv_heads)
        theirs = self.family.theirs(name)
        parts = value.split(rows_of_parts(name, config)) if len(theirs) > 1 else [value]
        for key, part in zip(theirs, parts, strict=True):
            yield key, part.detach().to("cpu", self.dtype, copy=True)


def _in_halves(name: str, value: Tensor, config: DecoderConfig) -> Tensor:
    """`value` for heads whose RoPE turns i with i + D / 2, of one that turns 2i with 2i + 1."""
    if name.endswith((".q_norm.weight", ".k_norm.weight")):
        return halves(value, config.d_head)
    if ".attention.qkv." not in name:
        return value
    turned = (config.n_heads + config.n_kv_heads) * config.d_head
    return torch.cat([halves(value[:turned], config.d_head), value[turned:]])
