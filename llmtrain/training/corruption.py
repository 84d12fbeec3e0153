"""Silent corruption: ranks that should hold or compute the same are compared, bit by bit.

A step writes the low-precision weights anew from the masters, and ZeRO gathers them: a flipped bit in such a
copy is there until the end of the next step, and only what it did to the gradient stays. So a check sees the
memory as the step before it left it, and the arithmetic of the moment. Hardware that fails once fails again.
"""

from __future__ import annotations

import logging
import socket
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

import torch
from pydantic import Field
from torch import Tensor

from llmtrain import distributed
from llmtrain.config import Config, ExitCode, UserError
from llmtrain.data.batch import Batch
from llmtrain.training.engine.replicas import checksum, replicas, rounded
from llmtrain.training.report import write_last_report

if TYPE_CHECKING:
    from llmtrain.training.build import Run
    from llmtrain.training.engine.engine import Engine

logger = logging.getLogger(__name__)

NAMED = 3
"""Tensors that a message names."""


class CorruptionConfig(Config):
    """How often ranks compare what they hold and compute."""

    every: Annotated[int, Field(ge=0)]


@dataclass(frozen=True)
class Answer:
    """What one rank says at a check.

    checksums: of the replicas. strays: parameters whose weights are not its fp32 masters, rounded.
    losses: bits of a micro-batch's row losses, computed twice.
    """

    host: str
    checksums: Sequence[int]
    strays: Sequence[str]
    losses: tuple[Sequence[int], Sequence[int]]


@dataclass(frozen=True)
class Mismatch:
    """What differs, in words, and the ranks of which one or more are wrong."""

    what: str
    ranks: Sequence[int]
    tensors: Sequence[str] = ()


class CorruptionCheck:
    """Every `every` steps, and before every save: checksums of the replicas, and a repeated micro-batch."""

    def __init__(self, config: CorruptionConfig) -> None:
        self._every = config.every
        self._batch: Batch | None = None
        self._checked = 0

    def is_due(self, step: int) -> bool:
        """Whether a check comes after a step; every rank answers alike."""
        return self._every > 0 and step % self._every == 0

    def watch(self, batch: Batch) -> None:
        """Take the rows that the next check computes again."""
        if self._every:
            self._batch = batch

    def check(self, run: Run) -> None:
        """UserError with exit code 88 on every rank, where the state after `run.step` is corrupt; collective.

        Where the option is off, or this step was checked already, nothing happens.
        """
        if not self._every or self._checked == run.step:
            return
        self._checked = run.step
        names, sums = _read((name, checksum(tensor)) for name, tensor in replicas(run.engine))
        losses = _repeat(run.engine, self._batch, run.config.micro_batch_size)
        answers = distributed.gather_objects(Answer(socket.gethostname(), sums, _strays(run.engine), losses))
        mismatch = compare(names, answers)
        if mismatch is not None:
            _stop(run, mismatch, [answer.host for answer in answers])


def compare(names: Sequence[str], answers: Sequence[Answer]) -> Mismatch | None:
    """The first thing in which the ranks' answers are not what they should be; None where all is well."""
    unsteady = [rank for rank, answer in enumerate(answers) if answer.losses[0] != answer.losses[1]]
    if unsteady:
        return Mismatch("computes another loss when it computes a micro-batch again", unsteady)
    astray = [rank for rank, answer in enumerate(answers) if answer.strays]
    if astray:
        tensors = dict.fromkeys(name for rank in astray for name in answers[rank].strays)
        return Mismatch("holds weights that are not its fp32 masters", astray, [*tensors])
    odd = odd_ones([tuple(answer.checksums) for answer in answers])
    if odd:
        columns = zip(*(answer.checksums for answer in answers), strict=True)
        differing = [name for name, column in zip(names, columns, strict=True) if len({*column}) > 1]
        return Mismatch("does not hold what the other ranks hold", odd, differing)
    odd = odd_ones([tuple(answer.losses[0]) for answer in answers])
    if odd:
        return Mismatch("computes another loss of the same micro-batch than the other ranks", odd)
    return None


def odd_ones(values: Sequence[Hashable]) -> list[int]:
    """Places of the values that are not the majority's; all of them where there is none, [] if all agree."""
    (common, count), *others = Counter(values).most_common()
    if not others:
        return []
    majority = 2 * count > len(values)
    return [place for place, value in enumerate(values) if not (majority and value == common)]


def _strays(engine: Engine) -> list[str]:
    """Parameters of which this rank's weights are not its masters."""
    pairs = rounded(engine)
    names, gaps = _read((name, checksum(ours) - checksum(masters)) for name, ours, masters in pairs)
    return [name for name, gap in zip(names, gaps, strict=True) if gap]


def _read(named: Iterable[tuple[str, Tensor]]) -> tuple[list[str], list[int]]:
    """Names and numbers; a device is waited for once."""
    names, numbers = [], []
    for name, number in named:
        names.append(name)
        numbers.append(number)
    return names, torch.stack(numbers).tolist() if numbers else []


def _repeat(
    engine: Engine, batch: Batch | None, micro_batch_size: int
) -> tuple[Sequence[int], Sequence[int]]:
    """Bits of the row losses of rank 0's first micro-batch, computed here twice; empty before any step."""
    first = distributed.broadcast_object(batch and batch.split(micro_batch_size)[0])
    if first is None:
        return [], []
    once, again = (engine.loss(first).float().view(torch.int32).tolist() for _ in range(2))
    return once, again


def _stop(run: Run, found: Mismatch, hosts: Sequence[str]) -> None:
    ranks = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in found.ranks)
    one_of = "one of " if len(found.ranks) == run.world.world_size > 1 else ""
    tensors = ", ".join(found.tensors[:NAMED])
    more = f" and {len(found.tensors) - NAMED} more" if len(found.tensors) > NAMED else ""
    if run.world.is_main:
        run.directory.append_event(
            "corruption",
            step=run.step,
            ranks=found.ranks,
            hosts=[hosts[rank] for rank in found.ranks],
            what=found.what,
            tensors=found.tensors,
        )
        write_last_report(run.directory.path)
    raise UserError(
        f"silent corruption after step {run.step}: {one_of}{ranks} {found.what}"
        f"{f' ({tensors}{more})' if tensors else ''}; nothing was saved: take that machine out, and start "
        "the same command again to go on from the newest checkpoint",
        exit_code=ExitCode.CORRUPTION,
    )
