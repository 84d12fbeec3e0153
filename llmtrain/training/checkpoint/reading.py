"""What a verified checkpoint holds: any run of elements of a parameter, whole weights, random states."""

from __future__ import annotations

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from hashlib import sha256
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from llmtrain.config import UserError
from llmtrain.training.checkpoint.manifest import RECORD, read_record
from llmtrain.training.checkpoint.tensors import map_tensors

RANDOM = "random"
"""Names the random number states in a rank's file: `random:cpu`, `random:cuda`."""


def rank_file(rank: int) -> str:
    """`rank_00000.safetensors`"""
    return f"rank_{rank:05d}.safetensors"


class CheckpointTensors:
    """The tensors of a checkpoint that was verified, by parameter, whatever ranks and stage wrote them."""

    def __init__(self, checkpoint: Path) -> None:
        self.path = checkpoint
        self.record = read_record(checkpoint)
        self.shapes: dict[str, tuple[int, ...]] = {
            name: tuple(shape) for name, shape in self.record["parameters"].items()
        }
        self._random: dict[int, dict[str, Tensor]] = defaultdict(dict)
        runs: dict[tuple[str, str], list[tuple[int, Tensor]]] = defaultdict(list)
        for rank in range(self.record["world_size"]):
            for label, tensor in map_tensors(checkpoint / rank_file(rank)).items():
                name, _, rest = label.partition(":")
                if name == RANDOM:
                    self._random[rank][rest] = tensor
                else:
                    key, _, start = rest.partition(":")
                    runs[name, key].append((int(start), tensor))
        self._runs = {at: sorted(found, key=lambda run: run[0]) for at, found in runs.items()}
        for name, shape in self.shapes.items():
            found = sum(len(tensor) for _, tensor in runs.get((name, "weight"), ()))
            if found != prod(shape):
                raise UserError(
                    f"{checkpoint / RECORD}: parameters.{name}={list(shape)}: the files have {found:,} "
                    "elements of it; choose another checkpoint"
                )

    def read(self, name: str, key: str, start: int, count: int) -> Tensor:
        """`count` elements [count] from element `start` of a parameter's tensor, on the CPU.

        A part of one run is a view of the file; a KeyError where there is no such tensor.
        """
        runs = self._runs[name, key]
        parts = [runs[0][1][:0]]
        for first, tensor in runs[bisect_right(runs, start, key=lambda run: run[0]) - 1 :]:
            if count == 0 or not first <= start < first + len(tensor):
                break
            parts.append(tensor[start - first :][:count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        assert count == 0, f"{self.path}: {name}:{key} has no element {start}"
        return parts[-1] if len(parts) <= 2 else torch.cat(parts)

    def random_states(self, rank: int) -> dict[str, Tensor]:
        """Of the rank that had this number then; empty where there were fewer."""
        return dict(self._random.get(rank, {}))


def set_random_states(states: Mapping[str, Tensor]) -> None:
    """Put this rank's random number generators where a checkpoint had them, as far as it says."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])


def seed_random_states(seed: int, step: int, rank: int) -> None:
    """Begin this rank's random numbers anew, as a pure function of the three."""
    torch.manual_seed(int.from_bytes(sha256(f"{seed}:{step}:{rank}".encode()).digest()[:8], "little"))


class CheckpointWeights(Mapping[str, Tensor]):
    """The whole model's fp32 weights by parameter name, on the CPU, from a checkpoint that was verified.

    A weight takes memory from when it is asked for, and nothing of it is kept here.
    """

    def __init__(self, checkpoint: Path) -> None:
        self._tensors = CheckpointTensors(checkpoint)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._tensors.shapes[name]
        return self._tensors.read(name, "weight", 0, prod(shape)).view(shape).float()

    def shapes(self) -> list[torch.Size]:
        """Of every weight, in their order; nothing is read."""
        return [torch.Size(shape) for shape in self._tensors.shapes.values()]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors.shapes)

    def __len__(self) -> int:
        return len(self._tensors.shapes)
