"""Memory of a rank: what stays between the steps exactly, and the peak within a step.

Letters: B rows, T positions, N = B T tokens of a micro-batch, H, K, D heads, d = d_model, f = d_ff, L blocks,
P rows of the vocabulary's table, E elements of all parameters, n ranks. w, c, r: bytes of a weight, of what
matrix products read and write, and of the residual stream.

    precision        w  c  r
    fp32             4  4  4
    bf16             2  2  2
    bf16_autocast    4  2  4

Between the steps, read in DeepSpeed 0.19.8 and walked by tests/training/test_sizing.py. F is E with every
group padded to a multiple of 2 n (the flat buffers of stages 1 and 2), S the sum of ceil(size / n) over the
parameters (stage 3), m the states of the optimizer (AdamW: 2, Lion: 1, Muon: 1 of matrices (2), else 2):

    stage  wrapper                    weights     masters    states     fp32 gradients
    0      none                       w E         -          4 m E      -
    1      BF16_Optimizer (bf16)      w F         4 F / n    4 m F / n  4 F
    1, 2   DeepSpeedZeroOptimizer     w F         4 F / n    4 m F / n  -
    3      .._Optimizer_Stage3        w S (1)     4 S        4 m S      4 S, and a reduce bucket of w

(1) and where n > 1 the parameters up to the persistence threshold as a whole. (2) Under stages 1 and 2 of all
matrices that a rank has a part of, and a second time, to take back a step. Offload moves masters, states
and fp32 gradients to the host, under stage 3 also the weights if so asked.

The peak is the larger of two moments, each on top of that:

    backward begins: gradients of earlier micro-batches, all activations, what the loss head holds
    step:            all gradients, and the copies that the reduction and the step make of them

In between gradients grow as activations go, both about linearly, so nothing there is higher. Attention is
taken to be fused: no scores, and a mask under sdpa alone. What a kernel's backward pass holds for a while is
not counted (flash: 4 N H D of one block).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from dataclasses import dataclass, replace
from itertools import accumulate

from llmtrain.model.feed_forward import GATED
from llmtrain.model.loss import CHUNK
from llmtrain.training.config import TrainConfig
from llmtrain.training.engine.config import ResolvedPrecision, ZeroConfig
from llmtrain.training.sizing.model import Group, Model

WIDTHS: dict[ResolvedPrecision, tuple[int, int, int]] = {
    "fp32": (4, 4, 4),
    "bf16": (2, 2, 2),
    "bf16_autocast": (4, 2, 4),
}
"""w, c, r."""

ALLREDUCE_ELEMENTS = 500_000_000
"""deepspeed/runtime/engine.py MEMORY_OPT_ALLREDUCE_SIZE: elements that stage 0 flattens at once."""


@dataclass(frozen=True)
class Layout:
    """How a model is trained: everything beside its shape that memory and time depend on."""

    ranks: int
    rows: int
    """Of a micro-batch on a rank."""
    accumulation: int
    precision: ResolvedPrecision
    zero: ZeroConfig
    recompute: bool
    compiled: bool
    documents: bool
    """Whether attention keeps documents apart."""

    @classmethod
    def of(cls, config: TrainConfig, ranks: int, precision: ResolvedPrecision) -> Layout:
        """That of a run on GPUs, where `compile=auto` compiles."""
        return cls(
            ranks=ranks,
            rows=config.micro_batch_size,
            accumulation=max(1, config.global_batch_size // (ranks * config.micro_batch_size)),
            precision=precision,
            zero=config.deepspeed.zero_optimization,
            recompute=config.activation_checkpointing,
            compiled=config.compile is not False,
            documents=config.data.documents == "separate",
        )

    @property
    def stage(self) -> int:
        return self.zero.stage

    @property
    def bf16_optimizer(self) -> bool:
        """Whether DeepSpeed takes its BF16_Optimizer."""
        return self.stage == 1 and self.precision == "bf16"

    @property
    def offloads_optimizer(self) -> bool:
        return self.zero.offload_optimizer.device == "cpu"

    @property
    def offloads_weights(self) -> bool:
        return self.zero.offload_param.device == "cpu"


@dataclass(frozen=True)
class State:
    """What stays between the steps, bytes."""

    weights: int
    masters: int
    optimizer: int
    accumulators: int
    buckets: int
    staging: int
    """Page-locked copies on the host, where the optimizer is offloaded."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Memory:
    """Bytes of a rank at its peak, by part, and on its host."""

    weights: int
    masters: int
    optimizer: int
    gradients: int
    accumulators: int
    activations: int
    head: int
    buckets: int
    gathered: int
    host: int

    @property
    def total(self) -> int:
        """On the device."""
        return sum(value for key, value in vars(self).items() if key != "host")

    def as_dict(self) -> dict[str, int]:
        """For plan.json."""
        return {**vars(self), "total": self.total}


