"""How the model knows where a token stands: one part with three hooks, each an identity by default.

    embed(x, position_ids)          on the embedded tokens     Learned
    rotate(q, k, turns)             on queries and keys        Rope; turns(position_ids, dtype) once a forward
    slopes(device)                  on the scores              Alibi

Letters: B rows, T positions, H query heads, K key/value heads, D head dim.
Tables are plain attributes, not buffers: a cast of the model to bf16 must not touch them.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import PositiveFloat, PositiveInt, ValidationInfo, field_validator
from torch import Tensor, nn

from llmtrain.config import Config, choice
from llmtrain.model.layers import Embedding, full_precision


class Position(nn.Module):
    """No notion of position beyond causality (Haviv et al. 2022); the identity that the others refine."""

    def embed(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """[B, T, d_model] -> the same; `position_ids` int [B or 1, T]."""
        return x

    def turns(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor | None:
        """What `rotate` needs of the positions, made once a forward pass; `dtype` is that of q and k."""
        return None

    def rotate(self, q: Tensor, k: Tensor, turns: Tensor | None) -> tuple[Tensor, Tensor]:
        """q [B, T, H, D] and k [B, T, K, D] -> the same."""
        return q, k

    def slopes(self, device: torch.device) -> Tensor | None:
        """[H] fp32: what each position of distance takes from a score. The same tensor at every call."""
        return None


class Rope(Position):
    """Rotary positions (Su et al. 2021): pair i of position p turns by p * theta^(-2i / D), or as scaled.

    A pair is dimensions i and i + D / 2 (layout half: Llama as Hugging Face stores it), or 2i and 2i + 1
    (interleaved: Llama as Meta stores it, GPT-J). Angles and rotation are in fp32 (float64 for float64).
    """

    def __init__(
        self, head_dim: int, theta: float, interleaved: bool = False, scaling: RopeScaling | None = None
    ) -> None:
        super().__init__()
        self.head_dim, self.theta, self.scaling = head_dim, theta, scaling
        self._turn = _turn_interleaved if interleaved else _turn_half
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def turns(self, position_ids: Tensor, dtype: torch.dtype) -> Tensor:
        """cos, then sin, of each position's D / 2 angles: [B or 1, T, 1, D], fp32 or better."""
        dtype = torch.promote_types(dtype, torch.float32)
        return self._table(position_ids.shape[-1], position_ids.device, dtype)[position_ids][:, :, None]

    def rotate(self, q: Tensor, k: Tensor, turns: Tensor | None) -> tuple[Tensor, Tensor]:
        """q [B, T, H, D] and k [B, T, K, D], each turned by its position."""
        assert turns is not None
        cos, sin = turns.chunk(2, dim=-1)
        return self._turn(q, cos, sin), self._turn(k, cos, sin)

    def _table(self, length: int, device: torch.device, dtype: torch.dtype) -> Tensor:
        """[>= length, D]: cos, then sin, of the D / 2 angles of each position. Made once, longer when needed.

        On the CPU, step by step as transformers does it: other roundings differ by 1e-4 at position 2000.
        """
        table = self._tables.get((device, dtype))
        if table is None or len(table) < length:
            pairs = torch.arange(0, self.head_dim, 2, dtype=dtype, device="cpu")
            frequencies = 1.0 / self.theta ** (pairs / self.head_dim)
            if self.scaling is not None:
                frequencies = self.scaling.scaled(frequencies)
            angles = torch.arange(length, dtype=dtype, device="cpu")[:, None] * frequencies
            table = torch.cat([angles.cos(), angles.sin()], dim=-1).to(device)
            self._tables[device, dtype] = table
        return table


def _turn_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = full_precision(x).chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)


def _turn_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = full_precision(x).unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return turned.flatten(-2).to(x.dtype)


class Alibi(Position):
    """Attention with linear biases (Press et al. 2022): a score falls by slope * distance."""

    def __init__(self, n_heads: int, divisor: float = 1.0) -> None:
        super().__init__()
        self.n_heads, self.divisor = n_heads, divisor
        self._slopes: dict[torch.device, Tensor] = {}

    def slopes(self, device: torch.device) -> Tensor:
        """[H] fp32, the same tensor at every call."""
        if device not in self._slopes:
            slopes = [slope / self.divisor for slope in alibi_slopes(self.n_heads)]
            self._slopes[device] = torch.tensor(slopes, dtype=torch.float32, device=device)
        return self._slopes[device]


def alibi_slopes(n_heads: int) -> list[float]:
    """2^(-8i / n) for head i = 1..n where n is a power of two. Else the slopes of the power of two below n,
    then every other one of the next power's, from its first: the rule of the authors' code and of BLOOM.
    """
    below = 2 ** math.floor(math.log2(n_heads))
    slopes = [2 ** (-8 * i / below) for i in range(1, below + 1)]
    return slopes + [2 ** (-4 * i / below) for i in range(1, 2 * (n_heads - below), 2)]


