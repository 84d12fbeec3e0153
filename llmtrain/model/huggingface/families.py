"""The Hugging Face architectures that a decoder can be: names of weights, and which options each one has.

family              members                              here
-----------------   ----------------------------------   -----------------------------------------------
Llama               Llama 1 to 3, Mistral                rope, rmsnorm, swiglu; biases all or none
Qwen2               Qwen2, Qwen2.5                       Llama with bias=qkv
Qwen3               Qwen3 (dense)                        Llama with qk_norm
Falcon              Falcon 7B, Falcon RW                 layernorm; rope or scaled alibi; MQA or MHA
Falcon 40B          Falcon 40B, 180B; two norms          the same with residual=parallel; any kv heads
Falcon 11B          Falcon2 11B; one norm                the same with residual=parallel_one_norm and GQA
MPT                 MPT 7B, 30B                          alibi, layernorm_no_bias, gelu; MHA
BLOOM               BLOOM, BLOOMZ                        alibi, layernorm, embedding_norm, biases; MHA

Logits agree to rounding, but for Falcon with alibi: `transformers` rounds its slopes and their products with
positions to bf16 (modeling_falcon.py, build_alibi_tensor), which is exact for up to 8 heads and 256 positions
only; a decoder here keeps them in fp32.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from llmtrain.config import UserError, label
from llmtrain.model.decoder import DecoderConfig

Names = Mapping[str, str]
"""{our module: theirs}. N is the block's number; of `{q,k,v}_proj` ours holds the rows one after another."""

LLAMA_NAMES: Names = {
    "embedding": "model.embed_tokens",
    "blocks.N.attention_norm": "model.layers.N.input_layernorm",
    "blocks.N.attention.qkv": "model.layers.N.self_attn.{q,k,v}_proj",
    "blocks.N.attention.q_norm": "model.layers.N.self_attn.q_norm",
    "blocks.N.attention.k_norm": "model.layers.N.self_attn.k_norm",
    "blocks.N.attention.out": "model.layers.N.self_attn.o_proj",
    "blocks.N.feed_forward_norm": "model.layers.N.post_attention_layernorm",
    "blocks.N.feed_forward.gate_up": "model.layers.N.mlp.{gate,up}_proj",
    "blocks.N.feed_forward.down": "model.layers.N.mlp.down_proj",
    "final_norm": "model.norm",
    "head": "lm_head",
}

FALCON_NAMES: Names = {
    "embedding": "transformer.word_embeddings",
    "blocks.N.attention_norm": "transformer.h.N.input_layernorm",
    "blocks.N.attention.qkv": "transformer.h.N.self_attention.query_key_value",
    "blocks.N.attention.out": "transformer.h.N.self_attention.dense",
    "blocks.N.feed_forward_norm": "transformer.h.N.post_attention_layernorm",
    "blocks.N.feed_forward.up": "transformer.h.N.mlp.dense_h_to_4h",
    "blocks.N.feed_forward.down": "transformer.h.N.mlp.dense_4h_to_h",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",
}

FALCON_40B_NAMES: Names = {
    **FALCON_NAMES,
    "blocks.N.attention_norm": "transformer.h.N.ln_attn",
    "blocks.N.feed_forward_norm": "transformer.h.N.ln_mlp",
}

BLOOM_NAMES: Names = {**FALCON_NAMES, "embedding_norm": "transformer.word_embeddings_layernorm"}

MPT_NAMES: Names = {
    "embedding": "transformer.wte",
    "blocks.N.attention_norm": "transformer.blocks.N.norm_1",
    "blocks.N.attention.qkv": "transformer.blocks.N.attn.Wqkv",
    "blocks.N.attention.out": "transformer.blocks.N.attn.out_proj",
    "blocks.N.feed_forward_norm": "transformer.blocks.N.norm_2",
    "blocks.N.feed_forward.up": "transformer.blocks.N.ffn.up_proj",
    "blocks.N.feed_forward.down": "transformer.blocks.N.ffn.down_proj",
    "final_norm": "transformer.norm_f",
    "head": "lm_head",
}


