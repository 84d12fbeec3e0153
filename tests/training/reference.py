"""A plain single-process torch loop: what every rank count and every ZeRO stage must reproduce."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from llmtrain.config.hydra import compose
from llmtrain.data.prepare import prepare
from llmtrain.model.init import initialize_parameters
from llmtrain.training.build import build_dataset
from llmtrain.training.config import TrainConfig


@dataclass(frozen=True)
class Curve:
    losses: list[float]
    grad_norms: list[float]


def reference_curve(overrides: Sequence[str], precision: str) -> Curve:
    """Losses and gradient norms of a run, in fp32 or in bf16 with fp32 masters and accumulation."""
    config = compose(TrainConfig, overrides)
    prepared = prepare(config.data, config.tokenizer, config.cache_dir)
    sources, _ = prepared.open()
    dataset = build_dataset(config, sources)
    model = config.model.assemble(vocab_size=prepared.tokenizer.vocab_size, seq_len=config.seq_len)
    initialize_parameters(model, config.seed)
    if precision == "bf16":
        model = model.bfloat16()
    weights = list(model.parameters())
    masters = [weight.detach().float().clone() for weight in weights]
    first = [torch.zeros_like(master) for master in masters]
    second = [torch.zeros_like(master) for master in masters]
    losses, norms = [], []
    for step in range(1, config.max_steps + 1):
        batch = dataset.rows(step, 0, config.global_batch_size)
        targets = int((batch.labels != -100).sum())
        total, gradients = 0.0, [torch.zeros_like(master) for master in masters]
        for part in batch.split(config.micro_batch_size):
            logits = model(part.input_ids, None, part.position_ids, part.cu_seqlens)
            loss = F.cross_entropy(
                logits.float().flatten(0, 1), part.labels.long().flatten(), reduction="sum"
            )
            (loss / targets).backward()
            total += loss.item()
            for gradient, weight in zip(gradients, weights, strict=True):
                gradient += weight.grad.float()
                weight.grad = None
        norm = math.sqrt(sum((gradient.double() ** 2).sum().item() for gradient in gradients))
        losses.append(total / targets)
        norms.append(norm)
        clip = min(1.0, config.optimizer.gradient_clipping / norm)
        lr = config.optimizer.lr * _factor(config, step)
        for weight, master, gradient, m, v in zip(weights, masters, gradients, first, second, strict=True):
            _adamw(config, master, gradient * clip, m, v, lr, step)
            weight.data.copy_(master)
    return Curve(losses, norms)


def _adamw(config, master, gradient, m, v, lr, step):
    """Loshchilov and Hutter 2019, algorithm 2."""
    o = config.optimizer
    if master.ndim >= 2:
        master.mul_(1 - lr * o.weight_decay)
    m.mul_(o.betas[0]).add_(gradient, alpha=1 - o.betas[0])
    v.mul_(o.betas[1]).addcmul_(gradient, gradient, value=1 - o.betas[1])
    m_hat, v_hat = m / (1 - o.betas[0] ** step), v / (1 - o.betas[1] ** step)
    master.sub_(lr * m_hat / (v_hat.sqrt() + o.eps))


def _factor(config, step):
    s = config.scheduler
    if step <= s.warmup_steps:
        return step / s.warmup_steps
    progress = (step - s.warmup_steps) / (config.max_steps - s.warmup_steps)
    return s.min_lr_ratio + (1 - s.min_lr_ratio) * (1 + math.cos(math.pi * progress)) / 2
