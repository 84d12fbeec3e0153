"""Time of a step on a GPU: matrix products, attention, memory traffic and communication, added up.

The terms are those of a time model that published runs were compared with: it came out at 0.92 to 0.95 for
codes that were tuned (llm.c 1558M, modded-nanogpt 124M, nanochat d26), and at 0.70 to 0.76 for frameworks
that were not. Rates were read on an H100 and are carried over to other devices as parts of what a large
matrix product and the memory reach there. Letters as in memory.py; S is seq_len.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from llmtrain.training.sizing.hardware import HardwareConfig
from llmtrain.training.sizing.memory import WIDTHS, Layout
from llmtrain.training.sizing.model import Model

TUNED = 0.93
"""A tuned run's part of what the model says, see above."""

H100_MATMUL = 798e12
"""FLOP/s of an 8192^3 product of random bf16 on an H100, to which the rates below were read."""

MATMUL_RATES = ((768, 600e12), (1024, 640e12), (2048, 690e12), (2560, 700e12), (4096, 715e12))
"""(d, FLOP/s) of a block's products: nanochat measured 726 at 65536 x 1664 x 6656, less where d is small."""

ATTENTION_RATES: dict[int, tuple[tuple[int, float], ...]] = {
    64: ((1024, 240e12), (2048, 290e12)),
    128: ((1024, 330e12), (2048, 390e12), (4096, 470e12), (8192, 520e12)),
}
"""{head dim: (S, FLOP/s)} of causal attention forward and backward, counting the causal half only: cuDNN 9
(cudnn-frontend's benchmark, and Shah et al. 2024, figure 5)."""

BANDWIDTH = 2.5 / 3.35
"""Part of the bandwidth that mixed elementwise kernels reach: copies 3.0 TB/s, RMSNorm's backward 1.7."""

LINK = 0.8
"""Part of a link's bandwidth that NCCL's large collectives reach: 360 of 450 GB/s on an HGX H100."""

HOST = 0.32
"""Part of the host link's bandwidth at which offload goes, the host's AdamW included: Llama 8B under ZeRO-3
with recomputation and offload ran at 141 TFLOP/s on 8 H200 (64 GB/s each), at 461 without (Bekman,
ml-engineering, insights/when-to-upgrade-gpus): 1.8 s a step for 36 bytes of 10^9 parameters a rank."""

ELEMENTWISE = (40, 58)
"""Bytes per element of d of a block moved forward and backward by norms, residuals, rotation, activation."""

HEAD_BYTES = 7
"""Bytes per logit moved by the softmax of a chunk and its gradient."""

ADAM_BYTES = 28
"""Bytes a parameter moved by AdamW: weight, two moments and the gradient read, the first three written."""


@dataclass(frozen=True)
class Traffic:
    """Bytes of memory moved a parameter: once a step, of it by AdamW, and with every micro-batch."""

    step: int
    micro: int


TRAFFIC = {"none": Traffic(54, 20), "bf16_optimizer": Traffic(78, 26), "zero": Traffic(94, 20)}
"""Without a wrapper: casts 6 + 8, norm 4, clipping 8, AdamW 28. Under BF16_Optimizer. Under the optimizers of
stages 1 to 3: bucket copy, division, overflow, norm in float64, flattening, cast, clipping, AdamW 28. A
micro-batch's part is the accumulation."""


@dataclass(frozen=True)
class Time:
    """Seconds of an optimizer step on every rank, by part."""

    matmul: float
    attention: float
    elementwise: float
    head: float
    optimizer: float
    communication: float
    offload: float
    tokens: int
    """Of the step on all ranks."""

    @property
    def step(self) -> float:
        """Seconds a step."""
        parts = (self.matmul, self.attention, self.elementwise, self.head, self.optimizer, self.communication)
        return (sum(parts) + self.offload) / TUNED

    @property
    def tokens_per_second(self) -> float:
        """On all ranks."""
        return self.tokens / self.step

    def as_dict(self) -> dict[str, float]:
        """For plan.json."""
        return {**vars(self), "step": self.step, "tokens_per_second": self.tokens_per_second}


