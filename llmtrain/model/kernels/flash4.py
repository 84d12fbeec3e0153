"""flash-attn 4: CuTe kernels for Hopper and Blackwell; documents by their starts, no ALiBi.

The package offers an autograd.Function that compiles kernels when it is called, which torch.compile cannot
look into. Here its two passes are operators, so that a compiled block stays one graph.
"""

from __future__ import annotations

from typing import Any

import torch
from flash_attn.cute.interface import _flash_attn_bwd, _flash_attn_fwd
from torch import Tensor

from llmtrain.model.documents import Documents
from llmtrain.model.kernels.base import Kernel


@torch.library.custom_op("llmtrain::flash4", mutates_args=())
def forward(
    q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, longest: int | None
) -> tuple[Tensor, Tensor]:
    """Causal attention and its log-sum-exp, which the backward pass needs.

    [B, T, H, D] and [B, H, T] without `starts`; with them [tokens, H, D] and [H, tokens].
    """
    out, lse, *_ = _flash_attn_fwd(
        q,
        k,
        v,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        causal=True,
        return_lse=True,
    )
    return out, lse


@forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None, longest: int | None) -> tuple[Tensor, Tensor]:
    heads_first = q.transpose(-3, -2).shape[:-1]
    return q.new_empty(q.shape), q.new_empty(heads_first, dtype=torch.float32)


@torch.library.custom_op("llmtrain::flash4_backward", mutates_args=())
def backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    longest: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v."""
    dq, dk, dv = _flash_attn_bwd(
        q,
        k,
        v,
        out,
        grad,
        lse,
        causal=True,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
    )
    return dq, dk, dv


@backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    longest: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, starts, ctx.longest = inputs
    ctx.save_for_backward(q, k, v, *output, starts)


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, out, lse, starts = ctx.saved_tensors
    return *backward(grad, q, k, v, out, lse, starts, ctx.longest), None, None


forward.register_autograd(_gradients, setup_context=_keep)


def prepare(documents: Documents, slopes: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The starts of the documents; None where each row is one."""
    assert slopes is None, "flash-attn 4 has no ALiBi"
    return None if documents.one_per_row else documents.starts


def attend(q: Tensor, k: Tensor, v: Tensor, starts: Tensor | None) -> Tensor:
    """Fused attention, bf16 or fp16. The longest document is given as T: a bound that never varies."""
    if starts is None:
        return forward(q, k, v, None, None)[0]
    rows, length = q.shape[:2]
    q, k, v = (heads.flatten(0, 1) for heads in (q, k, v))
    return forward(q, k, v, starts, length)[0].unflatten(0, (rows, length))


KERNEL = Kernel("flash4", prepare, attend)
