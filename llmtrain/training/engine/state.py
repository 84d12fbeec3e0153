"""What an engine trains, parameter by parameter: one form for all ZeRO stages, precisions and ranks.

DeepSpeed lays parameters out in flat fp32 tensors, on which the optimizer steps:

    stage 0               every parameter is one, whole on each rank
    stages 1 and 2        a group's parameters stand end to end, and each rank has an even part of that
    stage 3               each rank has an even part of every parameter, and those of a group end to end

A `Slice` tells which elements of a parameter lie where in one. Padding between and after them is left alone.
The elements and their names are the same under every layout: what one wrote, another can read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WEIGHT = "weight"
"""The key of the fp32 weights, beside those that the optimizer gives to what it keeps."""

COUNTERS = ("global_steps", "global_samples", "skipped_steps")
"""What DeepSpeed's engine counts, and puts into its own checkpoints."""

Read = Callable[[str, str, int, int], Tensor]
"""(name, key, start, count) -> [count] on the CPU: elements of what is kept of a parameter."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements of one parameter, flattened, for which this rank answers.

    start: the first of them.
    tensors: `weight` (fp32) and the optimizer's own (exp_avg, exp_avg_sq, momentum_buffer): 1-d, of equal
    length, and live: views that the next step changes.
    """

    name: str
    start: int
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class EngineState:
    """All that the training step needs to go on.

    pieces: this rank's; every element of every parameter is in exactly one piece of one rank.
    shapes: of all parameters, the same on every rank.
    scalars: plain JSON, the same on every rank: what the optimizer and DeepSpeed count.
    """

    pieces: Sequence[Piece]
    shapes: Mapping[str, tuple[int, ...]]
    scalars: dict[str, Any]


@dataclass(frozen=True)
class Slice:
    """Elements of a parameter on this rank: `count` from `start` on, at `offset` of a flat tensor.

    own: (start, count) of those it answers for: not all of them where other ranks have them too.
    whole: (offset, count) of the whole parameter in Muon's momentum, where that holds whole parameters.
    """

    name: str
    offset: int
    start: int
    count: int
    own: tuple[int, int]
    whole: tuple[int, int] | None = None

    def view(self, key: str, tensor: Tensor) -> tuple[int, Tensor]:
        """The first element and the live elements that lie in what is kept under `key`."""
        flat = tensor.detach().view(-1)
        if self.whole and key == "momentum_buffer":
            return 0, flat.narrow(0, *self.whole)
        return self.start, flat.narrow(0, self.offset, self.count)

    def owned(self, key: str, tensor: Tensor) -> Tensor:
        """The live elements this rank answers for."""
        first, view = self.view(key, tensor)
        start, count = self.own
        return view.narrow(0, start - first, count)


@dataclass(frozen=True)
class Flat:
    """A tensor that the optimizer steps on, its parameter group, and the slices in it."""

    tensor: Tensor
    group: Mapping[str, Any]
    slices: Sequence[Slice]

    def kept(self, state: Mapping[str, Any]) -> dict[str, Tensor]:
        """The weights and all that the optimizer keeps element by element."""
        return {WEIGHT: self.tensor, **{key: value for key, value in state.items() if _is_elementwise(value)}}

    def allocate(self, key: str) -> Tensor:
        """Zeros, as the optimizer would begin with under `key`."""
        whole = [part.whole[1] for part in self.slices if part.whole]
        if key == "momentum_buffer" and whole:
            return self.tensor.new_zeros(sum(whole))
        return torch.zeros_like(self.tensor)


def shapes(engine: Any) -> dict[str, tuple[int, ...]]:
    """Of every parameter, partitioned or not, in the model's order."""
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
    }


def read_state(engine: Any, rank: int, ranks: int) -> EngineState:
    """The state of a DeepSpeed engine between two steps; nothing is copied."""
    pieces: list[Piece] = []
    kept: dict[str, Any] = {}
    for flat in flats(engine, rank, ranks):
        state = engine.optimizer.state.get(flat.tensor, {})
        tensors, step = flat.kept(state), state.get("step")
        counted = {"keys": sorted(tensors), "step": None if step is None else int(step)}
        assert kept.setdefault(flat.group["role"], counted) == counted, "not all were stepped alike"
        pieces += [
            Piece(part.name, part.own[0], {key: part.owned(key, tensor) for key, tensor in tensors.items()})
            for part in flat.slices
            if part.own[1]
        ]
    counters = {name: getattr(engine, name) for name in COUNTERS}
    return EngineState(pieces, shapes(engine), {"optimizer": kept, "counters": counters})