def step_time(model: Model, layout: Layout, hardware: HardwareConfig) -> Time | None:
    """Seconds of a step; None where the rates are not known: hardware.unknown, or fp32.

    Matrix products take 6 FLOP a weight and token, attention 3.5 times its forward pass, 2 S H D a token and
    layer with the causal half only. Recomputation adds a third to the blocks' products, 1 / 3.5 to attention
    and their forward traffic once more.
    """
    if hardware.unknown or layout.precision == "fp32":
        return None
    assert hardware.matmul_flops and hardware.memory_gbps
    config, seq_len = model.config, model.decoder.seq_len
    again = 1 if layout.recompute else 0
    tokens = layout.rows * layout.accumulation * seq_len  # of a rank
    scale, bandwidth = hardware.matmul_flops / H100_MATMUL, hardware.memory_gbps * 1e9 * BANDWIDTH
    blocks = config.n_layers * model.block_matrices
    products = 6 * model.multiplied + 2 * blocks * again
    attended = (3.5 + again) * 2 * seq_len * model.heads_width * config.n_layers
    moved = (sum(ELEMENTWISE) + ELEMENTWISE[0] * again) * config.d_model * config.n_layers
    matmul = products / (between(MATMUL_RATES, config.d_model) * scale)
    return Time(
        matmul=tokens * matmul,
        attention=tokens * attended / (attention_rate(config.d_head, seq_len) * scale),
        elementwise=tokens * moved / bandwidth,
        head=tokens * HEAD_BYTES * model.rows / bandwidth,
        optimizer=optimizer_bytes(model, layout) / bandwidth,
        communication=communication(model, layout, hardware, hidden=tokens * matmul * 2 / 3),
        offload=offload(model, layout, hardware),
        tokens=tokens * layout.ranks,
    )


def between(points: Sequence[tuple[int, float]], x: int) -> float:
    """The straight line through the points at x; the first or last point's value outside."""
    at = bisect_left([point[0] for point in points], x)
    if at in (0, len(points)):
        return points[min(at, len(points) - 1)][1]
    (x0, y0), (x1, y1) = points[at - 1 : at + 1]
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def attention_rate(head_dim: int, seq_len: int) -> float:
    """FLOP/s of attention on an H100; head dims between 64 and 128 lie between."""
    rates = [(dim, between(points, seq_len)) for dim, points in ATTENTION_RATES.items()]
    return between(rates, head_dim)


def optimizer_bytes(model: Model, layout: Layout) -> int:
    """Bytes that a rank's memory moves for its gradients and its update.

    AdamW is partitioned from stage 1 on, the rest of the step from stage 2 on, accumulation never.
    """
    wrapper = "none" if layout.stage == 0 else "bf16_optimizer" if layout.bf16_optimizer else "zero"
    traffic, n = TRAFFIC[wrapper], layout.ranks
    adam = 0 if layout.offloads_optimizer else ADAM_BYTES // (n if layout.stage else 1)
    rest = (traffic.step - ADAM_BYTES) // (n if layout.stage > 1 else 1)
    return model.elements * (adam + rest + layout.accumulation * traffic.micro)


def communication(model: Model, layout: Layout, hardware: HardwareConfig, hidden: float) -> float:
    """Seconds of collectives that a step waits for; `hidden` is the backward pass they may hide behind.

    A ring moves (n - 1) / n of a buffer for a reduce-scatter or an all-gather, twice that for an all-reduce
    (Patarasuk and Yuan 2009). Per step: stage 0 all-reduces gradients; stage 1 as well, and all-gathers
    weights. Stage 2 reduce-scatters with every micro-batch, stage 3 also gathers forward and backward
    (Rajbhandari et al. 2020, section 7); these two hide behind backward with overlap_comm. Across nodes the
    slower of the two links counts, where all GPUs of a node share its ports.
    """
    if layout.ranks == 1:
        return 0.0
    assert hardware.link_gbps and hardware.network_gbps and hardware.gpus_per_node
    rate = hardware.link_gbps
    if layout.ranks > hardware.gpus_per_node:
        rate = min(rate, hardware.network_gbps * hardware.gpus_per_node)
    once = (
        WIDTHS[layout.precision][0] * model.elements * (layout.ranks - 1) / layout.ranks / (rate * 1e9 * LINK)
    )
    if layout.stage < 2:
        return once * (2 if layout.stage == 0 else 3)
    rounds = layout.accumulation * (1 if layout.stage == 2 else 3)
    exposed = max(0.0, once * rounds - hidden) if layout.zero.overlap_comm else once * rounds
    return exposed + (once if layout.stage == 2 else 0)


def offload(model: Model, layout: Layout, hardware: HardwareConfig) -> float:
    """Seconds of traffic with the host and of its AdamW, at HOST of the link's bandwidth.

    A rank's part of the gradients goes down with every micro-batch and its weights come up once a step; AdamW
    moves its bytes there. Weights that wait on the host come up for both passes of every micro-batch.
    """
    assert hardware.host_gbps
    part, w = model.elements / layout.ranks, WIDTHS[layout.precision][0]
    moved = 0.0
    if layout.offloads_optimizer:
        moved += part * (w * layout.accumulation + w + ADAM_BYTES)
    if layout.offloads_weights:
        moved += part * 2 * w * layout.accumulation
    return moved / (hardware.host_gbps * 1e9 * HOST)
