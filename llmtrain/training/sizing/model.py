"""The sizes of a model that memory and time depend on, from its shape alone: nothing is allocated."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from llmtrain.model import Decoder, DecoderConfig
from llmtrain.model.decoder import padded
from llmtrain.model.kernels import eager
from llmtrain.optim.base import OptimizerConfig
from llmtrain.training.config import TrainConfig

TABLES = ("embedding.weight", "head.weight", "position.embedding.weight")


@dataclass(frozen=True)
class Group:
    """One of the optimizer's parameter groups: elements of each parameter, and states the optimizer keeps."""

    sizes: tuple[int, ...]
    states: int
    whole: bool
    """Whether ZeRO 1 and 2 keep states of whole parameters on every rank that has a part of one (Muon)."""


@dataclass(frozen=True)
class Model:
    """A decoder that is to be trained. Letters as in llmtrain/model: d, H, K, D, V; f is d_ff."""

    decoder: Decoder
    """On the meta device."""
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, config: TrainConfig, vocab_size: int) -> Model:
        """The model of a run, its vocabulary padded as the run pads it."""
        with torch.device("meta"):
            # Any kernel will do: it has no parameters, and `auto` would look for one and tell.
            decoder = Decoder(config.model, eager.KERNEL, vocab_size=vocab_size, seq_len=config.seq_len)
        return cls(decoder, optimizer_groups(decoder, config.optimizer))

    @property
    def config(self) -> DecoderConfig:
        """Its shape."""
        return self.decoder.config

    @cached_property
    def shapes(self) -> dict[str, torch.Size]:
        """Shapes of the parameters by name, the vocabulary's padding included."""
        return {name: parameter.shape for name, parameter in self.decoder.named_parameters()}

    @property
    def rows(self) -> int:
        """Rows of a table of the vocabulary."""
        return padded(self.decoder.vocab_size)

    @cached_property
    def elements(self) -> int:
        """Elements of all parameters, padding included: what is stored."""
        return sum(sum(group.sizes) for group in self.groups)

    @cached_property
    def largest(self) -> int:
        """Elements of the largest parameter."""
        return max(size for group in self.groups for size in group.sizes)

    @property
    def parameters(self) -> int:
        """Parameters, padding not counted."""
        return self.decoder.parameter_count

    @cached_property
    def embedding_parameters(self) -> int:
        """Of those, the ones in tables that are looked up or make logits."""
        vocabulary = self.decoder.vocab_size
        tables = {name: shape for name, shape in self.shapes.items() if name in TABLES}
        return sum(
            (shape[0] if name.startswith("position") else vocabulary) * shape[1]
            for name, shape in tables.items()
        )

    @cached_property
    def block_elements(self) -> int:
        """Elements of one block."""
        return sum(shape.numel() for name, shape in self.shapes.items() if name.startswith("blocks.0."))

    @cached_property
    def block_matrices(self) -> int:
        """Elements of one block's matrices."""
        named = self.shapes.items()
        return sum(shape.numel() for name, shape in named if name.startswith("blocks.0.") and len(shape) > 1)

    @cached_property
    def multiplied(self) -> int:
        """Elements of the matrices that every token is multiplied with: the blocks' and the head's."""
        return self.config.n_layers * self.block_matrices + self.rows * self.config.d_model

    @property
    def heads_width(self) -> int:
        """H D, the width of all query heads."""
        return self.config.n_heads * self.config.d_head

    def flops_per_token(self, causal: bool) -> int:
        """To train a token: 6 N + 12 L H D S; with `causal` the masked half of attention is left out.

        A weight costs a multiplication and an addition forward and twice that backward (Kaplan et al. 2020,
        section 2.1); q k^T and the product with v each 2 S H D a layer forward, and twice that backward. N is
        `parameters`. Recomputation does not count.
        """
        dense = self.decoder.flops_per_token(self.decoder.seq_len)
        return dense - causal * 6 * self.config.n_layers * self.heads_width * self.decoder.seq_len


def optimizer_groups(decoder: Decoder, optimizer: OptimizerConfig) -> tuple[Group, ...]:
    """The groups that the optimizer would make of these parameters."""
    groups = optimizer.parameter_groups(decoder.named_parameters(), lambda parameter: parameter.dim())
    return tuple(_group(group, optimizer) for group in groups)


def _group(group: dict[str, Any], optimizer: OptimizerConfig) -> Group:
    parameters, whole = group["params"], group.get("use_muon", False)
    if whole:  # DeepSpeed's Muon puts the largest first
        parameters = sorted(parameters, key=lambda parameter: parameter.size(), reverse=True)
    sizes = tuple(parameter.numel() for parameter in parameters)
    return Group(sizes, optimizer.states(group.get("role", "matrices")), whole)