class Learned(Position):
    """A learned vector for each position below `seq_len`, added to the token's (GPT-2)."""

    def __init__(self, seq_len: int, d_model: int) -> None:
        super().__init__()
        self.seq_len = seq_len
        self.embedding = Embedding(seq_len, d_model)

    def embed(self, x: Tensor, position_ids: Tensor) -> Tensor:
        """[B, T, d_model] -> the same. More than `seq_len` positions are a ValueError: there is no vector."""
        if x.shape[1] > self.seq_len:
            raise ValueError(
                f"{x.shape[1]} positions, but model.position=learned has a table of seq_len={self.seq_len}"
            )
        return x + self.embedding(position_ids)


class RopeScaling(Config):
    """How RoPE's frequencies are stretched for contexts longer than those trained on."""

    def scaled(self, frequencies: Tensor) -> Tensor:
        """[D / 2] radians a position -> the same."""
        raise NotImplementedError


class LinearScaling(RopeScaling):
    """Every frequency over `factor` (Chen et al. 2023)."""

    kind: Literal["linear"]
    factor: PositiveFloat
    """How much longer the context becomes."""

    def scaled(self, frequencies: Tensor) -> Tensor:
        """See RopeScaling."""
        return frequencies / self.factor


class Llama3Scaling(RopeScaling):
    """Slow frequencies over `factor`, fast ones as they are, those between blended (Llama 3.1)."""

    kind: Literal["llama3"]
    factor: PositiveFloat
    """How much longer the context becomes."""
    low_freq_factor: PositiveFloat
    """A frequency is slow if it turns less often than this in `original_seq_len`."""
    high_freq_factor: PositiveFloat
    """A frequency is fast if it turns more often than this in `original_seq_len`."""
    original_seq_len: PositiveInt
    """Positions of the context before."""

    @field_validator("high_freq_factor")
    @classmethod
    def _is_faster(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("low_freq_factor", 0):
            raise ValueError(f"must be above low_freq_factor={info.data['low_freq_factor']}")
        return value

    def scaled(self, frequencies: Tensor) -> Tensor:
        """See RopeScaling."""
        turns = self.original_seq_len * frequencies / (2 * math.pi)
        share = (turns - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor)
        share = share.clamp(0, 1)
        return (1 - share) * frequencies / self.factor + share * frequencies


class PositionConfig(Config):
    """What `model.position` may hold; a part of one's own is a subclass, chosen by its `_target_`."""

    has_slopes: ClassVar[bool] = False
    """Whether the part has `slopes`, which not every attention kernel can use."""

    def check(self, head_dim: int) -> None:
        """Raises ValueError where this part cannot work with such heads. Every head will do by default."""

    def build(self, *, d_model: int, n_heads: int, head_dim: int, seq_len: int) -> Position:
        """The part, its parameters not yet drawn."""
        raise NotImplementedError


class RopeConfig(PositionConfig):
    """Rotary positions."""

    kind: Literal["rope"]
    theta: PositiveFloat
    """Base of the wavelengths, in positions: the slowest pair turns once in about 2 pi theta."""
    layout: Literal["half", "interleaved"]
    """Which dimensions turn together: i with i + D / 2, or 2i with 2i + 1."""
    scaling: choice(RopeScaling, LinearScaling, Llama3Scaling) | None  # type: ignore[valid-type]
    """How frequencies are stretched for a longer context; null leaves them."""

    def check(self, head_dim: int) -> None:
        """RoPE turns pairs of dimensions."""
        if head_dim % 2:
            raise ValueError(f"rope turns pairs of dimensions, head_dim={head_dim} is odd: make it even")

    def build(self, *, d_model: int, n_heads: int, head_dim: int, seq_len: int) -> Position:
        """A Rope for this head dim."""
        return Rope(head_dim, self.theta, self.layout == "interleaved", self.scaling)


class AlibiConfig(PositionConfig):
    """Linear biases by distance."""

    has_slopes: ClassVar[bool] = True
    kind: Literal["alibi"]
    scaled: bool
    """Whether slopes are divided by sqrt(head_dim), as if added before the scores are scaled (Falcon)."""

    def build(self, *, d_model: int, n_heads: int, head_dim: int, seq_len: int) -> Position:
        """An Alibi for this number of heads."""
        return Alibi(n_heads, math.sqrt(head_dim) if self.scaled else 1.0)


class LearnedConfig(PositionConfig):
    """A learned vector a position."""

    kind: Literal["learned"]

    def build(self, *, d_model: int, n_heads: int, head_dim: int, seq_len: int) -> Position:
        """A Learned with a table of `seq_len` vectors."""
        return Learned(seq_len, d_model)


class NoPositionConfig(PositionConfig):
    """Nothing but the causal mask."""

    kind: Literal["none"]

    def build(self, *, d_model: int, n_heads: int, head_dim: int, seq_len: int) -> Position:
        """The identity."""
        return Position()
