"""A decoder written once more, in float64 and with loops: slow, plain, and independent of llmtrain's code."""

from __future__ import annotations

import cmath
import math

import torch
from torch import Tensor

from llmtrain.model import DecoderConfig


def logits(config: DecoderConfig, weights: dict[str, Tensor], ids: list[int], vocab_size: int) -> Tensor:
    """Logits float64 [T, V] of one document whose positions count from 0."""
    w = {name: value.double() for name, value in weights.items()}
    x = torch.stack([w["embedding.weight"][i] for i in ids])
    if config.position.kind == "learned":
        x = x + w["position.embedding.weight"][: len(ids)]
    if config.embedding_norm:
        x = _norm(config, w, "embedding_norm", x)
    for n in range(config.n_layers):
        block = {
            name.removeprefix(f"blocks.{n}."): v for name, v in w.items() if name.startswith(f"blocks.{n}.")
        }
        attended = _attention(config, block, _norm(config, block, "attention_norm", x))
        if config.residual == "sequential":
            x = x + attended
            x = x + _feed_forward(config, block, _norm(config, block, "feed_forward_norm", x))
        else:
            norm = "attention_norm" if config.residual == "parallel_one_norm" else "feed_forward_norm"
            x = x + attended + _feed_forward(config, block, _norm(config, block, norm, x))
    table = w["embedding.weight" if config.tie_embeddings else "head.weight"]
    return _norm(config, w, "final_norm", x) @ table[:vocab_size].T


def _norm(config: DecoderConfig, w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    if config.norm != "rmsnorm":
        x = x - x.mean(-1, keepdim=True)
    scaled = x / ((x * x).mean(-1, keepdim=True) + config.norm_eps).sqrt() * w[f"{name}.weight"]
    return scaled + w.get(f"{name}.bias", torch.zeros(1))


def _rms(config: DecoderConfig, x: Tensor, weight: Tensor) -> Tensor:
    return x / ((x * x).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weight


def _feed_forward(config: DecoderConfig, w: dict[str, Tensor], x: Tensor) -> Tensor:
    kind = config.feed_forward
    if kind in ("swiglu", "geglu"):
        both = _linear(w, "feed_forward.gate_up", x)
        gate, up = both[:, : config.d_ff], both[:, config.d_ff :]
        h = (gate / (1 + torch.exp(-gate)) if kind == "swiglu" else _gelu(gate)) * up
    else:
        h = _linear(w, "feed_forward.up", x)
        h = {"gelu": _gelu, "gelu_tanh": _gelu_tanh, "relu_squared": _relu_squared}[kind](h)
    return _linear(w, "feed_forward.down", h)


def _linear(w: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", torch.zeros(1))


def _gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def _gelu_tanh(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _relu_squared(x: Tensor) -> Tensor:
    return torch.where(x > 0, x * x, 0.0)


def _attention(config: DecoderConfig, w: dict[str, Tensor], x: Tensor) -> Tensor:
    n_heads, n_kv_heads = config.n_heads, config.n_kv_heads
    dim = config.head_dim or config.d_model // n_heads
    heads = _linear(w, "attention.qkv", x).view(len(x), n_heads + 2 * n_kv_heads, dim)
    out = torch.zeros(len(x), n_heads, dim, dtype=torch.float64)
    for h in range(n_heads):
        group = h // (n_heads // n_kv_heads)
        q, k, v = heads[:, h], heads[:, n_heads + group], heads[:, n_heads + n_kv_heads + group]
        if config.qk_norm:
            q, k = (
                _rms(config, q, w["attention.q_norm.weight"]),
                _rms(config, k, w["attention.k_norm.weight"]),
            )
        if config.position.kind == "rope":
            q, k = _rotated(q, config.position.theta), _rotated(k, config.position.theta)
        for i in range(len(x)):
            scores = [float(q[i] @ k[j]) / math.sqrt(dim) for j in range(i + 1)]
            if config.position.kind == "alibi":  # four heads: slopes 1/4, 1/16, 1/64, 1/256
                scores = [score - (i - j) * 0.25 ** (h + 1) for j, score in enumerate(scores)]
            for j, probability in enumerate(torch.tensor(scores, dtype=torch.float64).softmax(0)):
                out[i, h] += probability * v[j]
    return _linear(w, "attention.out", out.flatten(1))


def _rotated(x: Tensor, theta: float) -> Tensor:
    half = x.shape[1] // 2
    rows = []
    for position, row in enumerate(x.tolist()):
        turns = [cmath.exp(1j * position * theta ** (-2 * i / x.shape[1])) for i in range(half)]
        turned = [complex(row[i], row[i + half]) * turns[i] for i in range(half)]
        rows.append([z.real for z in turned] + [z.imag for z in turned])
    return torch.tensor(rows, dtype=torch.float64)
