"""A run directory opened for reading: its config, its tokenizer, its weights on one device."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ValidationError

from llmtrain.config import UserError, describe
from llmtrain.data.artefacts import POLL, cache_errors
from llmtrain.data.batch import Batch
from llmtrain.data.dataset import is_same_text
from llmtrain.data.growing import NotMadeError, Preparation
from llmtrain.data.prepare import look
from llmtrain.data.prepared import Prepared
from llmtrain.data.shards import ShardedSource
from llmtrain.data.tokenizing import make
from llmtrain.model import Decoder
from llmtrain.tokenizer import Tokenizer, load_tokenizer
from llmtrain.training.checkpoint import (
    CheckpointWeights,
    best_step,
    checkpoints,
    newest_verified,
    read_record,
    verified_checkpoint,
)
from llmtrain.training.config import TrainConfig
from llmtrain.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)

BEST: Literal["best"] = "best"
Step = int | Literal["best"] | None
"""Of a checkpoint, or the best one, or (None) the newest."""


@dataclass(frozen=True)
class FinishedRun:
    """A run at one of its checkpoints."""

    path: Path
    step: int
    config: TrainConfig
    tokenizer: Tokenizer
    weights: CheckpointWeights
    """By parameter name, fp32 on the CPU; each is read when it is asked for."""
    record: dict[str, Any]
    """What the checkpoint says of itself."""

    @cached_property
    def model(self) -> Decoder:
        """The decoder with these weights, in fp32 on one device."""
        return self.assemble().to("cuda" if torch.cuda.is_available() else "cpu")

    def assemble(self) -> Decoder:
        """The decoder with these weights, in fp32 on the CPU."""
        model = self.config.model.assemble(vocab_size=self.tokenizer.vocab_size, seq_len=self.config.seq_len)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(self.weights[name])
        return model

    def sources(self) -> tuple[dict[str, ShardedSource], dict[str, ShardedSource]]:
        """Training and held-out text: the shards it was trained on, or the same text prepared again.

        Other text is a UserError.
        """
        train, held_out = open_text(self.path, self.config, self.tokenizer, waits=True).open()
        for name, source in self.record["data"]["sources"].items():
            if name in train and not is_same_text(train[name], source):
                raise UserError(f"data.sources.{name}: its text is not what {self.path} was trained on")
        return train, held_out


def open_text(path: Path, config: TrainConfig, tokenizer: Tokenizer, *, waits: bool) -> Prepared:
    """The text of a run: the shards it reads, or the same text prepared again.

    What becomes of shards that are not there, `MissingShards` says.
    """
    directory = RunDirectory(path)
    written = directory.read_json("data/prepared.json") or {}
    prepared = Prepared.from_dict(tokenizer, written, config.cache_dir, config.data.remote_cache_bytes)
    there = {name: source for name, source in prepared.sources.items() if source.is_there()}
    sources = {name: source for name, source in config.data.sources.items() if name not in there}
    others = look(config.data.model_copy(update={"sources": sources}), tokenizer, config.cache_dir)
    prepared.sources = there | others.sources
    prepared.crew = MissingShards(directory, tokenizer, waits=waits)
    return prepared


class MissingShards:
    """What becomes of shards that a reader of a run asks for and nobody has made yet (a `Crew`).

    Where no run is at work they are made here, one after another. A run makes them itself, in the order of
    its training: a reader that `waits` has to wait for them, and for any other they are a NotMadeError.
    """

    error: UserError | None = None
    heard = 0

    def __init__(self, directory: RunDirectory, tokenizer: Tokenizer, *, waits: bool) -> None:
        self._directory, self._tokenizer, self._waits = directory, tokenizer, waits
        self._told: set[str] = set()

    def schedule(self, order: Mapping[str, Sequence[int]], weights: Mapping[str, float]) -> None:
        """There is no order but that of the questions."""

    def want(self, preparation: Preparation, numbers: Sequence[int]) -> None:
        """What is only wanted is not made."""

    def need(self, preparation: Preparation, number: int) -> None:
        """Make it, unless a run is at work."""
        if not self._directory.is_locked():
            self._make(preparation, number)
        elif not self._waits:
            raise NotMadeError(preparation.name)

    def check(self) -> None:
        """UserError where the run that is waited for is gone."""
        if not self._directory.is_locked():
            raise UserError(
                f"{self._directory.path}: the run ended before it had tokenised the text that is needed; "
                "ask again, and it is tokenised here"
            )

    def close(self) -> None:
        """Nothing is under way."""

    def _make(self, preparation: Preparation, number: int) -> None:
        self._tell(preparation)
        preparation.begin()
        with cache_errors(preparation.directory, f"source {preparation.name}"):
            while not make(preparation.task(number), self._tokenizer, lambda *_: None):
                time.sleep(POLL)  # another process has it; where that dies, it is made here
        preparation.finish()

    def _tell(self, preparation: Preparation) -> None:
        """One line a source."""
        if preparation.name not in self._told:
            self._told.add(preparation.name)
            logger.info(
                "%s: %d of %d shards are there; others that are needed are tokenised now, in this process"
                " (`llmtrain prepare` does it on every core)",
                preparation.name, len(preparation.done()), len(preparation.parts),
            )  # fmt: skip


class LocalModel:
    """The engine's two reading methods over a plain module in one process."""

    def __init__(self, model: Decoder) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device

    @torch.no_grad()
    def loss(self, batch: Batch) -> torch.Tensor:
        """Sum of the target losses of each row [rows]."""
        batch = batch.to(self.device)
        return self.model(batch.input_ids, batch.labels, batch.position_ids, batch.cu_seqlens).rows

    @torch.no_grad()
    def logits(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Logits [rows, T, V] of ids [rows, T]."""
        return self.model(input_ids.to(self.device))


def open_finished(path: Path, step: Step = None) -> FinishedRun:
    """Open a run at its newest checkpoint, at the one of `step`, or at the best.

    Works for a running run too, whatever ZeRO stage and number of ranks wrote it.
    """
    config = read_config(path)
    checkpoint = _verified(path, step)
    record = read_record(checkpoint)
    tokenizer = load_tokenizer(path / "tokenizer")
    return FinishedRun(path, record["step"], config, tokenizer, CheckpointWeights(checkpoint), record)


def _verified(path: Path, step: Step) -> Path:
    """The checkpoint of `step`, the best, or the newest that is whole."""
    if step is None:
        return newest_verified(path / "checkpoints")
    if step == BEST:
        step = best_step(RunDirectory(path))
        if step is None:
            raise UserError(f"{path}: --step best: no checkpoint of it was evaluated; name a step, or none")
    found = dict(checkpoints(path / "checkpoints"))
    if step not in found:
        there = f"there are {', '.join(map(str, found))}" if found else "there is none yet"
        raise UserError(f"{path}: no checkpoint of step {step}; {there}")
    return verified_checkpoint(found[step])


def read_config(path: Path) -> TrainConfig:
    """The typed config of the run in `path`."""
    value = RunDirectory(path).read_config()
    try:
        return TrainConfig.model_validate(value)
    except ValidationError as error:
        mistakes = "; ".join(describe(TrainConfig, value, error))
        raise UserError(f"{path / 'config.yaml'}: not a config of this version: {mistakes}") from error