def state(model: Model, layout: Layout) -> State:
    """What stays between the steps, host and device together: the table above, without counters of steps."""
    w, n, zero = WIDTHS[layout.precision][0], layout.ranks, layout.zero
    if layout.stage == 0:
        states = sum(4 * sum(group.sizes) * group.states for group in model.groups)
        return State(w * model.elements, 0, states, 0, 0, 0)
    if layout.stage == 3:
        parts = [sum(-(-size // n) for size in group.sizes) for group in model.groups]
        weights = w * sum(parts) + persisted(model, layout)
        accumulators, buckets = 4 * sum(parts), w * zero.reduce_bucket_size * zero.contiguous_gradients
    else:
        flat = [padded_flat(group.sizes, layout) for group in model.groups]
        parts = [size // n for size in flat]
        weights = w * sum(flat)
        accumulators, buckets = 4 * sum(flat) * layout.bf16_optimizer, 0
    masters, staging = 4 * sum(parts), 0
    if layout.offloads_optimizer:
        staging = masters  # fp32 gradients for the step
        if layout.stage == 2:  # weights on their way back, and the largest gradient on its way there
            staging += w * sum(parts) + w * model.largest
            buckets += w * model.largest
    states = 0
    for part, group in zip(parts, model.groups, strict=True):
        kept = 4 * (held(group, layout) if layout.stage < 3 else part)
        states += kept * group.states
        buckets += kept * (layout.stage < 3 and keeps_whole(group, layout))
    return State(weights, masters, states, accumulators, buckets, staging)


def keeps_whole(group: Group, layout: Layout) -> bool:
    """Whether stages 1 and 2 keep all of each parameter that a rank has a part of."""
    return group.whole and not layout.offloads_optimizer


def held(group: Group, layout: Layout) -> int:
    """Elements of a group that a rank of stages 1 and 2 steps on: its part; the most of all ranks."""
    return max(touched(group, layout)) if keeps_whole(group, layout) else part_of(group, layout)


def part_of(group: Group, layout: Layout) -> int:
    """Elements of a rank's part of a group's flat buffer."""
    return padded_flat(group.sizes, layout) // layout.ranks


def touched(group: Group, layout: Layout) -> list[int]:
    """For each rank the elements of all parameters of a group that it has a part of, each whole.

    A table that is a group of its own is touched by every rank.
    """
    begins, part = [0, *accumulate(group.sizes)], part_of(group, layout)
    starts = [min(rank * part, begins[-1]) for rank in range(layout.ranks)]
    ends = [min(start + part, begins[-1]) for start in starts]
    return [
        begins[bisect_left(begins, end)] - begins[bisect_right(begins, start) - 1]
        for start, end in zip(starts, ends, strict=True)
    ]


def padded_flat(sizes: tuple[int, ...], layout: Layout) -> int:
    """Elements of a group's flat buffer: a multiple of 2 n; parameters at 16 bytes if so asked."""
    align = 1
    if layout.zero.parameter_alignment and not layout.bf16_optimizer:
        align = 16 // WIDTHS[layout.precision][0]
    placed = sum(-(-size // align) * align for size in sizes[:-1]) + sizes[-1]
    return -(-placed // (2 * layout.ranks)) * 2 * layout.ranks


def persisted(model: Model, layout: Layout) -> int:
    """Bytes of the parameters that stage 3 keeps whole beside their parts, because they are small."""
    threshold = layout.zero.stage3_param_persistence_threshold
    small = sum(size for group in model.groups for size in group.sizes if size <= threshold)
    return WIDTHS[layout.precision][0] * small * (layout.ranks > 1)


def saved_by_block(model: Model, layout: Layout) -> int:
    """Bytes a token that autograd keeps of one block, on a device whose norms are one kernel.

        what is kept                                   eager                  compiled
        ---------------------------------------------  ---------------------  ------------------------
        input of each norm on the residual stream      r d, 2 r d sequential  r d: the block's input
        its statistics (LayerNorm 8, RMSNorm 4)        a norm each            the same
        input of qkv and of feed-forward, each      c d each (1)           the same
        output of attention's last matrix              -                      c d: to find the second
                                                                              norm's input again
        q and k as rotated (RoPE only)                 c (H + K) D            the same
        output of qkv, that v is a view of             c (H + 2 K) D          the same
        output of attention; log sum exp (fp32)        c H D + 4 H            the same
        feed-forward, gated                            4 c f                  3 c f: one recomputed
        feed-forward, plain                            2 c f                  the same
        statistics of qk_norm                          4 (H + K)              the same

    (1) One under parallel_one_norm, but two where eager autocast casts it twice.
    Eager: what each operation of the block saves. Compiled: what torch's partitioner leaves (the minimum cut
    of AOTAutograd, which recomputes elementwise work but no matrix product).
    """
    config, (_, c, r) = model.config, WIDTHS[layout.precision]
    d, f = config.d_model, config.d_ff
    query, key = model.heads_width, config.n_kv_heads * config.d_head
    sequential, norms = config.residual == "sequential", 1 + (config.residual != "parallel_one_norm")
    inputs = norms if layout.compiled or c == r else 2
    statistics = 4 if config.norm == "rmsnorm" else 8
    streams = r * d * (2 if sequential and not layout.compiled else 1)
    streams += c * d * (sequential and layout.compiled)
    turned = c * (query + key) if getattr(config.position, "kind", "") == "rope" else 0
    attention = turned + c * (query + 2 * key) + c * query + 4 * config.n_heads
    attention += 4 * (config.n_heads + config.n_kv_heads) * config.qk_norm
    kept = (3 if layout.compiled else 4) if config.feed_forward in GATED else 2
    return streams + norms * statistics + inputs * c * d + attention + kept * c * f


def activations(model: Model, layout: Layout) -> int:
    """Bytes that the blocks and the final norm keep of a micro-batch for the backward pass.

    With recomputation a block keeps its input only, r d a token, and one block at a time is whole again.
    Autocast keeps bf16 copies of the matrices, of the one block where it is recomputed.
    """
    config, (w, c, r) = model.config, WIDTHS[layout.precision]
    tokens = layout.rows * model.decoder.seq_len
    blocks = 1 if layout.recompute else config.n_layers
    kept = blocks * saved_by_block(model, layout) + config.n_layers * r * config.d_model * layout.recompute
    last = (r + c) * config.d_model + (4 if config.norm == "rmsnorm" else 8)
    casts = c * blocks * model.block_matrices if w != c else 0
    return tokens * (kept + last) + casts + mask(model, layout)


def mask(model: Model, layout: Layout) -> int:
    """Bytes of the mask that sdpa is given, one for all blocks: c a score of a row, or of a head under ALiBi.

    0 under other kernels. Which one `auto` takes is known on the device only: there one without a mask.
    """
    config, slopes = model.config, model.config.position.has_slopes
    if config.attention.asked != "sdpa" or not (slopes or layout.documents):
        return 0
    matrices = (layout.rows if layout.documents else 1) * (config.n_heads if slopes else 1)
    return WIDTHS[layout.precision][1] * matrices * model.decoder.seq_len**2


def head(model: Model, layout: Layout) -> int:
    """Bytes that llmtrain/model/loss.py holds as the backward pass begins.

    The gradients of its input, c N d, and of its table, 4 P d; while it runs also the logits of a chunk, c a
    logit (in eager mode also their fp32 copy and a mask, 5), and under autocast bf16 copies of both inputs.
    """
    w, c, r = WIDTHS[layout.precision]
    d, tokens = model.config.d_model, layout.rows * model.decoder.seq_len
    chunk = -(-tokens // -(-tokens // CHUNK))
    logits = chunk * model.rows * (c + (0 if layout.compiled else 5))
    casts = c * d * ((w != c) * model.rows + (r != c) * tokens)
    return c * tokens * d + 4 * model.rows * d + logits + casts


def gathered(model: Model, layout: Layout) -> int:
    """Bytes of weights that stage 3 has whole at a time.

    DeepSpeed keeps what is used again within max_reuse_distance, up to max_live_parameters, and gathers
    prefetch_bucket_size ahead; never less than what it gathers at once: a table, or a block, which is a leaf.
    """
    if layout.stage < 3 or layout.ranks == 1:
        return 0
    zero, at_once = layout.zero, max(model.largest, model.block_elements)
    live = min(zero.stage3_max_live_parameters, zero.stage3_max_reuse_distance)
    whole = min(model.elements, max(live, at_once + zero.stage3_prefetch_bucket_size))
    return max(0, WIDTHS[layout.precision][0] * whole - persisted(model, layout))


def memory(model: Model, layout: Layout) -> Memory:
    """Of a rank at its peak: the larger of the two moments, see the top of this file."""
    kept, passing = state(model, layout), _passing(model, layout)
    steady = _placed(kept, model, layout)
    backward = replace(
        steady,
        gradients=passing.gradients if layout.accumulation > 1 else 0,
        activations=activations(model, layout),
        head=head(model, layout),
        buckets=kept.buckets + passing.reducing,
        gathered=gathered(model, layout),
    )
    step = replace(steady, gradients=passing.gradients, buckets=kept.buckets + passing.copies)
    return max(backward, step, key=lambda moment: moment.total)


@dataclass(frozen=True)
class _Passing:
    """Bytes that come and go within a step."""

    gradients: int
    """Held from one micro-batch to the next, beside the fp32 accumulators."""
    reducing: int
    """Buffers while gradients are partitioned in backward, and the largest gradient on its way there."""
    copies: int
    """What the reduction at the last micro-batch and the step copy."""


def _passing(model: Model, layout: Layout) -> _Passing:
    w, whole = WIDTHS[layout.precision][0], model.elements
    largest = model.largest
    part = 4 * sum(held(group, layout) for group in model.groups)
    buckets = w * layout.zero.reduce_bucket_size * (2 if layout.zero.overlap_comm else 1)
    if layout.stage == 0:
        return _Passing(w * whole, 0, w * min(whole, ALLREDUCE_ELEMENTS + largest))
    if layout.bf16_optimizer:  # flattens the fp32 gradients, and sends that as bf16
        return _Passing(w * whole, 0, (4 + w) * whole)
    if layout.stage == 1:  # the mean of this rank's part, and its flat copy
        return _Passing(w * whole, 0, buckets + 2 * part)
    if layout.stage == 2 and layout.offloads_optimizer:
        return _Passing(0, buckets + w * largest, 0)
    if layout.stage == 2 and layout.precision == "bf16":  # means in fp32 beside bf16 weights are flat already
        return _Passing(part, buckets + w * largest, 0)
    if layout.stage == 2:  # DeepSpeed's grads_in_partition, again for the last micro-batch or as a flat copy
        kept = 4 * max(map(sum, zip(*(touched(group, layout) for group in model.groups), strict=True)))
        return _Passing(kept, buckets + w * largest, kept)
    return _Passing(0, w * largest, w * largest)


def _placed(kept: State, model: Model, layout: Layout) -> Memory:
    """What stays, on the device and on the host."""
    weights, masters, optimizer, accumulators, host = (
        kept.weights, kept.masters, kept.optimizer, kept.accumulators, 0
    )  # fmt: skip
    if layout.offloads_weights:
        small = persisted(model, layout)
        host, weights = weights - small, small
    if layout.offloads_optimizer:
        host += masters + optimizer + accumulators + kept.staging
        if layout.stage == 2 and layout.accumulation > 1:
            host += masters  # fp32 gradients of earlier micro-batches
        masters = optimizer = accumulators = 0
    return Memory(weights, masters, optimizer, 0, accumulators, 0, 0, 0, 0, host)


def checkpoint_bytes(model: Model) -> int:
    """Bytes of a checkpoint's tensors: fp32 weights and the optimizer's states, whatever the layout."""
    return 4 * sum(sum(group.sizes) * (1 + group.states) for group in model.groups)
