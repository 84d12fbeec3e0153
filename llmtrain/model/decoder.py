"""The decoder: embedding, pre-norm blocks of attention and feed-forward, final norm, head.

Letters: B rows, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property, partial
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from pydantic import PositiveFloat, PositiveInt, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from llmtrain.config import Config, choice
from llmtrain.model.attention import Attention, Context
from llmtrain.model.documents import Documents
from llmtrain.model.feed_forward import GATED, FeedForwardKind, build_feed_forward
from llmtrain.model.init import initialize_parameters
from llmtrain.model.kernels import AttentionConfig, Kernel, KernelConfig, Shape, Use
from llmtrain.model.layers import Embedding, compute_dtype
from llmtrain.model.loss import Losses, Softmax, head_losses, softmax_
from llmtrain.model.norm import NormKind, build_norm
from llmtrain.model.position import (
    AlibiConfig,
    LearnedConfig,
    NoPositionConfig,
    Position,
    PositionConfig,
    RopeConfig,
)

GRAPHS = 64
"""So many graphs a compiled block may have."""

VOCABULARY_MULTIPLE = 128
"""Rows of the vocabulary's tables are padded to this: matrix products want round sizes."""


class DecoderConfig(Config):
    """Shape and parts of a decoder; what the data decides (vocabulary, seq_len) comes when it is built."""

    d_model: PositiveInt
    """Width of the residual stream."""
    n_layers: PositiveInt
    """Blocks."""
    n_heads: PositiveInt
    """Query heads."""
    n_kv_heads: PositiveInt
    """Key/value heads: n_heads is MHA, 1 is MQA, a divisor between is GQA."""
    head_dim: PositiveInt | None
    """Width of a head; null is d_model / n_heads."""
    d_ff: PositiveInt
    """Inner width of the feed-forward part; null: about 8 d_model^2 weights, however many matrices it has."""
    norm: NormKind
    """Normalisation before each part and before the head."""
    norm_eps: PositiveFloat
    """Added to the variance (LayerNorm) or to the mean square (RMSNorm)."""
    embedding_norm: bool
    """Whether the embedded tokens are normalised before the first block (BLOOM)."""
    qk_norm: bool
    """Whether each head of q and k goes through an RMSNorm (Qwen3): larger learning rates stay stable."""
    residual: Literal["sequential", "parallel", "parallel_one_norm"]
    """Attention, then feed-forward; or side by side, with a norm each (Falcon 40B) or one (Falcon 7B)."""
    bias: Literal["none", "qkv", "all"]
    """Which of the blocks' matrices have a bias: Qwen2 has qkv, BLOOM all."""
    feed_forward: FeedForwardKind
    """swiglu and geglu have three matrices d_model x d_ff, the others two."""
    tie_embeddings: bool
    """Whether the head is the embedding's table or one of its own."""
    position: choice(PositionConfig, RopeConfig, AlibiConfig, LearnedConfig, NoPositionConfig)  # type: ignore[valid-type]
    """How the model knows where a token stands."""
    attention: choice(KernelConfig, AttentionConfig)  # type: ignore[valid-type]
    """How attention is computed."""

    @model_validator(mode="before")
    @classmethod
    def _widens_the_feed_forward(cls, value: Any) -> Any:
        """4 d_model with two matrices; 8/3 d_model with three (Shazeer 2020), rounded up to 256."""
        if not isinstance(value, Mapping) or value.get("d_ff", 0) is not None:
            return value
        width, gated = value.get("d_model"), value.get("feed_forward") in GATED
        if not isinstance(width, int):
            return value
        return {**value, "d_ff": -(-8 * width // 768) * 256 if gated else 4 * width}

    @field_validator("n_kv_heads")
    @classmethod
    def _divides_the_heads(cls, value: int, info: ValidationInfo) -> int:
        heads = info.data.get("n_heads", value)
        if heads % value:
            divisors = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(f"must divide n_heads={heads}: one of {divisors}")
        return value

    @field_validator("head_dim")
    @classmethod
    def _has_a_width(cls, value: int | None, info: ValidationInfo) -> int | None:
        heads = info.data.get("n_heads", 1)
        width = info.data.get("d_model", heads)
        if value is None and width % heads:
            raise ValueError(f"n_heads={heads} does not divide d_model={width}: change one, or set head_dim")
        return value

    @field_validator("position")
    @classmethod
    def _works_with_such_heads(cls, value: PositionConfig, info: ValidationInfo) -> PositionConfig:
        if {"d_model", "n_heads", "head_dim"} <= info.data.keys():
            value.check(info.data["head_dim"] or info.data["d_model"] // info.data["n_heads"])
        return value

    @property
    def d_head(self) -> int:
        """Width of a head."""
        return self.head_dim or self.d_model // self.n_heads

    def assemble(self, *, vocab_size: int, seq_len: int, use: Use | None = None) -> Decoder:
        """The decoder with its weights not yet drawn: `initialize_parameters` or a state dict comes next.

        Its kernel is chosen for the `use`; without one it is one that works everywhere.
        """
        return Decoder(self, self.kernel(use), vocab_size=vocab_size, seq_len=seq_len)

    def kernel(self, use: Use | None = None) -> Kernel:
        """The attention kernel for such a use; UserError where the one that is asked for cannot be had."""
        return self.attention.kernel(Shape(self.d_head, self.position.has_slopes), use)

    def build(self, *, vocab_size: int, seq_len: int, seed: int) -> Decoder:
        """The decoder with its initial weights, a pure function of this config, the sizes and the seed."""
        decoder = self.assemble(vocab_size=vocab_size, seq_len=seq_len)
        initialize_parameters(decoder, seed)
        return decoder


class Decoder(nn.Module):
    """Token ids to logits, or to a loss a row.

    The tables of the vocabulary are padded to a multiple of 128 rows inside; no logit of padding is seen.
    """

    def __init__(self, config: DecoderConfig, kernel: Kernel, *, vocab_size: int, seq_len: int) -> None:
        super().__init__()
        self.config, self.kernel = config, kernel
        self.vocab_size, self.seq_len, self.n_layers = vocab_size, seq_len, config.n_layers
        self.activation_checkpointing = False
        """Whether the backward pass computes a block's activations again instead of keeping them."""
        self.z_loss = 0.0
        """What a target's squared log normaliser costs in the total loss; 0 is nothing."""
        self._softmax: Softmax = softmax_

        self.embedding = Embedding(padded(vocab_size), config.d_model)
        self.position: Position = config.position.build(
            d_model=config.d_model, n_heads=config.n_heads, head_dim=config.d_head, seq_len=seq_len
        )
        self.embedding_norm = build_norm(
            config.norm if config.embedding_norm else "none", config.d_model, config.norm_eps
        )
        self.blocks = nn.ModuleList(Block(config, self.position, kernel) for _ in range(config.n_layers))
        self.final_norm = build_norm(config.norm, config.d_model, config.norm_eps)
        self.head = None if config.tie_embeddings else Embedding(padded(vocab_size), config.d_model)

    @overload
    def forward(
        self,
        input_ids: Tensor,
        labels: None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Losses: ...

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | Losses:
        """Logits [B, T, V]; with labels the Losses.

        `input_ids`, `labels`, `position_ids` int [B, T]. Labels are the tokens to predict at each position
        (nothing is shifted here), -100 where none is. Positions count from 0 if not given. `cu_seqlens`
        keeps documents apart, see Documents; without it each row is one.
        """
        rows, length = input_ids.shape
        if position_ids is None:
            position_ids = torch.arange(length, device=input_ids.device)[None]
        documents = Documents(rows, length, cu_seqlens, input_ids.device)
        x = self.embedding_norm(self.position.embed(self.embedding(input_ids), position_ids))
        dtype = compute_dtype(x)
        slopes = self.position.slopes(x.device)
        context = Context(
            self.position.turns(position_ids, dtype), self.kernel.prepare(documents, slopes, dtype)
        )
        for block in self.blocks:
            x = self._through(block, x, context)
        head = self.embedding if self.head is None else self.head
        x = self.final_norm(x)
        if labels is None:
            return head(x, F.linear)[..., : self.vocab_size]
        softmax = self._softmax if torch.is_grad_enabled() else softmax_
        loss = partial(head_losses, vocab_size=self.vocab_size, z_loss=self.z_loss, softmax=softmax)
        return head(x, partial(loss, labels=labels))

    def compile_blocks(self, backend: str = "inductor") -> None:
        """Compile the blocks and the softmax of the loss, at their first call; names of parameters stay.

        Equal blocks share one graph, bound to the shapes of a batch. So only what is called with gradients
        runs compiled: evaluation and sampling come in many shapes.
        """
        # The default, 8, is soon used up by kernels whose documents come in rounded numbers: an error.
        torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
        compute = torch.compile(Block.compute, fullgraph=True, dynamic=False, backend=backend)
        for block in self.blocks:
            assert isinstance(block, Block)
            block.in_training = compute
        self._softmax = torch.compile(softmax_, backend=backend)

    def _through(self, block: nn.Module, x: Tensor, context: Context) -> Tensor:
        if not (self.activation_checkpointing and torch.is_grad_enabled()):
            return block(x, context)
        # Nothing in a block is random, so there is no generator's state to keep.
        return checkpoint(block, x, context, use_reentrant=False, preserve_rng_state=False)

    @cached_property
    def parameter_count(self) -> int:
        """Parameters, a tied head counted once and padding not at all.

        Counted on a twin without memory: where ranks hold parts, the parameters here are only this rank's.
        """
        with torch.device("meta"):
            twin = Decoder(self.config, self.kernel, vocab_size=self.vocab_size, seq_len=self.seq_len)
        tables = 1 if self.config.tie_embeddings else 2
        padding = tables * (padded(self.vocab_size) - self.vocab_size) * self.config.d_model
        return sum(parameter.numel() for parameter in twin.parameters()) - padding

    def flops_per_token(self, seq_len: int) -> int:
        """Floating point operations to train a token: 6 N + 12 L d S, causal attention counted in full.

        N is `parameter_count`, d the width of all query heads. Recomputation does not count.
        """
        config = self.config
        return 6 * self.parameter_count + 12 * config.n_layers * config.n_heads * config.d_head * seq_len


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed_forward(norm(x)); or both added to the same x."""

    def __init__(self, config: DecoderConfig, position: Position, kernel: Kernel) -> None:
        super().__init__()
        self.parallel = config.residual != "sequential"
        self.in_training: Callable[[Block, Tensor, Context], Tensor] = Block.compute
        """`compute`, or its compiled twin."""
        self.attention_norm = build_norm(config.norm, config.d_model, config.norm_eps)
        self.attention = Attention(
            config.d_model,
            config.n_heads,
            config.n_kv_heads,
            config.d_head,
            position=position,
            kernel=kernel,
            qkv_bias=config.bias != "none",
            out_bias=config.bias == "all",
            qk_norm_eps=config.norm_eps if config.qk_norm else None,
        )
        self.feed_forward_norm = None
        if config.residual != "parallel_one_norm":
            self.feed_forward_norm = build_norm(config.norm, config.d_model, config.norm_eps)
        self.feed_forward = build_feed_forward(
            config.feed_forward, config.d_model, config.d_ff, config.bias == "all"
        )

    def forward(self, x: Tensor, context: Context) -> Tensor:
        """[B, T, d_model] -> the same.

        What is compiled lies below this call, so that hooks on a block, ZeRO-3's among them, stay outside.
        """
        compute = self.in_training if torch.is_grad_enabled() else Block.compute
        return compute(self, x, context)

    def compute(self, x: Tensor, context: Context) -> Tensor:
        """The block itself."""
        normed = self.attention_norm(x)
        attended = x + self.attention(normed, context)
        if self.feed_forward_norm is not None:
            normed = self.feed_forward_norm(x if self.parallel else attended)
        return attended + self.feed_forward(normed)


def padded(vocab_size: int) -> int:
    """Rows that a vocabulary's table holds."""
    return -(-vocab_size // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE
