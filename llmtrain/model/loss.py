"""From the last hidden states to the loss: the head and its cross entropy in one piece, chunk by chunk.

The gradient of the logits is formed where they are: in the forward pass, in their own memory (as Liger's
fused linear cross entropy does, Hsu et al. 2024). The backward pass only scales. So no more logits exist than
those of a chunk, in the dtype of the matrix product, and none is computed twice.

Letters: B rows, T positions, N = B * T, V vocabulary, P >= V rows of its table, d width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from llmtrain.model.layers import compute_dtype, full_precision

IGNORED = -100
"""The label of a position that is not trained."""

CHUNK = 8192
"""Positions whose logits exist at once. Below 4096 the matrix products of a GPU become slow."""

Softmax = Callable[[Tensor, Tensor, int, float, bool], Tensor]
"""`softmax_` or its compiled twin."""


class Losses(NamedTuple):
    """Losses of a batch, fp32 or better."""

    total: Tensor
    """Scalar with a gradient: what is minimised, summed over all targets."""
    rows: Tensor
    """[B] without gradient: each row's NLLs in nats, summed over its targets; never with z-loss."""


def softmax_(logits: Tensor, labels: Tensor, vocab_size: int, z_loss: float, gradient: bool) -> Tensor:
    """log sum exp of the first `vocab_size` of logits [N, P], fp32 or better [N]; labels int64 [N].

    With `gradient` the logits become d(NLL + z_loss * lse^2) / d(logits), zero for padding and where the
    label is IGNORED; without, their content is lost. All along rows: one kernel when compiled.
    """
    scores = full_precision(logits)
    scores[:, vocab_size:] = -math.inf
    highest = scores.amax(dim=1, keepdim=True)
    weights = scores.sub_(highest).exp_()
    total = weights.sum(dim=1, keepdim=True)
    lse = highest + total.log()
    if gradient:
        target = torch.arange(logits.shape[1], device=logits.device) == labels[:, None]
        slopes = weights.mul_((1 + 2 * z_loss * lse) / total).add_(target, alpha=-1)
        logits.copy_(slopes.masked_fill_((labels == IGNORED)[:, None], 0))
    return lse.squeeze(1)


def head_losses(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    z_loss: float = 0.0,
    softmax: Softmax = softmax_,
    chunk: int = CHUNK,
) -> Losses:
    """Losses of hidden [B, T, d] under the head `weight` [P, d]; int labels [B, T], IGNORED where none.

    The total is the sum of NLL + z_loss * lse^2 over the targets (Chowdhery et al. 2022, section 5). A label
    that is no id below `vocab_size` is an IndexError on the CPU and a failed assertion of the device on CUDA.
    Nothing here waits for the device.
    """
    task = _Task(labels.flatten().long(), vocab_size, z_loss, softmax, chunk)
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total, losses = _HeadLosses.apply(hidden, weight, task)
    else:
        total, losses = _forward(hidden, weight, task)
    return Losses(total, losses.view(labels.shape).sum(dim=1))


class _Task(NamedTuple):
    """What `head_losses` is asked for, beside the two matrices; labels int64 [N]."""

    labels: Tensor
    vocab_size: int
    z_loss: float
    softmax: Softmax
    chunk: int


class _HeadLosses(torch.autograd.Function):
    """(total, NLLs [N]) of `head_losses`; only the total has a gradient.

    The gradients are computed and kept, not the weight: under ZeRO-3 that one is whole only in the forward
    pass.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, task: _Task) -> tuple[Tensor, Tensor]:
        dtype, of_hidden, of_weight = compute_dtype(hidden), None, None
        if ctx.needs_input_grad[0]:
            of_hidden = torch.empty(hidden.shape, dtype=dtype, device=hidden.device)
        if ctx.needs_input_grad[1]:
            summed_in = torch.promote_types(dtype, torch.float32)
            of_weight = torch.zeros(weight.shape, dtype=summed_in, device=weight.device)
        total, losses = _forward(hidden, weight, task, of_hidden, of_weight)
        ctx.save_for_backward(of_hidden, of_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        ctx.mark_non_differentiable(losses)
        return total, losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return *(_scaled(gradient, scale, dtype) for gradient, dtype in gradients), None


def _forward(
    hidden: Tensor,
    weight: Tensor,
    task: _Task,
    of_hidden: Tensor | None = None,
    of_weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(total, NLLs [N]); writes d(total) / d(hidden) and adds d(total) / d(weight) where they are given."""
    labels, vocab_size, z_loss, softmax, chunk = task
    dtype = compute_dtype(hidden)
    x, weight = hidden.detach().flatten(0, 1).to(dtype), weight.detach().to(dtype)
    gradient = of_hidden is not None or of_weight is not None
    lse, target = [], []
    with _without_autocast(x.device.type):  # it would cast a chunk's logits to fp32
        for span in _chunks(len(x), chunk):
            logits = x[span] @ weight.T
            target.append(_target(logits[:, :vocab_size], labels[span]))
            lse.append(softmax(logits, labels[span], vocab_size, z_loss, gradient))
            if of_hidden is not None:
                torch.mm(logits, weight, out=of_hidden.flatten(0, 1)[span])
            if of_weight is not None:
                _add_product(of_weight, logits.T, x[span])
            del logits  # or two chunks would be there while the next one is made
    normaliser = torch.cat(lse).masked_fill_(labels == IGNORED, 0)
    losses = normaliser - full_precision(torch.cat(target))
    return (losses + z_loss * normaliser.square()).sum(), losses


def _chunks(positions: int, longest: int) -> list[slice]:
    """As few spans of `positions` as can be, of one size but for the last."""
    size = -(-positions // -(-positions // longest))
    return [slice(start, start + size) for start in range(0, positions, size)]


def _target(logits: Tensor, labels: Tensor) -> Tensor:
    """[N]: the logit of each row's label, zero where there is none. It alone judges the labels."""
    return -F.nll_loss(logits, labels, ignore_index=IGNORED, reduction="none")


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b. CUDA adds a product of bf16 to a total of fp32 in one go (torch >= 2.10), a CPU not."""
    if total.dtype == a.dtype:
        torch.addmm(total, a, b, out=total)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.add_(a @ b)


def _scaled(gradient: Tensor | None, scale: Tensor, dtype: torch.dtype) -> Tensor | None:
    """gradient * scale, rounded once, to `dtype`.

    A scalar of fp32 would be rounded to bf16 beside a gradient of bf16; a vector of one is not.
    """
    if gradient is None:
        return None
    return torch.mul(gradient, scale[None], out=torch.empty_like(gradient, dtype=dtype))


def _without_autocast(kind: str) -> AbstractContextManager[Any]:
    available = torch.amp.is_autocast_available(kind)
    return torch.autocast(kind, enabled=False) if available else nullcontext()
