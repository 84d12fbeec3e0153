"""DeepSpeed's checkpoint files, read as data: no pickled code ever runs."""

from __future__ import annotations

import copyreg
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from llmtrain import distributed


@contextmanager
def allow_state_classes() -> Iterator[None]:
    """Let `torch.load` build the three classes that DeepSpeed's state holds, and nothing else.

    `TORCH_FORCE_WEIGHTS_ONLY_LOAD` also binds the readers inside DeepSpeed, which ask for full unpickling.
    """
    from deepspeed.runtime.fp16.loss_scaler import LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    name = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        with torch.serialization.safe_globals([LossScaler, ZeroStageEnum, fragment_address]):
            yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def write_enums_by_value() -> None:
    """Make the enum in DeepSpeed's state one that `torch.load` reads as data.

    Python before 3.11.4 pickles its members as a call of `getattr`, which could fetch anything.
    """
    from deepspeed.runtime.zero.config import ZeroStageEnum

    copyreg.pickle(ZeroStageEnum, lambda stage: (ZeroStageEnum, (stage.value,)))


class CheckpointWeights(Mapping[str, torch.Tensor]):
    """The whole model's fp32 weights by parameter name, from a checkpoint's engine files on the CPU.

    Needs neither the ranks nor the device that wrote them. The files are mapped: a weight takes memory from
    when it is asked for, and nothing of it is kept here.
    """

    def __init__(self, directory: Path, stage: int) -> None:
        distributed.quiet_deepspeed()
        from deepspeed.utils import zero_to_fp32 as names

        engine = str(directory / "engine")
        with allow_state_classes():
            model = _map(names.get_model_state_files(engine)[0])
            if stage == 0:
                self._pieces: dict[str, Pieces] = {
                    name: (value.shape, [value.flatten()]) for name, value in model["module"].items()
                }
                return
            ranks = [_map(file)["optimizer_state_dict"] for file in names.get_optim_files(engine)]
        pieces = _of_partitioned_parameters if stage == 3 else _of_partitioned_groups
        self._pieces = dict(pieces(model["param_shapes"], ranks))

    def __getitem__(self, name: str) -> torch.Tensor:
        shape, pieces = self._pieces[name]
        return torch.cat(pieces)[: shape.numel()].view(shape).float()

    def shapes(self) -> list[torch.Size]:
        """Of every weight, in their order; nothing is read."""
        return [shape for shape, _ in self._pieces.values()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)


Pieces = tuple[torch.Size, list[torch.Tensor]]
"""A parameter's shape, and the runs of elements that make it, flat and mapped."""
Shapes = Sequence[Mapping[str, torch.Size]]
"""The parameters of each of the optimizer's groups, in order."""


def _of_partitioned_groups(groups: Shapes, ranks: Sequence[Any]) -> Iterator[tuple[str, Pieces]]:
    """ZeRO 1 and 2: a group's parameters stand end to end, with gaps, and each rank has a part of that."""
    gaps = ranks[0].get("param_alignment_paddings")
    for number, group in enumerate(groups):
        flat = [rank["single_partition_of_fp32_groups"][number] for rank in ranks]
        offset = 0
        for place, (name, shape) in enumerate(group.items()):
            yield name, (shape, _cut(flat, offset, shape.numel()))
            offset += shape.numel() + (gaps[number][place] if gaps else 0)


def _of_partitioned_parameters(groups: Shapes, ranks: Sequence[Any]) -> Iterator[tuple[str, Pieces]]:
    """ZeRO 3: each rank has a part of every parameter, the last one filled up."""
    offset = 0
    for name, shape in ((name, shape) for group in groups for name, shape in group.items()):
        part = -(-shape.numel() // len(ranks))
        yield name, (shape, [run for rank in ranks for run in _cut(rank["fp32_flat_groups"], offset, part)])
        offset += part


def _cut(flat: Sequence[torch.Tensor], start: int, count: int) -> list[torch.Tensor]:
    """The `count` elements from `start` on of tensors that stand end to end."""
    runs = []
    for tensor in flat:
        if count > 0 and start < len(tensor):
            runs.append(tensor[start : start + count])
            count -= len(runs[-1])
        start = max(0, start - len(tensor))
    assert count <= 0, "the checkpoint's files hold less than its parameters"
    return runs


def _map(file: str) -> Any:
    return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
