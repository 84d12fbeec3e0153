"""When ranks save together: room first, then every rank's part, then one verdict for all."""

from __future__ import annotations

import logging
import secrets
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from llmtrain import distributed
from llmtrain.config import UserError
from llmtrain.distributed import World
from llmtrain.training.checkpoint.attempt import Attempt
from llmtrain.training.checkpoint.best import Score, best_of
from llmtrain.training.checkpoint.config import CheckpointConfig
from llmtrain.training.checkpoint.directory import TEMPORARY, checkpoints, retire
from llmtrain.training.checkpoint.host import HostCopy
from llmtrain.training.checkpoint.manifest import directory_name
from llmtrain.training.checkpoint.peers import Peer
from llmtrain.training.checkpoint.reading import RANDOM
from llmtrain.training.checkpoint.space import free_bytes

if TYPE_CHECKING:
    from llmtrain.training.engine.state import EngineState

logger = logging.getLogger(__name__)

MAX_FAILED = 3
"""Saves in a row that fail after which a run ends."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that is there."""

    step: int
    path: Path
    bytes: int
    seconds: float
    """From the call of `save` until it was there."""
    stall_seconds: float
    """How long of that the run stood still."""
    scores: Sequence[Score]
    """The evaluations up to its step."""


@dataclass(frozen=True)
class Failed:
    """A checkpoint that could not be written; nothing of it is left."""

    step: int
    path: Path
    """Of the checkpoints of the run."""
    reason: str
    needed: int
    """Bytes it would have taken."""
    free: int
    """Bytes that were free before it."""

    def __str__(self) -> str:
        return (
            f"{self.path}: the checkpoint of step {self.step} could not be written: {self.reason}; "
            f"{self.needed:,} bytes needed, {self.free:,} free"
        )


class Saver:
    """Writes the checkpoints of a run. `save` and `join` are collective.

    `on_saved` is called on rank 0 when a checkpoint is there, maybe by a thread; `on_failed` on every rank.
    `verified` are steps whose checkpoints are known to be whole.
    """

    def __init__(
        self,
        directory: Path,
        config: CheckpointConfig,
        world: World,
        *,
        on_saved: Callable[[Saved], None],
        on_failed: Callable[[Failed], None],
        verified: Collection[int] = (),
        tick: Callable[[], None] = lambda: None,
    ) -> None:
        self._directory, self._config, self._world = directory, config, world
        self._on_saved, self._on_failed, self._tick = on_saved, on_failed, tick
        self._verified = set(verified)
        self._host = HostCopy()
        self._under_way: tuple[Attempt, int, int] | None = None
        """With the bytes it needs, and those that were free."""
        self.failures: list[Failed] = []
        """Those since the last save that succeeded."""
        self.seconds: float | None = None
        """What the last save that succeeded took, in the background or not; the same on every rank."""
        self._took = 0.0

    def save(self, state: EngineState, record: Mapping[str, Any], *, wait: bool = False) -> None:
        """Save the state after step `record["step"]`; a checkpoint of that step that stands is enough.

        Where `checkpoint.asynchronous` is set and `wait` is not, this returns when the state is copied, and
        the next `save` or `join` says what became of it. UserError after three failures in a row.
        """
        began = time.perf_counter()
        self.join()
        step = record["step"]
        if step in self._verified:
            return
        tensors = named_tensors(state) | random_states()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        plans = distributed.gather_objects(
            (size, free_bytes(self._directory), secrets.token_hex(4), Peer.of_this_process())
        )
        needed, free = sum(plan[0] for plan in plans), min(plan[1] for plan in plans)
        if needed > free:
            self._fail(Failed(step, self._directory, "the disk is too full", needed, free))
            return
        background = self._config.asynchronous and not wait
        if background:
            tensors = self._host.of(tensors)
        stall = time.perf_counter() - began
        scores: Sequence[Score] = record.get("scores", ())

        def published(path: Path, size: int) -> None:
            self._took = seconds = time.perf_counter() - began
            self._on_saved(Saved(step, path, size, seconds, stall if background else seconds, scores))
            self._retire(step, scores)

        attempt = Attempt(
            step=step,
            temporary=self._directory / f"{TEMPORARY}{directory_name(step)}-{plans[0][2]}",
            world=self._world,
            peers=[plan[3] for plan in plans],
            tensors=tensors,
            record={**record, "parameters": state.shapes, "scalars": state.scalars},
            published=published,
        )
        self._under_way = attempt, needed, free
        attempt.start()
        if not background:
            self.join()

    def holds(self, step: int) -> bool:
        """Whether the checkpoint of this step is known to be whole."""
        return step in self._verified

    def join(self) -> bool:
        """Wait for the save under way, on every rank; whether the newest save succeeded."""
        if self._under_way is None:
            return not self.failures
        (attempt, needed, free), self._under_way = self._under_way, None
        attempt.wait_written(self._tick)
        distributed.barrier()  # a rank that died is told here, and no file of it is waited for
        attempt.wait(self._tick)
        parts = distributed.gather_objects((attempt.error, self._took))
        errors = [error for error, _ in parts]
        if errors[0] is None:  # rank 0 has published it
            self.seconds = parts[0][1]
            self._verified.add(attempt.step)
            self.failures.clear()
            return True
        if self._world.is_main:
            shutil.rmtree(attempt.temporary, ignore_errors=True)
        reason = next(filter(None, errors[1:]), errors[0])  # rank 0 only repeats what another one met
        self._fail(Failed(attempt.step, self._directory, reason, needed, free))
        return False

    def _fail(self, failed: Failed) -> None:
        """A failed save is no failed run, until there are several in a row."""
        self.failures.append(failed)
        self._on_failed(failed)
        if len(self.failures) >= MAX_FAILED:
            raise UserError(
                f"{len(self.failures)} saves in a row failed; {failed}; "
                "make room, and the same command goes on",
                exit_code=1,
            )

    def _retire(self, step: int, scores: Sequence[Score]) -> None:
        """Remove what need not stay; what cannot be removed stays until the next time."""
        verified = {*self._verified, step}
        best = best_of(scores, dict(checkpoints(self._directory)))
        try:
            retire(self._directory, verified, self._config.keep, self._config.keep_every, best and best[0])
        except OSError as error:
            logger.warning("%s: an old checkpoint could not be removed: %s", self._directory, error)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Finish the save under way; alone where something went wrong, as other ranks may not come."""
        if error is None:
            self.join()
        elif self._under_way is not None:
            self._under_way[0].hurry()


def named_tensors(state: EngineState) -> dict[str, Tensor]:
    """Every tensor of a state by its name in a file: parameter, tensor and first element."""
    return {
        f"{piece.name}:{key}:{piece.start}": tensor
        for piece in state.pieces
        for key, tensor in piece.tensors.items()
    }


def random_states() -> dict[str, Tensor]:
    """The states of this rank's random number generators, by their names in a file."""
    states = {f"{RANDOM}:cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        states[f"{RANDOM}:cuda"] = torch.cuda.get_rng_state()
    return states