class Mismatch(NamedTuple):
    """An option that a family does not have."""

    key: str
    value: Any
    needed: str

    @property
    def weight(self) -> int:
        """How far it takes the family away: the nearest one is first of all one with such positions."""
        return 100 if self.key == "position" else 1


Limit = Callable[[DecoderConfig], Mismatch | None]


def heads_divide_the_width(config: DecoderConfig) -> Mismatch | None:
    """d_model must be a multiple of n_heads, even where head_dim is another number."""
    if config.d_model % config.n_heads == 0:
        return None
    divisors = [str(n) for n in range(1, config.d_model + 1) if config.d_model % n == 0]
    return Mismatch("n_heads", config.n_heads, " or ".join(divisors))


def heads_fill_the_width(config: DecoderConfig) -> Mismatch | None:
    """There is no key for a head_dim of one's own."""
    if config.d_head * config.n_heads == config.d_model:
        return None
    return Mismatch("head_dim", config.d_head, "d_model / n_heads")


def as_many_kv_heads(config: DecoderConfig) -> Mismatch | None:
    """MHA only."""
    if config.n_kv_heads == config.n_heads:
        return None
    return Mismatch("n_kv_heads", config.n_kv_heads, str(config.n_heads))


def one_or_all_kv_heads(config: DecoderConfig) -> Mismatch | None:
    """MQA or MHA."""
    if config.n_kv_heads in (1, config.n_heads):
        return None
    return Mismatch("n_kv_heads", config.n_kv_heads, f"1 or {config.n_heads}")


def four_times_as_wide(config: DecoderConfig) -> Mismatch | None:
    """The inner width is no key but 4 d_model."""
    width = 4 * config.d_model
    return None if config.d_ff == width else Mismatch("d_ff", config.d_ff, str(width))


@dataclass(frozen=True)
class Family:
    """One architecture."""

    name: str
    model_type: str
    """What config.json calls it."""
    names: Names
    options: Mapping[str, tuple[Any, ...]]
    """For each key of a DecoderConfig that is a choice: what this architecture can be."""
    limits: tuple[Limit, ...]
    """Conditions on its sizes."""
    grouped_qkv: bool = False
    """Whether the rows of each key/value head stand together: its query heads, its key, its value."""

    def mismatches(self, config: DecoderConfig) -> list[Mismatch]:
        """What of a config this architecture does not have."""
        found = [
            Mismatch(key, value, " or ".join(map(_text, self.options[key])))
            for key, value in options_of(config).items()
            if key in self.options and value not in self.options[key]
        ]
        return found + [mismatch for limit in self.limits if (mismatch := limit(config))]

    def theirs(self, name: str) -> list[str]:
        """Their parameters whose rows ours of this name holds, in order."""
        module, _, kind = name.rpartition(".")
        number = re.search(r"blocks\.(\d+)\.", module)
        pattern = self.names[re.sub(r"blocks\.\d+\.", "blocks.N.", module)]
        if number:
            pattern = pattern.replace(".N.", f".{number[1]}.")
        return [f"{module}.{kind}" for module in _alternatives(pattern)]


def options_of(config: DecoderConfig) -> dict[str, Any]:
    """The choices of a config, by key."""
    position = config.position
    kind = label(position)
    chosen = {key: getattr(config, key) for key in CHOICES}
    scaled = {"position.scaled": position.scaled} if kind == "alibi" else {}
    return {"position": kind, **scaled, **chosen}