@torch.no_grad()
def restore_state(engine: Any, rank: int, ranks: int, read: Read, scalars: Mapping[str, Any]) -> None:
    """Put a DeepSpeed engine into the state that `read` and `scalars` tell of, whatever layout wrote it.

    Collective. The optimizer's settings stay the engine's own.
    """
    for flat in flats(engine, rank, ranks):
        saved, state = scalars["optimizer"][flat.group["role"]], engine.optimizer.state[flat.tensor]
        for key in {*saved["keys"]} - {*flat.kept(state)}:
            state[key] = flat.allocate(key)
        if saved["step"] is not None or "step" in state:  # where torch's fused AdamW counts
            state["step"] = torch.tensor(float(saved["step"] or 0), device=flat.tensor.device)
        for key, tensor in flat.kept(state).items():
            if key not in saved["keys"]:  # saved before the first step
                tensor.zero_()
                continue
            for part in flat.slices:
                first, view = part.view(key, tensor)
                view.copy_(read(part.name, key, first, len(view)))
    for name in COUNTERS:
        setattr(engine, name, scalars["counters"][name])
    _update_weights(engine)


def _update_weights(engine: Any) -> None:
    """Set the weights that are computed with from the fp32 ones, as at the end of a step; collective."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage in (1, 2):
        optimizer.update_lp_params()
    if stage == 3:
        optimizer.checkpoint_event_prologue()  # lets go of what is gathered
        for number in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(number)
        optimizer.checkpoint_event_epilogue()  # gathers what stays whole


def flats(engine: Any, rank: int, ranks: int) -> Iterator[Flat]:
    """What the optimizer of a DeepSpeed engine steps on, on this rank."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return _of_parameters(engine.optimizer, names, rank, ranks)
    if stage == 3:
        return _of_partitioned_parameters(engine.optimizer, names, rank)
    if isinstance(engine.optimizer, BF16_Optimizer):
        return _of_bf16_groups(engine.optimizer, names, rank)
    return _of_groups(engine.optimizer, names, rank)


Names = Mapping[Tensor, str]


def _of_parameters(optimizer: Any, names: Names, rank: int, ranks: int) -> Iterator[Flat]:
    """Stage 0: every rank has all, and answers for an even part of each parameter."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            size = parameter.numel()
            start, end = size * rank // ranks, size * (rank + 1) // ranks
            own = (start, end - start)
            yield Flat(parameter, group, [Slice(names[parameter], 0, 0, size, own)])


def _of_bf16_groups(optimizer: Any, names: Names, rank: int) -> Iterator[Flat]:
    """Stage 1 over bf16 weights: no gaps."""
    for number, group in enumerate(optimizer.param_groups):
        flat, sizes, offset = optimizer.fp32_groups_flat_partition[number], [], 0
        for parameter in optimizer.bf16_groups[number]:
            sizes.append((names[parameter], offset, parameter.numel()))
            offset += parameter.numel()
        yield Flat(flat, group, _cut(sizes, rank * len(flat), len(flat), False))


def _of_groups(optimizer: Any, names: Names, rank: int) -> Iterator[Flat]:
    """Stages 1 and 2: parameters may be reordered (`round_robin_gradients`) and aligned.

    Muon's momentum is that of all parameters of which the rank has a part, whole, unless it is offloaded.
    """
    for number, group in enumerate(optimizer.param_groups):
        flat = optimizer.single_partition_of_fp32_groups[number]
        members = optimizer.round_robin_bit16_groups[number]
        offsets = optimizer.round_robin_bit16_offsets[number]
        sizes = [
            (names[parameter], offset, parameter.numel())
            for parameter, offset in zip(members, offsets, strict=True)
        ]
        whole = group.get("use_muon", False) and not optimizer.cpu_offload
        yield Flat(flat, group, _cut(sizes, rank * len(flat), len(flat), whole))


def _cut(sizes: Sequence[tuple[str, int, int]], begin: int, length: int, whole: bool) -> list[Slice]:
    """The slices in a rank's part of parameters (name, offset, elements) that stand end to end."""
    found: list[Slice] = []
    momenta = 0
    for name, offset, size in sizes:
        first, last = max(begin, offset), min(begin + length, offset + size)
        if first < last:
            start, count = first - offset, last - first
            place = (momenta, size) if whole else None
            found.append(Slice(name, first - begin, start, count, (start, count), place))
            momenta += size
    return found


def _of_partitioned_parameters(optimizer: Any, names: Names, rank: int) -> Iterator[Flat]:
    """Stage 3: the last parts of a parameter may be short, or empty."""
    for number, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        group, offset, found = optimizer.param_groups[optimizer.sub_group_to_group_id[number]], 0, []
        for parameter in optimizer.fp16_groups[number]:
            part = parameter.partition_numel()
            start = min(rank * part, parameter.ds_numel)
            count = min(part, parameter.ds_numel - start)
            found.append(Slice(names[parameter], offset, start, count, (start, count)))
            offset += part
        yield Flat(flat, group, found)


def _is_elementwise(value: Any) -> bool:
    return torch.is_tensor(value) and value.ndim > 0
