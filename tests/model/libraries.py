"""What flash-attn 2, flash-attn 4 and the operators below torch's varlen_attn compute, in plain torch.

What they promise: softmax(q k^T / sqrt(D) + bias) v for each sequence, cu_seqlens int32, no sequence longer
than max_seqlen, empty ones allowed, grouped heads. They stand in for the libraries on a CPU, so that what our
kernels hand over is tested everywhere; the libraries themselves are tested where there is a GPU.
"""

from __future__ import annotations

import itertools
import sys
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.attention import varlen


def sequence(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None) -> tuple[Tensor, Tensor]:
    """Causal attention [T, H, D] of one sequence, and log-sum-exp [H, T]."""
    k, v = (heads.repeat_interleave(q.shape[1] // heads.shape[1], 1) for heads in (k, v))
    positions = torch.arange(len(q))
    scores = torch.einsum("ihd,jhd->hij", q, k) * q.shape[-1] ** -0.5
    if slopes is not None:
        assert slopes.dtype == torch.float32
        scores = scores - slopes[:, None, None] * (positions[:, None] - positions).abs()
    scores = scores.masked_fill(positions[:, None] < positions, float("-inf"))
    return torch.einsum("hij,jhd->ihd", scores.softmax(-1), v), scores.logsumexp(-1)


def sequences(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor, longest: int, slopes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """`sequence` of each that `starts` cuts out of [tokens, H, D]."""
    assert starts.dtype == torch.int32
    bounds = starts.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(q)
    parts = []
    for a, b in itertools.pairwise(bounds):
        assert 0 <= b - a <= longest
        if a < b:
            parts.append(sequence(q[a:b], k[a:b], v[a:b], slopes))
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts], dim=1)


def rows(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`sequence` of each row of [B, T, H, D]."""
    parts = [sequence(*row, slopes) for row in zip(q, k, v, strict=True)]
    return torch.stack([out for out, _ in parts]), torch.stack([lse for _, lse in parts])


def stand_in(patch: pytest.MonkeyPatch, backend: str) -> None:
    """Let `backend` find its library, or take the place of the one that is here."""
    if backend == "varlen":
        return varlen_on_a_cpu()
    kernel, module = f"llmtrain.model.kernels.{backend}", MODULES[backend]
    try:
        real = import_module(kernel)
        for name, value in module.content.items():
            patch.setattr(real, name, value)
    except ImportError:
        for part in ("flash_attn", "flash_attn.cute", "flash_attn.cute.interface"):
            patch.setitem(sys.modules, part, ModuleType(part))
        vars(sys.modules[module.name]).update(module.content)
        patch.setitem(sys.modules, kernel, ModuleType(kernel))
        del sys.modules[kernel]  # so it is imported anew, and forgotten when the test ends


@cache
def varlen_on_a_cpu() -> None:
    """torch's own varlen_attn, its gradient and its shapes for torch.compile, over operators for a CPU."""
    varlen._varlen_attn.register_kernel("cpu")(_varlen)
    varlen._varlen_attn_backward.register_kernel("cpu")(_varlen_backward)


def _varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    is_causal: bool,
    scale: float | None,
    window_size: list[int] | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    assert (is_causal, window_size, scale) == (True, [-1, 0], None)
    assert max_q == max_k
    assert cu_seq_k is not None
    assert torch.equal(cu_seq_q, cu_seq_k)
    return *sequences(query, key, value, cu_seq_q, max_q), torch.zeros(2, dtype=torch.uint64)


def _varlen_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, starts: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _flash4_backward(
        q, k, v, out, grad, lse, causal=True, cu_seqlens_q=starts, cu_seqlens_k=starts,
        max_seqlen_q=None, max_seqlen_k=None,
    )  # fmt: skip


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, alibi_slopes: Tensor | None) -> Tensor:
    assert causal
    return rows(q, k, v, alibi_slopes)[0]


def _flash_varlen(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    alibi_slopes: Tensor | None,
) -> Tensor:
    assert causal
    assert max_seqlen_q == max_seqlen_k
    assert torch.equal(cu_seqlens_q, cu_seqlens_k)
    return sequences(q, k, v, cu_seqlens_q, max_seqlen_q, alibi_slopes)[0]


def _flash4_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    return_lse: bool,
) -> tuple[Tensor, Tensor, None, None, None]:
    assert causal
    assert return_lse
    if cu_seqlens_q is None or max_seqlen_q is None:
        return *rows(q, k, v), None, None, None
    return *sequences(q, k, v, cu_seqlens_q, max_seqlen_q), None, None, None


def _flash4_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    cu_seqlens_q: Tensor | None,
    cu_seqlens_k: Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """From the saved log-sum-exp, as the kernel does it (Dao 2022, algorithm 4)."""
    bounds = [] if cu_seqlens_q is None else cu_seqlens_q.tolist()
    if not bounds:
        parts = [_gradients(*row) for row in zip(q, k, v, out, dout, lse, strict=True)]
        dq, dk, dv = (torch.stack(gradients) for gradients in zip(*parts, strict=True))
        return dq, dk, dv
    parts = [
        _gradients(q[a:b], k[a:b], v[a:b], out[a:b], dout[a:b], lse[:, a:b])
        for a, b in itertools.pairwise(bounds)
    ]
    dq, dk, dv = (torch.cat(gradients) for gradients in zip(*parts, strict=True))
    return dq, dk, dv


def _gradients(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, grad: Tensor, lse: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    group, scale = q.shape[1] // k.shape[1], q.shape[-1] ** -0.5
    keys, values = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, keys) * scale
    hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    p = (scores - lse[:, :, None]).exp().masked_fill(hidden, 0)
    ds = p * (torch.einsum("ihd,jhd->hij", grad, values) - (grad * out).sum(-1).T[:, :, None]) * scale
    dk, dv = torch.einsum("hij,ihd->jhd", ds, q), torch.einsum("hij,ihd->jhd", p, grad)
    return (
        torch.einsum("hij,jhd->ihd", ds, keys),
        dk.unflatten(1, (-1, group)).sum(2),
        dv.unflatten(1, (-1, group)).sum(2),
    )


class Module(NamedTuple):
    """What a kernel imports, and from where."""

    name: str
    content: dict[str, Any]


MODULES = {
    "flash": Module("flash_attn", {"flash_attn_func": _flash, "flash_attn_varlen_func": _flash_varlen}),
    "flash4": Module(
        "flash_attn.cute.interface",
        {"_flash_attn_fwd": _flash4_forward, "_flash_attn_bwd": _flash4_backward},
    ),
}