def family_of(config: DecoderConfig) -> Family:
    """The architecture that a decoder is; a UserError names what has no home, and the nearest one."""
    found = [(family.mismatches(config), family) for family in FAMILIES]
    wrong, nearest = min(found, key=lambda pair: sum(mismatch.weight for mismatch in pair[0]))
    if not wrong:
        return nearest
    has = ", ".join(f"{_key(key)}={_text(value)}" for key, value, _ in wrong)
    needs = ", ".join(f"{_key(key)}={needed}" for key, _, needed in wrong)
    position = options_of(config)["position"]
    together = "" if any(key == "position" for key, _, _ in wrong) else f"model/position={position} with "
    raise UserError(
        f"{together}{has}: no Hugging Face architecture is such a model; the nearest is {nearest.name}, "
        f"which has {needs}"
    )


def rounding_there(config: DecoderConfig) -> str | None:
    """Why `transformers` computes other logits of the same weights; None where it does not."""
    if family_of(config).model_type == "falcon" and config.position.has_slopes:
        return "transformers rounds Falcon's ALiBi to bf16 (modeling_falcon.py, build_alibi_tensor)"
    return None


def _key(choice: str) -> str:
    """As on the command line: a position is an option of a group."""
    return "model/position" if choice == "position" else f"model.{choice}"


def _alternatives(pattern: str) -> Iterator[str]:
    before, brace, rest = pattern.partition("{")
    words, _, after = rest.partition("}")
    yield from (f"{before}{word}{after}" for word in words.split(",")) if brace else [pattern]


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


CHOICES = ("norm", "embedding_norm", "qk_norm", "residual", "bias", "feed_forward")

_LLAMA: dict[str, tuple[Any, ...]] = {
    "position": ("rope",),
    "norm": ("rmsnorm",),
    "embedding_norm": (False,),
    "qk_norm": (False,),
    "residual": ("sequential",),
    "bias": ("none", "all"),
    "feed_forward": ("swiglu", "geglu"),
}
_FALCON: dict[str, tuple[Any, ...]] = {
    "position": ("rope", "alibi"),
    "position.scaled": (True,),
    "norm": ("layernorm",),
    "embedding_norm": (False,),
    "qk_norm": (False,),
    "residual": ("sequential", "parallel_one_norm"),
    "bias": ("none", "all"),
    "feed_forward": ("gelu", "gelu_tanh", "relu_squared"),
}
_MPT: dict[str, tuple[Any, ...]] = {
    "position": ("alibi",),
    "position.scaled": (False,),
    "norm": ("layernorm_no_bias",),
    "embedding_norm": (False,),
    "qk_norm": (False,),
    "residual": ("sequential",),
    "bias": ("none",),
    "feed_forward": ("gelu",),
}
_BLOOM = _MPT | {
    "norm": ("layernorm",),
    "embedding_norm": (True,),
    "bias": ("all",),
    "feed_forward": ("gelu_tanh",),
}

_MHA_ONLY: tuple[Limit, ...] = (heads_fill_the_width, as_many_kv_heads, four_times_as_wide)
_ONE_NORM = {"residual": ("parallel_one_norm",)}
_TWO_NORMS = {"residual": ("parallel",)}

FAMILIES = (
    Family("Llama", "llama", LLAMA_NAMES, _LLAMA, (heads_divide_the_width,)),
    Family("Qwen2", "qwen2", LLAMA_NAMES, _LLAMA | {"bias": ("qkv",)}, ()),
    Family("Qwen3", "qwen3", LLAMA_NAMES, _LLAMA | {"qk_norm": (True,), "bias": ("none",)}, ()),
    Family("Falcon", "falcon", FALCON_NAMES, _FALCON, (heads_fill_the_width, one_or_all_kv_heads), True),
    Family("Falcon 40B", "falcon", FALCON_40B_NAMES, _FALCON | _TWO_NORMS, (heads_fill_the_width,), True),
    Family("Falcon 11B", "falcon", FALCON_NAMES, _FALCON | _ONE_NORM, (heads_fill_the_width,), True),
    Family("MPT", "mpt", MPT_NAMES, _MPT, _MHA_ONLY),
    Family("BLOOM", "bloom", BLOOM_NAMES, _BLOOM, _MHA_ONLY, True),
)
